"""Dice, IoU and HD95 of a mask against the truth: the paper's protocol, with a stated policy for empty masks.

With P the predicted and G the true pixels of one slice, s(.) their surface (pixels that binary erosion takes away):

    Dice = 2 |P and G| / (|P| + |G|)        IoU = |P and G| / |P or G|
    HD95 = max(q95 of d(s(P), s(G)), q95 of d(s(G), s(P)))      in mm, within the slice

Hu et al., MICCAI 2023 (arXiv 2306.03878) measure on the *positive* slices of the test cases, optionally without those
whose target covers less than ``min_area`` (5 % of the slice on CHAOS). The arithmetic is MONAI's; what MONAI leaves to
its caller is settled here. An undefined value is NaN (null in JSON), counted in ``n_undefined``, never 0:

    prediction empty on a positive slice    Dice = IoU = 0; HD95 undefined
    whole volume, truth empty               Dice = 0 when something is predicted, else undefined
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.config import NdarrayOrTensor
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from monai.utils import convert_to_tensor

Row = Mapping[str, Any]
CASE_COLUMNS = ("case", "group", "seed", "in_training")
SLICE_COLUMNS = (*CASE_COLUMNS, "slice", "area", "dice", "iou", "hd95")
VOLUME_COLUMNS = (*CASE_COLUMNS, "n_slices", "dice", "iou", "hd95", "n_undefined", "volume_dice", "seconds_per_slice")
logger = logging.getLogger(__name__)


def _check_protocol(slice_axis: int, min_area: float) -> None:
    if slice_axis not in (0, 1, 2):
        raise ValueError(f"slice_axis must be 0, 1 or 2 (an axis of the stored array); got {slice_axis}.")
    if not (math.isfinite(min_area) and min_area >= 0):
        raise ValueError(f"min_area must be pixels >= 0, or a fraction of the slice in (0, 1); got {min_area}.")


def _binary(pred: NdarrayOrTensor, label: NdarrayOrTensor) -> list[torch.Tensor]:
    """Both masks as plain bool CPU tensors, (H, W, D)."""
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
    slices: Iterable[int] | None = None,
) -> list[dict[str, Any]]:
    """Dice, IoU and HD95 of every positive slice.

    Args:
        pred: predicted mask on the native grid, (H, W, D), any dtype, values 0 and 1.
        label: true mask, same shape and values.
        slice_axis: axis of the array along which slices are counted.
        spacing: voxel size in mm along the three axes; the two in-plane ones enter HD95.
        min_area: slices with a smaller target are left out; pixels, or in (0, 1) a fraction of the slice.
        slices: look at these slice indices only; ``None`` means all.

    Returns:
        One dict per positive slice, in order: ``slice``, ``area`` (target, px), ``dice`` and ``iou`` (in [0, 1]; 0 for
        an empty prediction), ``hd95`` (mm; NaN for an empty prediction).

    Raises:
        ValueError: shapes differ or are not 3D, a mask is not binary, or another argument is out of range.
    """
    _check_protocol(slice_axis, min_area)
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be three lengths > 0 in mm; got {spacing}.")
    pred, label = (mask.movedim(slice_axis, 0)[:, None] for mask in _binary(pred, label))  # (D, 1, H, W)
    indices = range(len(label)) if slices is None else sorted(set(slices))
    if not set(indices) <= set(range(len(label))):
        raise ValueError(f"slices must lie in 0..{len(label) - 1}; got {indices}.")

    areas = label.sum((1, 2, 3)).tolist()
    unit = label[0].numel() if min_area < 1 else 1  # area / unit, since 0.07 * 100 > 7 in floating point
    indices = [i for i in indices if areas[i] > 0 and areas[i] / unit >= min_area]
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
    return [{"slice": i, "area": areas[i], "dice": d, "iou": j, "hd95": h} for i, d, j, h in values]


def volume_metrics(pred: NdarrayOrTensor, label: NdarrayOrTensor) -> dict[str, float]:
    """Dice over all slices, false positives on negative ones included.

    Args:
        pred: predicted mask, (H, W, D), any dtype, values 0 and 1.
        label: true mask, same shape and values.

    Returns:
        ``{"volume_dice": ...}`` in [0, 1]: 0 when only one mask is empty, NaN (undefined) when both are.

    Raises:
        ValueError: shapes differ or are not 3D, or a mask is not binary.
    """
    pred, label = _binary(pred, label)
    if not (pred.any() or label.any()):
        return {"volume_dice": math.nan}
    return {"volume_dice": compute_dice(pred[None, None], label[None, None], ignore_empty=False).item()}


def _number(row: Row, key: str) -> float:
    """NaN for what is missing: absent, None, or an empty CSV cell."""
    return math.nan if row.get(key) in (None, "") else float(row[key])


def _seed(row: Row) -> int:
    return int(row["seed"])


def _patient(row: Row) -> tuple[str, str]:
    return str(row.get("group") or ""), str(row["case"])


def _mean(rows: Iterable[Row], key: str) -> float:
    """Mean of the defined values; NaN when there is none."""
    values = [v for row in rows if not math.isnan(v := _number(row, key))]
    return fmean(values) if values else math.nan


def _std(rows: Iterable[Row], key: str, part: Callable[[Row], Any]) -> float:
    """Standard deviation (ddof = 1) of the means of the parts into which ``part`` sorts the rows; NaN for one part."""
    parts = defaultdict(list)
    for row in rows:
        parts[part(row)].append(row)
    means = [mean for members in parts.values() if not math.isnan(mean := _mean(members, key))]
    return stdev(means) if len(means) > 1 else math.nan


def _n_undefined(rows: Iterable[Row], key: str) -> int:
    return sum(math.isnan(_number(row, key)) for row in rows)


def _measures(per_slice: Sequence[Row], per_volume: Sequence[Row]) -> dict[str, Any]:
    measures: dict[str, Any] = {
        "n_volumes": len({_patient(row) for row in per_volume}),
        "n_slices": len({(_patient(row), int(row["slice"])) for row in per_slice}),
        "seeds": sorted({_seed(row) for row in per_volume}),
    }
    for key, rows in (("dice", per_slice), ("iou", per_slice), ("hd95", per_slice), ("volume_dice", per_volume)):
        stds = {"std": _std(rows, key, _seed), "std_cases": _std(rows, key, _patient)}
        measures[key] = {"mean": _mean(rows, key)} | stds
    measures["hd95"] |= {"unit": "mm", "n_undefined": _n_undefined(per_slice, "hd95")}
    measures["volume_dice"] |= {"n_undefined": _n_undefined(per_volume, "volume_dice")}
    return measures | {"seconds_per_slice": _mean(per_volume, "seconds_per_slice")}


def _jsonable(value: Any) -> Any:
    """``value`` as strict JSON gives it back: NaN and infinity are None, tensors lists, anything foreign its text."""
    text = json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    return json.loads(text, parse_constant=lambda _: None)


def summarise(per_slice: Sequence[Row], per_volume: Sequence[Row], **context: Any) -> dict[str, Any]:
    """The content of ``summary.json``.

    ``mean`` is over the slices of all repeats (``volume_dice``: over volumes), ``std`` over the repeats' means (None
    for one ``seed``), ``std_cases`` over the patients' means (None for one patient), both with ddof = 1. ``n_volumes``
    and ``n_slices`` count each volume and slice once, ``n_undefined`` each measurement of each repeat;
    ``seconds_per_slice`` is the mean over the volumes that were timed.

    Args:
        per_slice: rows of :func:`slice_metrics` with ``case``, ``seed`` (of the repeat, or the number of the fold) and
            perhaps ``group`` (any text, such as a data set). Rows read back with ``csv.DictReader`` serve as well.
        per_volume: rows of :func:`volume_metrics` with the same, and perhaps ``seconds_per_slice`` (s).
        **context: ``bundle``, ``method``, ``settings``, and whatever else shall stand in the summary.

    Returns:
        The summary, free of NaN (None instead); with ``groups``, the measures of each, where there is more than one.
    """
    head = {key: context.pop(key, None) for key in ("bundle", "method")}
    summary = head | _measures(per_slice, per_volume) | {"settings": {}} | context
    groups = sorted({_patient(row)[0] for row in per_volume})
    if len(groups) > 1:
        split = {g: [[r for r in rows if _patient(r)[0] == g] for rows in (per_slice, per_volume)] for g in groups}
        summary["groups"] = {group or "none": _measures(*rows) for group, rows in split.items()}
    return _jsonable(summary)


def _write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def _table(per_volume: Sequence[Row], summary: Row) -> str:
    """Cases as rows, then the means over slices (volume Dice: over volumes)."""
    keys = ("dice", "iou", "hd95", "volume_dice")
    rows = [*per_volume, {"case": "mean", "n_slices": summary["n_slices"]} | {k: summary[k]["mean"] for k in keys}]
    width = max(len(row["case"]) for row in rows)
    lines = [f"{'case':{width}}  slices   Dice    IoU  HD95/mm  volume Dice"]
    for row in rows:
        dice, iou, hd95, volume = (_number(row, key) for key in keys)
        start = f"{row['case']:{width}}  {row['n_slices']:6d}"
        lines.append(f"{start}  {dice:5.3f}  {iou:5.3f}  {hd95:7.2f}  {volume:11.3f}")
    return "\n".join([*lines, f"HD95 undefined (empty prediction): {summary['hd95']['n_undefined']} slices"])


class EvaluationMetrics:
    """Ignite handler: measures every case that an evaluator puts out, then writes and prints the tables.

    ``engine.state.output`` is a list of decollated dicts (empty when a case failed): ``pred`` ((1, H, W, D) MetaTensor,
    0/1, on the native grid; its affine gives the spacing), ``label`` (same shape, label values as stored), ``case``,
    perhaps ``group`` (str), ``seconds_per_slice`` (s) and ``in_training`` (bool). Writes ``per_slice.csv``,
    ``per_volume.csv`` and ``summary.json`` into ``<output_dir>/metrics``; an undefined number is ``nan`` in the CSVs.

    Args:
        output_dir: folder that receives ``metrics/``.
        bundle: name of the bundle, as ``method`` and ``settings`` (the method's) for the summary only.
        seed: of this repeat, or the number of the fold; stands in every row.
        target_labels: label values that make the target; ``None`` or empty means all above 0.
        min_area, slice_axis: as in :func:`slice_metrics`.
        training_cases: cases in the checkpoint's training list; ``None`` means unknown: ``in_training`` stays empty.

    Raises:
        ValueError: ``min_area`` or ``slice_axis`` is out of range; in the run, with the case's name: a key is missing,
            the shapes of pred and label differ, pred is not binary or has no affine.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        bundle: str,
        method: str,
        seed: int = 0,
        target_labels: Sequence[int] | None = None,
        min_area: float = 0,
        slice_axis: int = 2,
        settings: Row | None = None,
        training_cases: Iterable[str] | None = None,
    ) -> None:
        _check_protocol(slice_axis, min_area)
        self.folder, self.seed = Path(output_dir) / "metrics", seed
        self.target_labels, self.min_area, self.slice_axis = list(target_labels or []), min_area, slice_axis
        protocol = {"target_labels": self.target_labels, "min_area": min_area, "slice_axis": slice_axis}
        self.context = {"bundle": bundle, "method": method, "settings": protocol | dict(settings or {})}
        self.training_cases = None if training_cases is None else set(map(str, training_cases))
        self.per_slice: list[dict[str, Any]] = []
        self.per_volume: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Adds the handlers to ``engine``; each run starts with empty tables."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Engine) -> None:
        self.per_slice, self.per_volume = [], []

    def _iteration_completed(self, engine: Engine) -> None:
        for item in engine.state.output or []:
            if missing := [key for key in ("case", "pred", "label") if item.get(key) is None]:
                raise ValueError(f"case {item.get('case')!r}: evaluation needs {missing}, got {sorted(item)}.")
            try:
                self._measure(item)
            except ValueError as error:
                raise ValueError(f"case {item['case']!r}: {error}") from error

    def _target(self, item: Row) -> torch.Tensor:
        """The true mask, bool (1, H, W, D); warns where the label looks wrong."""
        affines = [torch.as_tensor(item[key].affine).cpu() for key in ("pred", "label") if hasattr(item[key], "affine")]
        if not torch.allclose(affines[0], affines[-1], atol=1.0e-2):
            logger.warning("case %r: pred and label have one shape, but different affines.", item["case"])
        label = convert_to_tensor(item["label"], device="cpu", track_meta=False, dtype=torch.float32)
        target = torch.isin(label, torch.tensor(self.target_labels).float()) if self.target_labels else label > 0
        if not target.any():
            values = label.unique()[:10].tolist()
            wanted = self.target_labels or "> 0"
            logger.warning("case %r has no target: its label holds %s, wanted %s.", item["case"], values, wanted)
        return target

    def _measure(self, item: Row) -> None:
        pred, label = item["pred"], item["label"]
        if pred.shape != label.shape or pred.ndim != 4 or len(pred) != 1 or not hasattr(pred, "pixdim"):
            raise ValueError(
                "pred and label must share one shape (1, H, W, D), pred as a MetaTensor on the native grid; got pred "
                f"{type(pred).__name__} {tuple(pred.shape)}, label {tuple(label.shape)}."
            )
        row = {"case": str(item["case"]), "group": item.get("group"), "seed": self.seed}
        known = item.get("in_training")
        if known is None and self.training_cases is not None:
            known = row["case"] in self.training_cases
        row["in_training"] = None if known is None else int(known)
        target = self._target(item)[0]
        slices = slice_metrics(pred[0], target, self.slice_axis, pred.pixdim.tolist(), self.min_area)
        volume = {"n_slices": len(slices), "n_undefined": _n_undefined(slices, "hd95")}
        volume |= {key: _mean(slices, key) for key in ("dice", "iou", "hd95")} | volume_metrics(pred[0], target)
        self.per_slice += [row | values for values in slices]
        self.per_volume.append(row | volume | {"seconds_per_slice": _number(item, "seconds_per_slice")})

    def _completed(self, engine: Engine) -> None:
        known = [row["in_training"] for row in self.per_volume if row["in_training"] is not None]
        context = self.context | {"n_in_training": sum(known) if known else None}
        summary = summarise(self.per_slice, self.per_volume, **context)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "per_slice.csv", _csv(self.per_slice, SLICE_COLUMNS))
        _write(self.folder / "per_volume.csv", _csv(self.per_volume, VOLUME_COLUMNS))
        _write(self.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        if not self.per_volume:
            logger.error("no case was evaluated: the tables in %s are empty.", self.folder)
            return
        if context["n_in_training"]:
            logger.warning("%d of %d cases were in the checkpoint's training list.", sum(known), len(self.per_volume))
        print(_table(self.per_volume, summary), f"written to {self.folder}", sep="\n", flush=True)
