"""Figure 2: the right cases, slices and values, drawn upright; volumes that are missing are named."""

from __future__ import annotations

import numpy as np
import pytest

from study.figures.comparison import draw_comparison, ranked
from study.results import read_results
from tests.helpers.studies import LARGEST, texts, truth


@pytest.mark.parametrize(
    ("dice", "picks"),
    [
        ({}, []),
        ({"a": 0.5}, [("best", "a")]),
        ({"a": 0.1, "b": 0.5}, [("best", "b"), ("worst", "a")]),
        ({"a": 0.1, "b": 0.5, "c": 0.3}, [("best", "b"), ("median", "c"), ("worst", "a")]),
        ({"d": 0.5, "c": 0.5, "b": 0.5, "a": 0.5}, [("best", "a"), ("median", "c"), ("worst", "d")]),
    ],
)
def test_best_median_and_worst(dice, picks):
    assert ranked(dice) == picks


def test_comparison_draws_the_masks(compared):
    axes = np.reshape(draw_comparison(read_results(compared)).axes, (3, 5))
    assert [texts(axis)[-1] for axis in axes[0]] == ["image", "truth", "cam", "cdm", "cg"]
    heads = [texts(line[0])[0].split() for line in axes]
    ranks = (("best", "p2"), ("median", "p3"), ("worst", "p1"))
    assert heads == [[f"{rank},", "slice", str(LARGEST), case] for rank, case in ranks]
    # p1 moved by 2, and by 3 more for cam; the square is 8 wide
    assert [texts(axis)[0] for axis in axes[2][2:]] == [f"{1 - 5 / 8:.2f}", f"{1 - 2 / 8:.2f}", f"{1 - 2 / 8:.2f}"]
    drawn = axes[2][3].images[1].get_array()
    assert np.array_equal(~drawn.mask, np.roll(truth(), 2, axis=0)[..., LARGEST].T)


def test_comparison_of_named_cases(compared):
    figure = draw_comparison(read_results(compared), cases=["p3"])
    assert len(figure.axes) == 5 and "p3" in texts(figure.axes[0])[0]


def test_a_run_without_volumes_is_said(compared, tmp_path):
    results = read_results(compared)
    moved = compared / "cells" / "cam" / "seed0" / "case0" / "case0_mask.nii.gz"
    moved.rename(tmp_path / moved.name)
    try:
        axes = np.reshape(draw_comparison(results).axes, (3, 5))
    finally:
        (tmp_path / moved.name).rename(moved)
    assert texts(axes[2][2]) == ["not kept"] and texts(axes[1][2]) != ["not kept"]
