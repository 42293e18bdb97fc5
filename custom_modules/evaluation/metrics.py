"""Dice, IoU and HD95 of a mask against the truth: the paper's protocol, with a stated policy for empty masks.

With P the predicted and G the true pixels of one slice, s(.) their surface (pixels that binary erosion removes):

    Dice = 2 |P and G| / (|P| + |G|)        IoU = |P and G| / |P or G|
    HD95 = max(q95 of d(s(P), s(G)), q95 of d(s(G), s(P)))      in mm, within the slice

Hu et al., MICCAI 2023 (arXiv 2306.03878) measure on the *positive* slices of the test cases, optionally without those
whose target covers less than `min_area` (5 % of the slice on CHAOS). The arithmetic is MONAI's; what MONAI leaves to
its caller is decided here. Slice Dice and IoU, and HD95, are measured on positive slices (G not empty) only; volume
Dice takes P and G of all slices together:

                                    Dice, IoU of slices   HD95         volume Dice, over all slices
    G and P empty                   not counted           not counted  no voxel of either: changes nothing
    G empty, P not                  not counted           not counted  P counts as false positive
    G not empty, P empty            0                     undefined    G counts as missed
    G of the whole volume empty     no slice counts       no slice     0 if anything is predicted, else undefined

An undefined value is NaN (null in JSON), counted in `n_undefined` and left out of means, never 0.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from monai.utils import convert_to_tensor

Row = Mapping[str, Any]


def check_protocol(slice_axis: int, min_area: float) -> None:
    """Raises ValueError where a setting of the protocol is out of range."""
    if slice_axis not in (0, 1, 2):
        raise ValueError(f"slice_axis must be 0, 1 or 2 (an axis of the stored array); got {slice_axis}.")
    if not (math.isfinite(min_area) and min_area >= 0):
        raise ValueError(f"min_area must be pixels >= 0, or a fraction of the slice in (0, 1); got {min_area}.")


def _binary(pred: NdarrayOrTensor, label: NdarrayOrTensor) -> list[torch.Tensor]:
    """Checks both masks and returns them as plain bool CPU tensors, (H, W, D)."""
    if pred.shape != label.shape or pred.ndim != 3:
        raise ValueError(
            f"pred and label must have one shape (H, W, D); got pred {tuple(pred.shape)}, label {tuple(label.shape)}."
        )
    masks = [convert_to_tensor(mask, device="cpu", track_meta=False) for mask in (pred, label)]
    for name, mask in zip(("pred", "label"), masks):
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{name} must be binary (0 or 1): threshold it, or select its label values, first.")
    return [mask.bool() for mask in masks]


def slice_metrics(
    pred: NdarrayOrTensor,
    label: NdarrayOrTensor,
    slice_axis: int = 2,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    min_area: float = 0,
) -> list[dict[str, Any]]:
    """Computes Dice, IoU and HD95 of every positive slice; what is predicted in other slices does not count here.

    A square of four pixels is found one pixel (3 mm) too far to the right, then not at all:

    >>> label, pred = torch.zeros(4, 4, 2), torch.zeros(4, 4, 2)
    >>> label[1:3, 1:3] = 1
    >>> pred[1:3, 2:4, 0] = 1
    >>> for row in slice_metrics(pred, label, spacing=(2.0, 3.0, 5.0)):
    ...     print(row["slice"], row["area"], row["dice"], round(row["iou"], 3), row["hd95"])
    0 4 0.5 0.333 3.0
    1 4 0.0 0.0 nan

    Args:
        pred, label: predicted and true mask on the native grid, (H, W, D), any dtype, values 0 and 1.
        slice_axis: axis of the array along which slices are counted.
        spacing: voxel size in mm along the three axes; the two in-plane ones enter HD95.
        min_area: slices with a smaller target are left out; in pixels, or in (0, 1) a fraction of the slice.

    Returns:
        One dict per positive slice, in order: `slice`, `area` (target, px), `fraction` (target, of the slice), `dice`
        and `iou` (in [0, 1]; 0 for an empty prediction), `hd95` (mm; NaN for an empty prediction).

    Raises:
        ValueError: shapes differ or are not 3D, a mask is not binary, or another argument is out of range.
    """
    check_protocol(slice_axis, min_area)
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be three lengths > 0 in mm; got {spacing}.")
    pred, label = (mask.movedim(slice_axis, 0)[:, None] for mask in _binary(pred, label))  # (D, 1, H, W)

    areas = label.sum((1, 2, 3)).tolist()
    size = label[0].numel()
    unit = size if min_area < 1 else 1  # area / unit, since 0.07 * 100 > 7 in floating point
    indices = [i for i, area in enumerate(areas) if area > 0 and area / unit >= min_area]
    if not indices:
        return []
    pred, label = pred[indices].float(), label[indices].float()
    dice, iou = compute_dice(pred, label).flatten(), compute_iou(pred, label).flatten()
    hd95 = torch.full_like(dice, math.nan)
    if (found := pred.flatten(1).any(1)).any():
        in_plane = [float(s) for axis, s in enumerate(spacing) if axis != slice_axis]
        distance = compute_hausdorff_distance(pred[found], label[found], True, percentile=95, spacing=in_plane)
        hd95[found] = distance.flatten()
    values = zip(indices, dice.tolist(), iou.tolist(), hd95.tolist())
    return [
        {"slice": i, "area": areas[i], "fraction": areas[i] / size, "dice": d, "iou": j, "hd95": h}
        for i, d, j, h in values
    ]


def volume_metrics(pred: NdarrayOrTensor, label: NdarrayOrTensor) -> dict[str, float]:
    """Computes Dice over all slices, false positives on negative ones included; masks and errors as in `slice_metrics`.

    Returns:
        `{"volume_dice": ...}` in [0, 1]: 0 when only one mask is empty, NaN (undefined) when both are.
    """
    pred, label = _binary(pred, label)
    if not (pred.any() or label.any()):
        return {"volume_dice": math.nan}
    return {"volume_dice": compute_dice(pred[None, None], label[None, None], ignore_empty=False).item()}


def number(row: Row, key: str) -> float:
    """Reads a number from a row; NaN where it is missing: absent, None, or an empty CSV cell."""
    return math.nan if row.get(key) in (None, "") else float(row[key])


def _seed(row: Row) -> int:
    return int(row["seed"])


def _patient(row: Row) -> tuple[str, str]:
    return str(row.get("group") or ""), str(row["case"])


def mean_defined(rows: Iterable[Row], key: str) -> float:
    """Averages the defined values; NaN when there is none."""
    values = [v for row in rows if not math.isnan(v := number(row, key))]
    return fmean(values) if values else math.nan


def _std(rows: Iterable[Row], key: str, part: Callable[[Row], Any]) -> float:
    """Computes the standard deviation (ddof = 1) of the means of parts, which `part` tells apart; NaN for one part."""
    parts = defaultdict(list)
    for row in rows:
        parts[part(row)].append(row)
    means = [m for members in parts.values() if not math.isnan(m := mean_defined(members, key))]
    return stdev(means) if len(means) > 1 else math.nan


def _quartiles(rows: Iterable[Row], key: str) -> list[float] | None:
    """Computes first quartile, median and third quartile of the defined values; None when there is none."""
    values = [v for row in rows if not math.isnan(v := number(row, key))]
    return np.percentile(values, [25, 50, 75]).tolist() if values else None


def n_undefined(rows: Iterable[Row], key: str) -> int:
    """Counts the rows in which a number is missing or NaN."""
    return sum(math.isnan(number(row, key)) for row in rows)


def _measures(per_slice: Sequence[Row], per_volume: Sequence[Row]) -> dict[str, Any]:
    measures: dict[str, Any] = {
        "n_volumes": len({_patient(row) for row in per_volume}),
        "n_slices": len({(_patient(row), int(row["slice"])) for row in per_slice}),
        "seeds": sorted({_seed(row) for row in per_volume}),
    }
    for key, rows in (("dice", per_slice), ("iou", per_slice), ("hd95", per_slice), ("volume_dice", per_volume)):
        stds = {"std": _std(rows, key, _seed), "std_cases": _std(rows, key, _patient)}
        measures[key] = {"mean": mean_defined(rows, key)} | stds
    measures["hd95"] |= {"unit": "mm", "n_undefined": n_undefined(per_slice, "hd95")}
    measures["volume_dice"] |= {"quartiles": _quartiles(per_volume, "volume_dice")}
    measures["volume_dice"] |= {"n_undefined": n_undefined(per_volume, "volume_dice")}
    return measures | {"seconds_per_slice": mean_defined(per_volume, "seconds_per_slice")}


def jsonable(value: Any) -> Any:
    """Returns `value` as strict JSON would: NaN and infinity as None, tensors as lists, other objects as text."""
    text = json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    return json.loads(text, parse_constant=lambda _: None)


def summarise(per_slice: Sequence[Row], per_volume: Sequence[Row], **context: Any) -> dict[str, Any]:
    """Summarises the rows of an evaluation: the content of `summary.json`.

    `mean` is over the slices of all repeats (`volume_dice`: over volumes), `std` over the repeats' means (None
    for one `seed`), `std_cases` over the patients' means (None for one patient), both with ddof = 1. `quartiles` of the
    volume Dice are over volumes: first quartile, median, third quartile. `n_volumes` and `n_slices` count each volume
    and slice once, `n_undefined` each measurement of each repeat; `seconds_per_slice` is the mean over the volumes that
    were timed.

    Args:
        per_slice: rows of `slice_metrics` with `case`, `seed` (of the repeat, or the number of the fold) and
            optionally `group` (any text, such as a data set). Rows from `csv.DictReader` work as well.
        per_volume: rows of `volume_metrics` with the same, and optionally `seconds_per_slice` (s).
        **context: `bundle`, `method`, `settings`, and whatever else is to be recorded in the summary.

    Returns:
        The summary, free of NaN (None instead); with `groups`, the measures of each, where there is more than one.
    """
    head = {key: context.pop(key, None) for key in ("bundle", "method")}
    summary = head | _measures(per_slice, per_volume) | {"settings": {}} | context
    groups = sorted({_patient(row)[0] for row in per_volume})
    if len(groups) > 1:
        split = {g: [[r for r in rows if _patient(r)[0] == g] for rows in (per_slice, per_volume)] for g in groups}
        summary["groups"] = {group or "none": _measures(*rows) for group, rows in split.items()}
    return jsonable(summary)
