"""The tables of a study, checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from study.tables import markdown, read_rows, summarise_cells, write_tables


def write_cell(out: Path, run: str, repeat: str, slices: list[tuple], group: str = "g", seconds: float = 0.5) -> None:
    """A cell whose slices are (case, fraction, dice); IoU is Dice / 2, HD95 is 10 Dice, undefined where that is 0."""
    folder = out / "cells" / run / repeat / "metrics"
    folder.mkdir(parents=True)
    lines = ["case,group,seed,slice,fraction,dice,iou,hd95"]
    for i, (case, fraction, dice) in enumerate(slices):
        lines.append(f"{case},{group},0,{i},{fraction},{dice},{dice / 2},{dice * 10 or 'nan'}")
    (folder / "per_slice.csv").write_text("\n".join(lines))
    cases = sorted({case for case, *_ in slices})
    volumes = [f"{case},{group},0,{0.1 * (i + 1)},{seconds}" for i, case in enumerate(cases)]
    (folder / "per_volume.csv").write_text("\n".join(["case,group,seed,volume_dice,seconds_per_slice", *volumes]))
    facts = {"settings": {"method": run}, "hardware": "a machine"}
    (folder.parent / "cell.json").write_text(json.dumps(facts))


def test_tables_by_hand(tmp_path):
    write_cell(tmp_path, "b", "seed0", [("p", 0.01, 0.2), ("p", 0.1, 0.4), ("q", 0.1, 0.6)])
    write_cell(tmp_path, "b", "seed1", [("p", 0.01, 0.4), ("p", 0.1, 0.6), ("q", 0.1, 0.8)])
    write_cell(tmp_path, "a", "seed0", [("p", 0.01, 0.0), ("q", 0.1, 1.0)])  # p has no large target
    results = summarise_cells(tmp_path, ["b", "a", "never run"], ["seed0", "seed1"], [0, 0.05])
    assert [(r["run"], r["min_area"], r["n_slices"], r["repeats"]) for r in results] == [
        ("b", 0, 3, 2), ("a", 0, 2, 1), ("b", 0.05, 2, 2), ("a", 0.05, 1, 1)
    ]  # fmt: skip
    assert [r["n_volumes"] for r in results] == [2, 2, 2, 1] and [r["n_measurements"] for r in results] == [6, 2, 4, 1]
    only = summarise_cells(tmp_path, ["b"], ["seed1"], [0])  # what an earlier study left is not counted
    assert only[0]["repeats"] == 1
    b, a = results[:2]
    assert b["dice"]["mean"] == pytest.approx(0.5) and b["iou"]["mean"] == pytest.approx(0.25)
    assert b["dice"]["std"] == pytest.approx(0.2 / 2**0.5)  # the repeats' means are 0.4 and 0.6
    assert b["dice"]["std_cases"] == pytest.approx(0.3 / 2**0.5)  # the patients' are 0.4 and 0.7
    assert results[2]["dice"]["mean"] == pytest.approx(0.6)  # without the small slice: 0.4, 0.6, 0.6, 0.8
    assert a["dice"]["std"] is None and a["hd95"] == {
        "mean": 10.0, "std": None, "std_cases": None, "unit": "mm", "n_undefined": 1
    }  # fmt: skip
    table = markdown(results).splitlines()
    assert (
        "| b | 0.500 ± 0.141 (0.212) | 0.250 ± 0.071 (0.106) | 5.0 ± 1.4 (2.1) | 0.150 ± 0.000 (0.071) | 0.5 |" in table
    )
    assert "**g: 2 patients, 2 slices (target at least 5% of the slice)**" in table

    write_tables(tmp_path, ["b", "a"], ["seed0", "seed1"], [0])
    line = read_rows(tmp_path / "results.csv", 0)[0]
    assert (line["run"], float(line["dice_mean"]), line["hd95_undefined"]) == ("b", pytest.approx(0.5), "0")


def test_groups_are_kept_apart(tmp_path):
    write_cell(tmp_path, "a", "seed0", [("p", 0.1, 0.2)], group="LGG")
    text = (tmp_path / "cells/a/seed0/metrics/per_slice.csv").read_text(encoding="utf-8")
    (tmp_path / "cells/a/seed0/metrics/per_slice.csv").write_text(text + "\nr,BraTS,0,0,0.1,0.8,0.4,8")
    volumes = (tmp_path / "cells/a/seed0/metrics/per_volume.csv").read_text(encoding="utf-8")
    (tmp_path / "cells/a/seed0/metrics/per_volume.csv").write_text(volumes + "\nr,BraTS,0,0.3,0.5")
    results = summarise_cells(tmp_path, ["a"], ["seed0"], [0])
    assert [(r["group"], r["dice"]["mean"]) for r in results] == [("BraTS", 0.8), ("LGG", 0.2)]
