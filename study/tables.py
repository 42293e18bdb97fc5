"""The tables of a study: all its cells in one CSV, one JSON and one Markdown table in the form of the paper's.

Every measure is recomputed from the cells' `per_slice.csv` and `per_volume.csv`, so the tables can be made again at any
time, and with another `min_area` (the smallest target, as a fraction of its slice, that counts).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from custom_modules.evaluation.metrics import number, summarise
from custom_modules.files import atomic_path, read_json, write_json

MEASURES = {"dice": "Dice", "iou": "mIoU", "hd95": "HD95 (mm)", "volume_dice": "volume Dice"}
DIGITS = {"dice": 3, "iou": 3, "hd95": 1, "volume_dice": 3}


def write_tables(output_dir: Path, runs: Collection[str], repeats: Sequence[str], min_areas: Iterable[float]) -> None:
    """Write `results.csv`, `results.json` and `results.md` of the cells in `output_dir`, in the study's order."""
    results = summarise_cells(output_dir, runs, repeats, min_areas)
    rows = [_flat(result) for result in results]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0] if rows else ["run"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    for name, content in (("results.csv", text.getvalue()), ("results.md", markdown(results))):
        with atomic_path(output_dir / name) as aside:
            aside.write_text(content, encoding="utf-8")
    write_json(output_dir / "results.json", {"results": results})
    print(f"\n{markdown(results)}\nwritten to {output_dir}: results.csv, results.json, results.md", flush=True)


def summarise_cells(
    output_dir: Path, runs: Collection[str], repeats: Sequence[str], min_areas: Iterable[float]
) -> list[dict]:
    """Return one summary (see `metrics.summarise`) for each smallest area, run and group of cases that has slices."""
    pairs = ((min_area, run) for min_area in min_areas for run in runs)
    return [s for min_area, run in pairs for s in _summarise_run(output_dir / "cells" / run, repeats, min_area)]


def _summarise_run(cells: Path, repeats: Sequence[str], min_area: float) -> Iterator[dict]:
    """Yield the summary of one run, whose repeats are folders of `cells`, for each group of cases."""
    folders = [cells / repeat for repeat in repeats if (cells / repeat / "cell.json").is_file()]
    slices, volumes = [], []
    for repeat, folder in enumerate(folders):
        rows = [read_rows(folder / "metrics" / name, repeat) for name in ("per_slice.csv", "per_volume.csv")]
        large = [row for row in rows[0] if float(row["fraction"]) >= min_area]
        cases = {row["case"] for row in (large if min_area else rows[1])}
        slices, volumes = slices + large, volumes + [row for row in rows[1] if row["case"] in cases]
    for group in sorted({row["group"] for row in volumes}):
        chosen = [[row for row in rows if row["group"] == group] for rows in (slices, volumes)]
        if chosen[0]:
            facts = read_json(folders[0] / "cell.json")
            context = {"run": cells.name, "group": group, "min_area": min_area, "repeats": len(folders)}
            context |= {"settings": facts["settings"], "hardware": facts["hardware"]}
            context |= {"n_measurements": len(chosen[0]), "bundle": facts.get("bundle")}
            yield summarise(*chosen, method=facts["settings"]["method"], **context)


def read_rows(path: Path, repeat: int) -> list[dict]:
    """Read a CSV of one repeat as dicts of text, with `repeat`, its number, which also replaces the noise's `seed`."""
    with open(path, newline="", encoding="utf-8") as file:
        return [row | {"seed": repeat, "repeat": repeat} for row in csv.DictReader(file)]


def _flat(result: Mapping) -> dict:
    """Return one line of `results.csv`."""
    keys = ("run", "method", "group", "min_area", "repeats", "n_volumes", "n_slices")
    row = {key: result[key] for key in keys}
    for measure in MEASURES:
        for statistic in ("mean", "std", "std_cases"):
            row[f"{measure}_{statistic}"] = result[measure][statistic]
    row["hd95_undefined"], row["seconds_per_slice"] = result["hd95"]["n_undefined"], result["seconds_per_slice"]
    return row


def markdown(results: Iterable[Mapping]) -> str:
    """Return the results as Markdown, one table a group of cases: mean +- std over repeats (std over patients)."""
    head = ["run", *MEASURES.values(), "seconds a slice"]
    lines, heading = [], None
    for result in sorted(results, key=lambda r: (r["min_area"], r["group"])):  # stable: the study's order stays
        title = f"{result['group'] or 'all cases'}: {result['n_volumes']} patients, {result['n_slices']} slices"
        if result["min_area"]:
            title += f" (target at least {result['min_area']:.0%} of the slice)"
        if title != heading:
            heading = title
            lines += ["", f"**{title}**", "", f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
        cells = {key: _cell(result[key], digits) for key, digits in DIGITS.items()}
        if empty := result["hd95"]["n_undefined"]:
            cells["hd95"] += f", undefined in {empty} of {result['n_measurements']}"
        seconds = f"{number(result, 'seconds_per_slice'):.3g}"
        lines.append(f"| {' | '.join([result['run'], *cells.values(), seconds])} |")
    legend = "Mean ± standard deviation over repeats (over patients). Dice, mIoU, HD95: over positive slices."
    return "\n".join([*lines[1:], "", legend, ""])


def _cell(measure: Mapping, digits: int) -> str:
    text = f"{number(measure, 'mean'):.{digits}f}"
    if measure["std"] is not None:
        text += f" ± {measure['std']:.{digits}f}"
    return text if measure["std_cases"] is None else f"{text} ({measure['std_cases']:.{digits}f})"
