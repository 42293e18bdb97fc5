"""Inference and evaluation once more: what is done is not done again, what changed is, and the numbers are the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from custom_modules.inference import provenance
from tests.helpers.bundles import head, monai_bundle, save_nifti
from tests.helpers.runs import CASES, assert_same_results, command, save_heads, save_random_weights, table, written

FLOOR = ["--section=test", "--gate=tags", "--method=intensity"]


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory) -> Path:
    return save_random_weights(trained.weights, tmp_path_factory.mktemp("weights") / "model.pt")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_heads(tmp_path_factory.mktemp("somewhere") / "data")  # the folder's name is the group's


@pytest.fixture(scope="module")
def finished(data, weights, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    monai_bundle(*command(data, out, weights, *FLOOR))
    return out


@pytest.fixture
def again(data, weights, finished, tmp_path):
    """Copies of data, results and weights to change, and a run on them that tells which cases it did."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(finished, tmp_path / "out")
    shutil.copy(weights, tmp_path / "model.pt")

    def run(*more, overlays=("evaluate",)) -> set[str]:
        before = written(tmp_path / "out")
        where = (tmp_path / "data", tmp_path / "out", tmp_path / "model.pt")
        monai_bundle(*command(*where, *FLOOR, *more, overlays=overlays))
        return {case for case, when in written(tmp_path / "out").items() if before.get(case) != when}

    run.data, run.out, run.weights = tmp_path / "data", tmp_path / "out", tmp_path / "model.pt"
    return run


def test_what_is_done_is_not_done_again(again, finished, caplog):
    caplog.set_level("INFO")
    for name in ("per_slice.csv", "per_volume.csv", "summary.json"):
        (again.out / "metrics" / name).unlink()
    assert again() == set()
    assert "4 of 4 cases were already done with the same settings, overrides, first config file" in caplog.text
    for name in ("per_slice.csv", "per_volume.csv", "summary.json"):  # to the byte, with the times of the first run
        assert (again.out / "metrics" / name).read_bytes() == (finished / "metrics" / name).read_bytes()


MARGIN = "--preprocessing#transforms#7#margin=[5,5,0]"


@pytest.mark.parametrize("knob", ["--overwrite=True", "--blur=1.5", "--seed=1", "--gate=all", "--amp=False", MARGIN])
def test_what_was_made_with_another_knob_is_done_again(again, knob):
    assert again(knob) == set(CASES)
    assert again(knob) == (set(CASES) if "overwrite" in knob else set())


def test_with_other_weights_all_is_done_again(again):
    state = torch.load(again.weights, weights_only=True)
    torch.save({name: value * 2 for name, value in state.items()}, again.weights)
    assert again() == set(CASES)


def test_with_another_version_all_is_done_again(again, monkeypatch):
    monkeypatch.setattr(provenance, "__version__", "99")
    assert again() == set(CASES)


def result(run, what: str) -> Path:
    return run.out / "p1_flair" / f"p1_flair_{what}"


def changed_tags(run) -> None:
    lists = json.loads((run.data / "datalist.json").read_text())
    lists["test"][1]["slice_labels"] = [0, 1, 1, 1, 0, 0]
    (run.data / "datalist.json").write_text(json.dumps(lists))


def half_a_saliency(run) -> None:
    aside = run.out / "p1_flair" / ".partial-1-saliency"
    result(run, "saliency.nii.gz").rename(aside)
    os.utime(aside, (0, 0))  # left long ago


CHANGES = {
    "no mask": lambda run: result(run, "mask.nii.gz").unlink(),
    "half a saliency": half_a_saliency,
    "no provenance": lambda run: result(run, "provenance.json").unlink(),
    "another program's provenance": lambda run: result(run, "provenance.json").write_text("{}"),
    "half a provenance": lambda run: result(run, "provenance.json").write_text('{"case": "p1'),
    "half a table": lambda run: (run.out / "metrics" / "cases" / "p1_flair.json").write_text('{"measured": '),
    "no rows": lambda run: (run.out / "metrics" / "cases" / "p1_flair.json").unlink(),
    "another mask": lambda run: shutil.copy(run.data / "p2" / "p2_seg.nii.gz", result(run, "mask.nii.gz")),
    "another image": lambda run: save_nifti(head(9)[0], run.data / "p1" / "p1_flair.nii.gz"),
    "another label": lambda run: save_nifti(head(9)[1], run.data / "p1" / "p1_seg.nii.gz"),
    "other tags": changed_tags,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_case_that_is_not_whole_or_not_the_same_is_done_again(again, change):
    CHANGES[change](again)
    assert again() == {"p1"}
    assert [row["case"] for row in table(again.out, "per_volume.csv")] == list(CASES), "in the order of the data"
    assert again() == set() and not list(again.out.rglob(".partial*"))


def test_numbers_of_another_mask_do_not_stay(again, finished):
    """Inference with other settings, and again with these, leaves rows that were measured long ago."""
    assert again("--threshold=0.5", overlays=()) == set(CASES)
    assert again("--threshold=0.5") == set(CASES)  # their rows are of the first masks
    assert table(again.out, "per_slice.csv") != table(finished, "per_slice.csv")
    assert again() == set(CASES)
    assert_same_results(again.out, finished)


def test_a_case_that_fails_now_is_not_in_the_tables(again):
    (again.data / "p1" / "p1_flair.nii.gz").write_bytes(b"no volume")
    with pytest.raises(RuntimeError) as error:
        again()
    assert str(error.value.__cause__).startswith("1 of 4 cases failed:\n  p1: ")
    assert [row["case"] for row in table(again.out, "per_volume.csv")] == ["p0", "p2", "p3"]
    assert result(again, "provenance.json").is_file(), "the files are still those that it describes"


def test_inference_alone_needs_no_rows(again):
    shutil.rmtree(again.out / "metrics")
    assert again(overlays=()) == set()
    assert again() == set(CASES)


def test_workers_that_read_ahead_change_nothing(again, finished):
    assert again("--num_workers=2") == set()
    assert again("--num_workers=2", "--overwrite=True") == set(CASES)
    assert_same_results(again.out, finished)
