"""Inference and evaluation by several processes, and again: nothing lost, nothing done twice, the same numbers."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from custom_modules.inference import provenance
from tests.helpers.bundles import REPO, TAGS, TINY, config, head, monai_bundle, save_nifti

CASES = ("p0", "p1", "p2", "p3")
QUICK = [*TINY, "--num_draws=1", "--gate_threshold=0"]  # the classifier is the gate, and lets all slices pass
FLOOR = ["--section=test", "--gate=tags", "--method=intensity"]
KILLER = """
+postprocessing#transforms:
  - _target_: Lambda
    func: "$lambda item: __import__('os').kill(__import__('os').getpid(), 9) if item['case'] == 'p3' else item"
"""


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory) -> Path:
    """Random ones: a network of two epochs has empty maps."""
    path, generator = tmp_path_factory.mktemp("weights") / "model.pt", torch.Generator().manual_seed(0)
    state = torch.load(trained.weights, weights_only=True)
    torch.save({name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four labelled heads in `test`, and in `validation` one whose image is broken."""
    root = tmp_path_factory.mktemp("somewhere") / "data"  # the folder's name is the group's
    lists = {"validation": [], "test": []}
    for seed, case in enumerate(("bad", *CASES)):
        image, lesion = head(seed)
        save_nifti(image, root / case / f"{case}_flair.nii.gz")
        save_nifti(lesion, root / case / f"{case}_seg.nii.gz")
        item = {"case": case, "image": f"{case}/{case}_flair.nii.gz", "label": f"{case}/{case}_seg.nii.gz"}
        lists["test" if case in CASES else "validation"].append(item | {"slice_labels": TAGS})
    (root / "bad" / "bad_flair.nii.gz").write_bytes(b"no volume")
    (root / "datalist.json").write_text(json.dumps(lists))
    return root


def command(data, out, weights, *more, overlays=("evaluate",)) -> list[str]:
    files = [config("brats_flair", "inference"), *(config("brats_flair", name) for name in overlays)]
    where = ["--dataset_dir", data, "--output_dir", out, "--ckpt_path", weights]
    return [str(word) for word in ("run", "--config_file", f"{files}", *where, *QUICK, *more)]


def torchrun(words: list[str], *overlays: Path) -> subprocess.CompletedProcess:
    """The command by two processes, as a user types it, with further configs; stdout and stderr come back together."""
    files = [*json.loads(words[2].replace("'", '"')), config("brats_flair", "multi_gpu_inference"), *map(str, overlays)]
    words = [word for word in (*words[:2], f"{files}", *words[3:]) if not word.startswith("--logging_file")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.run([*launch, *words], cwd=REPO, env=environment, timeout=300, **streams)


def lasting(value):
    """Without what may differ: the seconds that the method took, and where the data lie."""
    if isinstance(value, list):
        return [lasting(part) for part in value]
    if isinstance(value, dict):
        return {k: lasting(part) for k, part in value.items() if k not in ("seconds_per_slice", "image", "label")}
    return value


def table(out: Path, name: str) -> list[dict]:
    with (out / "metrics" / name).open(newline="") as file:
        return lasting(list(csv.DictReader(file)))


def assert_same_results(out: Path, expected: Path) -> None:
    """Volumes and slice tables byte for byte; the rest but for times and places."""
    files = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == files
    for name in files:
        if name.endswith((".nii.gz", "per_slice.csv")):
            assert (out / name).read_bytes() == (expected / name).read_bytes(), name
        elif name.endswith(".json"):
            assert lasting(json.loads((out / name).read_text())) == lasting(json.loads((expected / name).read_text()))
    assert table(out, "per_volume.csv") == table(expected, "per_volume.csv")


def written(out: Path) -> dict[str, int]:
    """When each case was finished: its provenance comes last."""
    found = out.glob("*/*_provenance.json")
    return {path.parent.name.removesuffix("_flair"): path.stat().st_mtime_ns for path in found}


# ---- two processes


@pytest.fixture(scope="module")
def by_one(data, weights, tmp_path_factory) -> Path:
    """What one process makes of the good cases and the bad one, which it reports."""
    out = tmp_path_factory.mktemp("by_one")
    with pytest.raises(RuntimeError) as error:
        monai_bundle(*command(data, out, weights, "--section=['validation','test']", "--gate=classifier"))
    assert str(error.value.__cause__).startswith("1 of 5 cases failed:\n  bad: ")
    assert written(out).keys() == set(CASES) and len(table(out, "per_volume.csv")) == len(CASES)
    return out


def test_two_processes_do_what_one_does(data, weights, by_one, tmp_path):
    process = torchrun(command(data, tmp_path, weights, "--section=['validation','test']", "--gate=classifier"))
    report = r"\[rank(\d)\]: RuntimeError: 1 of 5 cases failed:\n\[rank\1\]:   bad: "  # torch marks an error's lines
    assert process.returncode != 0 and re.search(report, process.stdout), process.stdout
    assert_same_results(tmp_path, by_one)
    assert all(f"on rank {rank})" in process.stdout for rank in (0, 1))
    assert process.stdout.count("written to") == 1, "the table is printed once"
    summary = json.loads((tmp_path / "metrics" / "summary.json").read_text())
    assert summary["n_volumes"] == len(CASES) and 0 <= summary["classifier_auc"] <= 1


def test_a_killed_process_is_reported_and_what_is_missing_is_done_later(data, weights, by_one, tmp_path):
    (tmp_path / "killer.yaml").write_text(KILLER)
    out, words = tmp_path / "out", command(data, tmp_path / "out", weights, "--section=test", "--gate=classifier")
    process = torchrun(words, tmp_path / "killer.yaml")  # volumes of p3 are there then, but not what says so
    assert process.returncode != 0 and "SIGKILL" in process.stdout, process.stdout
    before = written(out)
    assert "p1" in before and "p3" not in before and (out / "p3_flair" / "p3_flair_saliency.nii.gz").is_file()
    assert not (out / "metrics" / "per_slice.csv").exists()

    done = [case for case in before if (out / "metrics" / "cases" / f"{case}_flair.json").is_file()]
    process = torchrun(words)
    assert process.returncode == 0, process.stdout
    assert f"{len(done)} of 4 cases were there already" in process.stdout
    after = written(out)
    assert {case: after[case] for case in done} == {case: before[case] for case in done} and after.keys() == set(CASES)
    assert_same_results(out, by_one)


def test_fewer_cases_than_processes_are_an_error_before_any_work(data, weights, tmp_path):
    process = torchrun(command(data, tmp_path / "out", weights, "--section=validation", overlays=()))
    message = "1 cases for 2 processes: start at most as many processes as cases, --nproc_per_node 1."
    assert process.returncode != 0 and message in process.stdout, process.stdout
    assert not (tmp_path / "out").exists()


# ---- again, in one process


@pytest.fixture(scope="module")
def finished(data, weights, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    monai_bundle(*command(data, out, weights, *FLOOR))
    return out


@pytest.fixture
def again(data, weights, finished, tmp_path):
    """Data, results and weights to change, and a run on them that tells which cases it did."""
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
    assert "4 of 4 cases were there already, made with the same settings, overrides, first config file" in caplog.text
    for name in ("per_slice.csv", "per_volume.csv", "summary.json"):  # to the byte, with the times of then
        assert (again.out / "metrics" / name).read_bytes() == (finished / "metrics" / name).read_bytes()


UPPER = "--preprocessing#transforms#8#upper=99"


@pytest.mark.parametrize("knob", ["--overwrite=True", "--blur=1.5", "--seed=1", "--gate=all", "--amp=False", UPPER])
def test_what_was_made_otherwise_is_done_anew(again, knob):
    assert again(knob) == set(CASES)
    assert again(knob) == (set(CASES) if "overwrite" in knob else set())


def test_other_weights_do_all_anew(again):
    state = torch.load(again.weights, weights_only=True)
    torch.save({name: value * 2 for name, value in state.items()}, again.weights)
    assert again() == set(CASES)


def test_another_version_does_all_anew(again, monkeypatch):
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
def test_a_case_that_is_not_whole_or_not_the_same_is_done_anew(again, change):
    CHANGES[change](again)
    assert again() == {"p1"}
    assert [row["case"] for row in table(again.out, "per_volume.csv")] == list(CASES), "in the order of the data"
    assert again() == set() and not list(again.out.rglob(".partial*"))


def test_numbers_of_another_mask_do_not_stay(again, finished):
    """Inference with other settings, and again with these, leaves rows that were measured long ago."""
    assert again("--threshold=0.9", overlays=()) == set(CASES)
    assert again("--threshold=0.9") == set(CASES)  # their rows are of the first masks
    assert table(again.out, "per_slice.csv") != table(finished, "per_slice.csv")
    assert again() == set(CASES)
    assert_same_results(again.out, finished)


def test_a_case_that_fails_now_is_not_in_the_tables(again):
    (again.data / "p1" / "p1_flair.nii.gz").write_bytes(b"no volume")
    with pytest.raises(RuntimeError) as error:
        again()
    assert str(error.value.__cause__).startswith("1 of 4 cases failed:\n  p1: ")
    assert [row["case"] for row in table(again.out, "per_volume.csv")] == ["p0", "p2", "p3"]
    assert result(again, "provenance.json").is_file(), "what lies there is still what it says"


def test_inference_alone_needs_no_rows(again):
    shutil.rmtree(again.out / "metrics")
    assert again(overlays=()) == set()
    assert again() == set(CASES)


def test_workers_that_read_ahead_change_nothing(again, finished):
    assert again("--num_workers=2") == set()
    assert again("--num_workers=2", "--overwrite=True") == set(CASES)
    assert_same_results(again.out, finished)


def test_the_gate_is_recorded(by_one):
    facts = json.loads((by_one / "p0_flair" / "p0_flair_provenance.json").read_text())
    assert len(facts["gate_probability"]) == facts["slices_processed"] == len(TAGS)
    assert all(p == round(p, 4) and 0 <= p <= 1 for p in facts["gate_probability"])
    assert facts["gate_weights_sha256"] == facts["weights_sha256"]
    assert np.asarray(nib.load(by_one / "p0_flair" / "p0_flair_mask.nii.gz").dataobj).any()
