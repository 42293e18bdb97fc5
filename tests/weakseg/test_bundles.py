"""Bundles are found by name or folder, and knobs become what `python -m monai.bundle` would be given."""

from __future__ import annotations

import pytest

from tests.helpers.bundles import REPO
from weakseg.bundles import bundle_folder, checked_knobs
from weakseg.options import WrongCommand

CONFIG = {"seed": 0, "amp": True, "target_labels": [], "noise_level": "$1", "ckpt_path": "x", "nets": {"a": [1]}}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ({"seed": ["3"]}, "3"),
        ({"amp": []}, "True"),
        ({"amp": ["no"]}, "False"),
        ({"amp": ["true"]}, "True"),
        ({"target_labels": ["1"]}, "[1]"),
        ({"target_labels": ["1", "4"]}, "[1,4]"),
        ({"target_labels": ["[1,4]"]}, "[1,4]"),
        ({"noise_level": ["250", "300"]}, "[250,300]"),
        ({"nets#a#0": ["5"]}, "5"),
    ],
)
def test_words_become_the_value_of_a_knob(words, value):
    assert list(checked_knobs(words, CONFIG, {}).values()) == [value]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sede": ["3"]}, "--sede: there is no knob 'sede'; did you mean one of .'seed'"),
        ({"amp": ["maybe"]}, "--amp must be exactly True or False; got 'maybe'"),
        ({"output_dir": ["x"]}, "--output_dir is set by --out"),
    ],
)
def test_wrong_knobs_are_errors(words, message):
    with pytest.raises(WrongCommand, match=message):
        checked_knobs(words, CONFIG | {"output_dir": "."}, {"output_dir": "--out"})


def test_a_bundle_is_found_by_name_or_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = REPO / "bundles" / "brats_flair"
    assert bundle_folder("brats_flair") == bundle_folder(folder) == folder
    (tmp_path / "own" / "configs").mkdir(parents=True)
    (tmp_path / "own" / "configs" / "inference.yaml").write_text("")
    assert bundle_folder("own") == tmp_path / "own"
    with pytest.raises(WrongCommand, match="no bundle 'brats': give one of brats_flair, chaos_kidney, or the fol"):
        bundle_folder("brats")
