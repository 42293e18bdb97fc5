"""Metrics against hand-computed 4x4 arrays and an independent HD95."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from custom_modules.evaluation.metrics import slice_metrics, summarise, volume_metrics

LABEL = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
PRED = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])  # the square, moved by one pixel
EMPTY = np.zeros((4, 4), int)


def volume(*slices: np.ndarray) -> np.ndarray:
    return np.stack(slices, axis=-1)


def brute_force_hd95(pred: np.ndarray, label: np.ndarray, spacing: tuple[float, float]) -> float:
    """All pairwise distances (mm) of the two surfaces; independent of MONAI."""
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in (pred, label)]
    distances = cdist(*surfaces)
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


def test_slice_metrics_by_hand():
    pred, label = volume(PRED, EMPTY, LABEL, PRED), volume(LABEL, LABEL, LABEL, EMPTY)
    rows = slice_metrics(pred, label, spacing=(2.0, 3.0, 5.0))
    assert [(row["slice"], row["area"]) for row in rows] == [(0, 4), (1, 4), (2, 4)]  # slice 3 is negative
    # moved: 2 of 4 + 4 pixels shared; surface distances 0, 0, 3, 3 mm (one column), whose 95th percentile is 3
    assert [row["dice"] for row in rows] == pytest.approx([2 * 2 / 8, 0, 1])
    assert [row["iou"] for row in rows] == pytest.approx([2 / 6, 0, 1])
    assert rows[0]["hd95"] == pytest.approx(3) and rows[2]["hd95"] == 0
    assert math.isnan(rows[1]["hd95"])  # an empty prediction is undefined, not 0


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_hd95_matches_brute_force(slice_axis):
    rng = np.random.default_rng(slice_axis)
    pred, label = (rng.random((9, 10, 11)) > threshold for threshold in (0.9, 0.6))
    spacing = (0.7, 1.9, 3.1)
    in_plane = tuple(s for axis, s in enumerate(spacing) if axis != slice_axis)
    rows = slice_metrics(MetaTensor(pred), torch.from_numpy(label), slice_axis, spacing)
    assert len(rows) == label.shape[slice_axis]
    for row in rows:
        p, g = (mask.take(row["slice"], slice_axis) for mask in (pred, label))
        assert row["area"] == g.sum()
        assert row["dice"] == pytest.approx(2 * (p & g).sum() / (p.sum() + g.sum()))
        assert row["iou"] == pytest.approx((p & g).sum() / (p | g).sum())
        assert row["hd95"] == pytest.approx(brute_force_hd95(p, g, in_plane), abs=1e-4)


def test_surface_reaches_the_border():
    full, corner = np.ones((6, 5), bool), np.zeros((6, 5), bool)
    corner[0, 0] = True
    (row,) = slice_metrics(volume(corner), volume(full), spacing=(1, 2, 1))
    assert row["hd95"] == pytest.approx(brute_force_hd95(corner, full, (1, 2)), abs=1e-4)


@pytest.mark.parametrize(
    ("min_area", "kept"),
    [(0, [0, 1, 2]), (1, [0, 1, 2]), (2, [1, 2]), (4, [2]), (5, []), (2 / 16, [1, 2]), (0.13, [2]), (0.25, [2])],
)
def test_min_area_in_pixels_and_as_fraction(min_area, kept):
    one, two = EMPTY.copy(), EMPTY.copy()
    one[0, 0] = two[0, :2] = 1
    two[0, 1] = 1
    label = volume(one, two, LABEL, EMPTY)
    assert [row["slice"] for row in slice_metrics(label, label, min_area=min_area)] == kept


def test_min_area_fraction_is_exact():
    label = np.zeros((10, 10, 1), int)
    label[0, :7] = 1  # 7 of 100 pixels; 0.07 * 100 is 7.000000000000001
    assert len(slice_metrics(label, label, min_area=0.07)) == 1


def test_no_positive_slice_gives_no_row():
    label = volume(LABEL, LABEL, EMPTY)
    assert slice_metrics(label, np.zeros_like(label)) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"slice_axis": 3}, "slice_axis"),
        ({"spacing": (1, 0, 1)}, "spacing"),
        ({"spacing": (1, 1)}, "spacing"),
        ({"min_area": -1}, "min_area"),
        ({"pred": volume(PRED * 2)}, "pred must be binary"),
        ({"label": volume(LABEL, LABEL)}, r"pred \(4, 4, 1\), label \(4, 4, 2\)"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        slice_metrics(**{"pred": volume(PRED), "label": volume(LABEL), **kwargs})


# what the table of empty masks in `metrics` says: (predicted and true slices, slice Dice, HD95, volume Dice)
EMPTIES = {
    "neither, in one slice": ((LABEL, EMPTY), (LABEL, EMPTY), {0: (1, 0)}, 1),
    "prediction without target": ((LABEL, PRED), (LABEL, EMPTY), {0: (1, 0)}, 2 * 4 / (8 + 4)),
    "target without prediction": ((LABEL, EMPTY), (LABEL, LABEL), {0: (1, 0), 1: (0, None)}, 2 * 4 / (4 + 8)),
    "no target at all": ((EMPTY, PRED), (EMPTY, EMPTY), {}, 0),
    "no prediction at all": ((EMPTY, EMPTY), (LABEL, EMPTY), {0: (0, None)}, 0),
    "nothing at all": ((EMPTY, EMPTY), (EMPTY, EMPTY), {}, None),
}


@pytest.mark.parametrize("what", EMPTIES)
def test_the_rule_for_empty_masks(what):
    pred, label, slices, volume_dice = EMPTIES[what]
    rows = slice_metrics(volume(*pred), volume(*label))
    assert {row["slice"]: (row["dice"], None if math.isnan(row["hd95"]) else row["hd95"]) for row in rows} == slices
    measured = volume_metrics(volume(*pred), volume(*label))
    assert measured["volume_dice"] == pytest.approx(math.nan if volume_dice is None else volume_dice, nan_ok=True)
    case = {"case": "a", "seed": 0}
    summary = summarise([case | row for row in rows], [case | measured])
    undefined = sum(hd95 is None for _, hd95 in slices.values())
    assert (summary["n_slices"], summary["hd95"]["n_undefined"]) == (len(slices), undefined)
    assert summary["volume_dice"]["n_undefined"] == int(volume_dice is None)


def slice_row(case, seed, index, dice, hd95=1.0, **more):
    return {"case": case, "seed": seed, "slice": index, "area": 4, "dice": dice, "iou": dice / 2, "hd95": hd95, **more}


def test_summary_arithmetic():
    # case a has three slices, b one: mean over slices 0.35, mean over cases (0.2 + 0.8) / 2 = 0.5
    first = [slice_row("a", 0, i, 0.2) for i in range(3)] + [slice_row("b", 0, 0, 0.8, math.nan)]
    volumes = [{"case": c, "seed": 0, "volume_dice": d, "seconds_per_slice": s} for c, d, s in
               [("a", 0.1, 1.0), ("b", 0.5, 3.0), ("c", math.nan, None)]]  # fmt: skip
    summary = summarise(first, volumes, bundle="brats_flair", method="cdm", settings={"tau": 0.95})
    assert list(summary) == [
        "bundle", "method", "n_volumes", "n_slices", "seeds", "dice", "iou", "hd95", "volume_dice",
        "seconds_per_slice", "settings",
    ]  # fmt: skip
    assert (summary["n_volumes"], summary["n_slices"], summary["seeds"]) == (3, 4, [0])
    assert summary["dice"] == {"mean": pytest.approx(0.35), "std": None, "std_cases": pytest.approx(0.6 / 2**0.5)}
    assert summary["iou"]["mean"] == pytest.approx(0.175)
    assert summary["hd95"] == {"mean": 1.0, "std": None, "std_cases": None, "unit": "mm", "n_undefined": 1}
    assert summary["volume_dice"]["mean"] == pytest.approx(0.3) and summary["volume_dice"]["n_undefined"] == 1
    assert summary["volume_dice"]["quartiles"] == pytest.approx([0.2, 0.3, 0.4])  # of 0.1 and 0.5, linear between
    assert summary["seconds_per_slice"] == 2.0


def test_std_over_two_repeats():
    rows = [slice_row("a", seed, i, d) for seed, pair in ((3, (0.2, 0.4)), (5, (0.4, 0.8))) for i, d in enumerate(pair)]
    volumes = [{"case": "a", "seed": seed, "volume_dice": 0.5} for seed in (5, 3)]
    summary = summarise(rows, volumes)
    assert (summary["n_volumes"], summary["n_slices"], summary["seeds"]) == (1, 2, [3, 5])
    # repeats' means 0.3 and 0.6: sample standard deviation 0.3 / sqrt(2); one patient has no spread
    assert summary["dice"] == {"mean": pytest.approx(0.45), "std": pytest.approx(0.3 / 2**0.5), "std_cases": None}
    assert "groups" not in summary


def test_groups_are_kept_apart():
    rows = [slice_row("a", 0, 0, 0.2, group="x"), slice_row("a", 0, 0, 0.6, group="y")]  # two patients of one name
    volumes = [{"case": "a", "seed": 0, "volume_dice": 0.5, "group": g} for g in "xy"]
    summary = summarise(rows, volumes)
    assert (summary["n_volumes"], summary["n_slices"]) == (2, 2)
    assert {g: m["dice"]["mean"] for g, m in summary["groups"].items()} == {"x": 0.2, "y": 0.6}


def test_summary_is_strict_json():
    rows = [slice_row("a", 0, 0, 0.0, math.nan)]
    settings = {"noise": math.inf, "weights": torch.ones(2), "device": torch.device("cpu"), "q": (1, np.float64("nan"))}
    summary = summarise(rows, [{"case": "a", "seed": 0, "volume_dice": math.nan}], settings=settings)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (
        summary["hd95"]["mean"] is None
        and summary["volume_dice"]["quartiles"] is None
        and summary["hd95"]["n_undefined"] == 1
    )
    assert summary["settings"] == {"noise": None, "weights": [1.0, 1.0], "device": "cpu", "q": [1, None]}
