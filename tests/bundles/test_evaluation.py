"""Evaluation by the command: its tables, its summary, the cases that the training has seen."""

from __future__ import annotations

import csv
import json

import pytest

from tests.helpers.bundles import TAGS, config, inference, monai_bundle


@pytest.fixture(scope="module")
def evaluated(dataset, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    command = inference("brats_flair", dataset, out, trained, "--gate=tags", "--section=['training','test']")
    command[2] = f"['{config('brats_flair', 'inference')}','{config('brats_flair', 'evaluate')}']"
    monai_bundle(*command)
    return out


def read(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_writes_its_tables(evaluated):
    slices, volumes = read(evaluated / "metrics" / "per_slice.csv"), read(evaluated / "metrics" / "per_volume.csv")
    positive = [str(k) for k, tag in enumerate(TAGS) if tag]
    assert [(row["case"], row["slice"]) for row in slices] == [(c, k) for c in ("p0", "p1", "p3") for k in positive]
    assert all(0 <= float(row[key]) <= 1 for row in slices for key in ("dice", "iou"))
    assert [row["case"] for row in volumes] == ["p0", "p1", "p3"]
    assert all(float(row["seconds_per_slice"]) > 0 for row in volumes)
    assert (evaluated / "p3_flair" / "p3_flair_mask.nii.gz").is_file()


def test_evaluation_summary_has_the_keys_of_the_contract(evaluated):
    summary = json.loads((evaluated / "metrics" / "summary.json").read_text())
    keys = "bundle method n_volumes n_slices seeds dice iou hd95 volume_dice seconds_per_slice settings"
    assert set(keys.split()) <= summary.keys()
    assert (summary["bundle"], summary["method"], summary["n_volumes"]) == ("brats_flair", "cdm", 3)
    assert summary["n_slices"] == 3 * sum(TAGS) and summary["seeds"] == [0]
    for key in ("dice", "iou", "hd95", "volume_dice"):
        assert {"mean", "std", "std_cases"} <= summary[key].keys()
    assert {"unit", "n_undefined"} <= summary["hd95"].keys()
    assert summary["settings"]["noise_level"] == 150 and summary["settings"]["gate"] == "tags"


def test_evaluation_marks_cases_of_the_training(evaluated):
    volumes = read(evaluated / "metrics" / "per_volume.csv")
    assert {row["case"]: row["in_training"] for row in volumes} == {"p0": "1", "p1": "1", "p3": "0"}
