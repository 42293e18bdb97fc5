"""Inference and evaluation by several processes: the same results, a common report, and nothing lost when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.bundles import REPO, TAGS, config, monai_bundle
from tests.helpers.processes import forked_bundle
from tests.helpers.runs import CASES, assert_same_results, command, save_heads, save_random_weights, table, written

KILLER = """
+postprocessing#transforms:
  - _target_: Lambda
    func: "$lambda item: __import__('os').kill(__import__('os').getpid(), 9) if item['case'] == 'p3' else item"
"""


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory) -> Path:
    return save_random_weights(trained.weights, tmp_path_factory.mktemp("weights") / "model.pt")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_heads(tmp_path_factory.mktemp("somewhere") / "data")  # the folder's name is the group's


def by_several(words: list[str], *overlays: Path) -> list[str]:
    """Adds to a command the config for several processes, and further ones; logging is the bundle's."""
    files = [*json.loads(words[2].replace("'", '"')), config("brats_flair", "multi_gpu_inference"), *map(str, overlays)]
    return [word for word in (*words[:2], f"{files}", *words[3:]) if not word.startswith("--logging_file")]


def torchrun(words: list[str], *overlays: Path) -> subprocess.CompletedProcess:
    """Runs the command by two processes, as a user types it, with further configs; stdout and stderr together."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.run([*launch, *by_several(words, *overlays)], cwd=REPO, env=environment, timeout=300, **streams)


@pytest.fixture(scope="module")
def by_one(data, weights, tmp_path_factory) -> Path:
    """The results of one process for the good cases and the bad one, which it reports."""
    out = tmp_path_factory.mktemp("by_one")
    with pytest.raises(RuntimeError) as error:
        monai_bundle(*command(data, out, weights, "--section=['validation','test']", "--gate=classifier"))
    assert str(error.value.__cause__).startswith("1 of 5 cases failed:\n  bad: ")
    assert written(out).keys() == set(CASES) and len(table(out, "per_volume.csv")) == len(CASES)
    return out


def test_two_processes_do_what_one_does(data, weights, by_one, tmp_path):
    words = command(data, tmp_path, weights, "--section=['validation','test']", "--gate=classifier")
    process = forked_bundle(*by_several(words), processes=2)
    assert process.returncode != 0 and "RuntimeError: 1 of 5 cases failed:\n  bad: " in process.stdout, process.stdout
    assert_same_results(tmp_path, by_one)
    assert all(f"on rank {rank})" in process.stdout for rank in (0, 1))
    assert process.stdout.count("written to") == 1, "the table is printed once"
    summary = json.loads((tmp_path / "metrics" / "summary.json").read_text())
    assert summary["n_volumes"] == len(CASES) and 0 <= summary["classifier_auc"] <= 1


def test_a_killed_process_is_reported_and_what_is_missing_is_done_later(data, weights, by_one, tmp_path):
    (tmp_path / "killer.yaml").write_text(KILLER)
    out, words = tmp_path / "out", command(data, tmp_path / "out", weights, "--section=test", "--gate=classifier")
    process = torchrun(words, tmp_path / "killer.yaml")  # volumes of p3 exist then, but not their record
    assert process.returncode != 0 and "SIGKILL" in process.stdout, process.stdout
    before = written(out)
    assert "p1" in before and "p3" not in before and (out / "p3_flair" / "p3_flair_saliency.nii.gz").is_file()
    assert not (out / "metrics" / "per_slice.csv").exists()

    done = [case for case in before if (out / "metrics" / "cases" / f"{case}_flair.json").is_file()]
    process = forked_bundle(*by_several(words), processes=2)
    assert process.returncode == 0, process.stdout
    assert f"{len(done)} of 4 cases were already done" in process.stdout
    after = written(out)
    assert {case: after[case] for case in done} == {case: before[case] for case in done} and after.keys() == set(CASES)
    assert_same_results(out, by_one)


def test_fewer_cases_than_processes_are_an_error_before_any_work(data, weights, tmp_path):
    words = command(data, tmp_path / "out", weights, "--section=validation", overlays=())
    process = forked_bundle(*by_several(words), processes=2)
    message = "1 cases for 2 processes: start at most as many processes as cases, --nproc_per_node 1."
    assert process.returncode != 0 and message in process.stdout, process.stdout
    assert not (tmp_path / "out").exists()


def test_the_gate_is_recorded(by_one):
    facts = json.loads((by_one / "p0_flair" / "p0_flair_provenance.json").read_text())
    assert len(facts["gate_probability"]) == facts["slices_processed"] == len(TAGS)
    assert all(p == round(p, 4) and 0 <= p <= 1 for p in facts["gate_probability"])
    assert facts["gate_weights_sha256"] == facts["weights_sha256"]
    assert np.asarray(nib.load(by_one / "p0_flair" / "p0_flair_mask.nii.gz").dataobj).any()
