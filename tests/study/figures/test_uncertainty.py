"""How sure the masks are: cases by falling expected Dice, each beside its true one."""

from __future__ import annotations

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest

from study.figures.pictures import NothingToDraw
from study.figures.uncertainty import draw_uncertainty
from study.results import read_results
from tests.helpers.studies import LPS, texts, truth


def test_cases_are_ordered_by_expected_dice(compared, tmp_path):
    out = tmp_path / "evaluation"
    shutil.copytree(compared / "cells" / "cdm" / "seed0", out)
    with pytest.raises(NothingToDraw, match="evaluate with --uncertainty True"):
        draw_uncertainty(read_results(out))

    with open(out / "metrics" / "per_volume.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {"p1": 0.5, "p2": 0.9, "p3": 0.7}
    with open(out / "metrics" / "per_volume.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], "expected_dice"])
        table.writeheader()
        table.writerows(row | {"expected_dice": expected[row["case"]]} for row in rows)
    for path in out.glob("*/*_mask.nii.gz"):
        entropy = nib.Nifti1Image(truth() * np.float32(0.5), LPS)
        nib.save(entropy, path.with_name(path.name.replace("mask", "uncertainty")))
    *panels, scatter = draw_uncertainty(read_results(out)).axes
    lines = np.reshape(panels, (3, 3))
    assert [texts(line[0])[0].split()[0] for line in lines] == ["p2", "p3", "p1"]
    true = {row["case"]: float(row["volume_dice"]) for row in rows}
    assert [texts(line[1])[0] for line in lines] == [
        f"expected {expected[case]:.2f}, true {true[case]:.2f}" for case in ("p2", "p3", "p1")
    ]
    assert scatter.collections[0].get_offsets().tolist() == [[expected[case], true[case]] for case in sorted(true)]
