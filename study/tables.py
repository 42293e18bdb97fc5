"""The tables of a study: all its cells in one CSV, one JSON and one Markdown table in the form of the paper's.

Every measure is recomputed from the cells' `per_slice.csv` and `per_volume.csv`, so the tables can be made anew at any
time, and with another `min_area` (the smallest target, as a fraction of its slice, that counts).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from custom_modules.evaluation.metrics import number, summarise
from custom_modules.files import atomic_path, write_json

MEASURES = ("dice", "iou", "hd95", "volume_dice")


def write_tables(output_dir: Path, study: Mapping, repeats: Iterable[str]) -> None:
    """Writes `results.csv`, `results.json` and `results.md` of the cells in `output_dir`, in the study's order."""
    results = summarise_cells(output_dir, study["runs"], repeats, study["min_areas"])
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
    output_dir: Path, runs: Iterable[str], repeats: Iterable[str], min_areas: Iterable[float]
) -> list[dict]:
    """One summary (see `metrics.summarise`) for each run, smallest area and group of cases that has slices."""
    results, repeats = [], list(repeats)
    for min_area in min_areas:
        for run in runs:
            cells = (output_dir / "cells" / run / repeat for repeat in repeats)
            folders = [folder for folder in cells if (folder / "cell.json").is_file()]
            slices, volumes = [], []
            for repeat, folder in enumerate(folders):
                rows = [_read(folder / "metrics" / name, repeat) for name in ("per_slice.csv", "per_volume.csv")]
                large = [row for row in rows[0] if float(row["fraction"]) >= min_area]
                cases = {row["case"] for row in (large if min_area else rows[1])}
                slices, volumes = slices + large, volumes + [row for row in rows[1] if row["case"] in cases]
            for group in sorted({row["group"] for row in volumes}):
                chosen = [[row for row in rows if row["group"] == group] for rows in (slices, volumes)]
                if chosen[0]:
                    facts = json.loads((folders[0] / "cell.json").read_text(encoding="utf-8"))
                    context = {"run": run, "group": group, "min_area": min_area, "repeats": len(folders)}
                    context |= {"settings": facts["settings"], "hardware": facts["hardware"]}
                    context |= {"n_measurements": len(chosen[0]), "bundle": facts.get("bundle")}
                    results.append(summarise(*chosen, method=facts["settings"]["method"], **context))
    return results


def _read(path: Path, repeat: int) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return [row | {"seed": repeat} for row in csv.DictReader(file)]


def _flat(result: Mapping) -> dict:
    """One line of `results.csv`."""
    keys = ("run", "method", "group", "min_area", "repeats", "n_volumes", "n_slices")
    row = {key: result[key] for key in keys}
    for measure in MEASURES:
        for statistic in ("mean", "std", "std_cases"):
            row[f"{measure}_{statistic}"] = result[measure][statistic]
    row["hd95_undefined"], row["seconds_per_slice"] = result["hd95"]["n_undefined"], result["seconds_per_slice"]
    return row


def markdown(results: Iterable[Mapping]) -> str:
    """The results as Markdown, one table a group of cases: mean +- std over repeats (std over patients)."""
    lines, heading = [], None
    for result in sorted(results, key=lambda r: (r["min_area"], r["group"])):  # stable: the study's order stays
        title = f"{result['group'] or 'all cases'}: {result['n_volumes']} patients, {result['n_slices']} slices"
        if result["min_area"]:
            title += f" (target at least {result['min_area']:.0%} of the slice)"
        if title != heading:
            heading = title
            lines += ["", f"**{title}**", "", "| run | Dice | mIoU | HD95 (mm) | volume Dice | seconds a slice |"]
            lines += ["| --- | --- | --- | --- | --- | --- |"]
        cells = [_cell(result[key], 1 if key == "hd95" else 3) for key in MEASURES]
        if empty := result["hd95"]["n_undefined"]:
            cells[2] += f", undefined in {empty} of {result['n_measurements']}"
        cells.append(f"{number(result, 'seconds_per_slice'):.3g}")
        lines.append(f"| {' | '.join([result['run'], *cells])} |")
    legend = "Mean ± standard deviation over repeats (over patients). Dice, mIoU, HD95: over positive slices."
    return "\n".join([*lines[1:], "", legend, ""])


def _cell(measure: Mapping, digits: int) -> str:
    text = f"{number(measure, 'mean'):.{digits}f}"
    if measure["std"] is not None:
        text += f" ± {measure['std']:.{digits}f}"
    return text if measure["std_cases"] is None else f"{text} ({measure['std_cases']:.{digits}f})"
