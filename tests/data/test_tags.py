"""Slice tags: from label volumes, and from CSV files whose errors name the line."""

import numpy as np
import pytest

from custom_modules.data.layouts import find_cases
from custom_modules.data.tags import read_tags, tag_cases, tags_of_label
from tests.helpers.volumes import brats_case


def test_tags_of_label_by_value_axis_and_area():
    label = np.zeros((3, 2, 2), np.int32)
    label[0, :, 1] = 2  # 2 pixels in slice 1 of axis 2, in slice 0 of axis 0
    label[1, 0, 0] = 5
    assert tags_of_label(label) == [1, 1]
    assert tags_of_label(label, [2]) == [0, 1]
    assert tags_of_label(label, min_area=1) == [0, 1]
    assert tags_of_label(label, min_area=2) == [0, 0]
    assert tags_of_label(label, slice_axis=0) == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,slice\np1,0\n", "must start with the header case,slice,label"),
        ("", "must start with the header"),
        ("case,slice,label\np1,0,2\n", r"line 2 \(case 'p1'\): label must be 0 or 1; got '2'"),
        ("case,slice,label\np1,0,1\np1,-1,1\n", "line 3 .*whole number from 0; got '-1'"),
        ("case,slice,label\np1,0\n", "no slice is tagged 1"),
        ("case,slice,label\np1,0,1\np1,0,0\n", "line 3 .*slice 0 is 0 here and 1 above"),
        ("case,slice,label\nq,0,1\n", "unknown cases: q. Cases are named like p1"),
        ("case,slice,label\np1,5,1\n", "'p1' name slice 5; its last is 4"),
    ],
)
def test_csv_errors_name_line_or_case(tmp_path, text, message):
    brats_case(tmp_path, "p1")
    (tmp_path / "tags.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tag_cases(find_cases(tmp_path), read_tags(tmp_path / "tags.csv"))
