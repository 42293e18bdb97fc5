"""The tables of an evaluation: the rows of a case on disk, CSV files, and the table that is printed."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from custom_modules.evaluation.metrics import Row, jsonable, number
from custom_modules.files import atomic_path, read_json_or_empty, write_json

CASE_COLUMNS = ("case", "group", "seed", "in_training")
SLICE_COLUMNS = (*CASE_COLUMNS, "slice", "area", "fraction", "dice", "iou", "hd95")
VOLUME_COLUMNS = (
    *(*CASE_COLUMNS, "n_slices", "dice", "iou", "hd95", "n_undefined", "volume_dice"),
    *("expected_dice", "seconds_per_slice"),
)
ROW_KEYS = {"gate", "volume", "slices"}  # what a case's file holds beside a record of what was measured


def write_case_rows(path: Path, rows: Row) -> None:
    """Writes the rows of a case as JSON; NaN, which JSON does not have, becomes null."""
    write_json(path, jsonable(rows))


def read_case_rows(path: Path) -> dict[str, Any]:
    """Reads what `write_case_rows` wrote, null as NaN; a ValueError names the file that is missing or broken."""
    rows = read_json_or_empty(path)
    if not rows.keys() >= ROW_KEYS:
        raise ValueError(f"{path}, the rows of a case, is missing or broken: run the same command again.")
    for row in (rows["volume"], *rows["slices"]):
        row.update({key: math.nan for key, value in row.items() if value is None})
    return rows


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Writes `rows` as CSV, numbers with seven digits, NaN as `nan`, what is missing as an empty cell."""
    with atomic_path(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def printed_table(per_volume: Sequence[Row], summary: Row) -> str:
    """Lays out the cases as rows of text, below them the means over slices (volume Dice: over volumes), and the volume
    Dice of each group of cases."""
    keys = ("dice", "iou", "hd95", "volume_dice")
    rows = [*per_volume, {"case": "mean", "n_slices": summary["n_slices"]} | {k: summary[k]["mean"] for k in keys}]
    width = max(len(row["case"]) for row in rows)
    lines = [f"{'case':{width}}  slices   Dice    IoU  HD95/mm  volume Dice"]
    for row in rows:
        dice, iou, hd95, volume = (number(row, key) for key in keys)
        start = f"{row['case']:{width}}  {row['n_slices']:6d}"
        known = "  in training" if row.get("in_training") else ""
        lines.append(f"{start}  {dice:5.3f}  {iou:5.3f}  {hd95:7.2f}  {volume:11.3f}{known}")
    for group, measures in summary.get("groups", {"all": summary}).items():
        if (dice := measures["volume_dice"])["quartiles"]:
            first, median, third = (f"{value:.3f}" for value in dice["quartiles"])
            text = f"mean {dice['mean']:.3f}, median {median}, quartiles {first} and {third}"
            lines.append(f"volume Dice, {group} ({measures['n_volumes']} volumes): {text}")
    return "\n".join([*lines, f"HD95 undefined (empty prediction): {summary['hd95']['n_undefined']} slices"])
