"""Volumes of a case: slices in the radiological convention, and the truth of the target labels."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from study.volumes import Case, read_case
from tests.helpers.studies import truth


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLP", "AIR", "PSL"])
@pytest.mark.parametrize(
    ("through", "corner"),
    [("S", "AR"), ("A", "SR"), ("R", "SA")],  # the patient's right is on the left, the front at the top or on the left
)
def test_planes_are_radiological(codes, through, corner):
    names = ("LR", "PA", "IS")
    ras = np.zeros((7, 6, 5), np.uint8)
    ras[tuple(-1 if pair[1] in corner + through else 0 for pair in names)] = 1  # on the last plane of three sizes
    stored = nib.Nifti1Image(ras, np.diag([2.0, 3, 4, 1]))
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", codes)))
    stored = stored.as_reoriented(turn)
    array = np.asarray(stored.dataobj)
    axis = next(i for i, code in enumerate(codes) if any(code in pair and through in pair for pair in names))
    case = Case("x", array, stored.affine, axis, None, array, array)
    plane = case.plane(array, case.largest())
    size = {"S": (6, 7), "A": (5, 7), "R": (5, 6)}[through]
    assert plane.shape == size and plane[0, 0] == 1 and plane.sum() == 1
    assert case.pixel == {"S": (3, 2), "A": (4, 2), "R": (4, 3)}[through]


def test_the_truth_is_that_of_the_target_labels(compared):
    place = compared / "cells" / "cg" / "seed0" / "case0"
    assert read_case(place).truth is None, "unknown: another organ's outline would be worse than none"
    assert np.array_equal(read_case(place, []).truth, truth()) and np.array_equal(read_case(place, [1]).truth, truth())
    assert not read_case(place, [2]).truth.any()
