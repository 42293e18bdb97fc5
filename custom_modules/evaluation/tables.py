"""The tables of an evaluation: rows of a case, CSV and text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from custom_modules.evaluation.metrics import (
    Row,
    number,
)
from custom_modules.files import read_record, write_json

CASE_COLUMNS = ("case", "group", "seed", "in_training")
SLICE_COLUMNS = (*CASE_COLUMNS, "slice", "area", "fraction", "dice", "iou", "hd95")
VOLUME_COLUMNS = (
    *(*CASE_COLUMNS, "n_slices", "dice", "iou", "hd95", "n_undefined", "volume_dice"),
    *("expected_dice", "seconds_per_slice"),
)
ROWS = {"gate", "volume", "slices"}  # what a case's file holds beside what it was measured on


def _write(path: Path, rows: Row) -> None:
    """Rows as JSON, from which `_read` makes the same; NaN, which JSON does not have, is null there."""
    write_json(path, rows | {"volume": _without_nan(rows["volume"]), "slices": list(map(_without_nan, rows["slices"]))})


def _without_nan(row: Row) -> Row:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _read(path: Path) -> dict[str, Any]:
    rows = read_record(path)
    if not rows.keys() >= ROWS:
        raise ValueError(f"{path}, the rows of a case, is missing or broken: run the same command again.")
    for row in (rows["volume"], *rows["slices"]):
        row.update({key: math.nan for key, value in row.items() if value is None})
    return rows


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
        dice, iou, hd95, volume = (number(row, key) for key in keys)
        start = f"{row['case']:{width}}  {row['n_slices']:6d}"
        lines.append(f"{start}  {dice:5.3f}  {iou:5.3f}  {hd95:7.2f}  {volume:11.3f}")
    return "\n".join([*lines, f"HD95 undefined (empty prediction): {summary['hd95']['n_undefined']} slices"])
