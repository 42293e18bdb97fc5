"""Studies: what is evaluated, what is not done twice, what a failure costs, and what is written."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from custom_modules.files import read_json, sha256
from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.evaluator import VolumeEvaluator
from study.figures.pictures import BYTES
from study.runner import draw_study
from tests.helpers.bundles import SHORT, monai_bundle
from tests.helpers.studies import TRAINING, conduct, study_file


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- a study with the weights at hand

RUNS = {"maps": {"method": "cdm"}, "wrong": {"method": "cdm", "tau": 2}, "floor": {"method": "intensity"}}


@pytest.fixture(scope="module")
def done(dataset, trained, tmp_path_factory):
    """The study's file and its output, after one run in which `wrong` failed."""
    folder = tmp_path_factory.mktemp("study")
    study, out = study_file(folder, RUNS, seeds=[0, 5]), folder / "out"
    with pytest.raises(SystemExit, match="2 runs failed") as error:
        conduct(study, out, dataset, "--ckpt_path", trained.weights)
    assert "wrong, seed0: ValueError: tau must be in [0, 1)" in str(error.value)
    return study, out


def cells(out: Path) -> list[str]:
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in out.glob("cells/*/*/cell.json"))


def test_every_run_is_repeated_but_those_without_noise(done):
    assert cells(done[1]) == ["floor/seed0", "maps/seed0", "maps/seed5"]
    maps = [rows(done[1] / "cells" / "maps" / seed / "metrics" / "per_slice.csv") for seed in ("seed0", "seed5")]
    assert [row["seed"] for row in maps[0]] == ["0", "0"] and [row["seed"] for row in maps[1]] == ["5", "5"]


def test_tables_pictures_and_report_are_written(done):
    written = {path.name for path in done[1].iterdir() if path.is_file()}
    assert written == {"study.json", "results.csv", "results.json", "results.md", "comparison.png", "report.html"}
    assert [row["run"] for row in rows(done[1] / "results.csv")] == ["maps", "floor"]


def test_volumes_are_kept_for_the_first_repeat(done):
    volumes = sorted(str(path.relative_to(done[1] / "cells")) for path in done[1].rglob("*.nii.gz"))
    assert volumes == [
        f"{run}/seed0/p3_flair/p3_flair_{kind}.nii.gz" for run in ("floor", "maps") for kind in ("mask", "saliency")
    ]


def test_the_recorded_command_gives_the_same_numbers(done, tmp_path):
    cell = done[1] / "cells" / "maps" / "seed5"
    words = shlex.split(read_json(cell / "cell.json")["command"])
    assert words[:4] == ["python", "-m", "monai.bundle", "run"]
    words[words.index("--output_dir") + 1] = str(tmp_path)
    monai_bundle(*words[3:], "--logging_file=False")
    again, first = (rows(folder / "metrics" / "per_slice.csv") for folder in (tmp_path, cell))
    assert again == first and len(first) == 2


def test_what_is_done_is_not_done_again(done, dataset, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done[1], out)
    evaluated = []
    run = VolumeEvaluator.run
    monkeypatch.setattr(VolumeEvaluator, "run", lambda self: (evaluated.append(self), run(self)))
    (out / "cells" / "maps" / "seed0" / "cell.json").unlink()  # as if it had been interrupted
    with pytest.raises(SystemExit, match="2 runs failed"):
        conduct(done[0], out, dataset, "--ckpt_path", trained.weights)
    assert len(evaluated) == 1 and cells(out) == cells(done[1])

    cell = out / "cells" / "maps" / "seed5" / "cell.json"
    edited = cell.read_text(encoding="utf-8").replace('"erosion": 3', '"erosion": 2')
    cell.write_text(edited, encoding="utf-8")  # as if the config had been edited since
    conduct(done[0], out, dataset, "--ckpt_path", trained.weights, "--runs", "maps")
    assert len(evaluated) == 2, "other settings are another result"
    assert [row["run"] for row in rows(out / "results.csv")] == ["maps", "floor"], "the table shows all that is there"


@pytest.mark.parametrize(("more", "what"), [(["--num_draws=2"], "knobs"), (["--seeds", "0"], "repeats")])
def test_one_folder_holds_one_study(done, dataset, trained, more, what):
    with pytest.raises(SystemExit, match=rf"other \['{what}'\]; give another --output_dir"):
        conduct(done[0], done[1], dataset, "--ckpt_path", trained.weights, *more)


def test_a_volume_is_prepared_once(dataset, trained, tmp_path, monkeypatch):
    prepared = []
    load = CaseDataset._transform
    monkeypatch.setattr(CaseDataset, "_transform", lambda self, index: (prepared.append(index), load(self, index))[1])
    study = study_file(tmp_path, {"a": {"method": "intensity"}, "b": {"method": "cdm"}}, seeds=[0, 1])
    conduct(study, tmp_path / "out", dataset, "--ckpt_path", trained.weights)
    assert cells(tmp_path / "out") == ["a/seed0", "b/seed0", "b/seed1"] and prepared == [0]


# ---- folds


def test_folds_train_their_own_weights(dataset, tmp_path, monkeypatch):
    folds = []
    cases = read_json(dataset / "datalist.json")
    for k, test in enumerate(("test", "validation")):
        folds.append(tmp_path / f"fold{k}.json")
        folds[-1].write_text(json.dumps({"training": cases["training"], "validation": [], "test": cases[test]}))
    commands = []

    def in_this_process(words, check):
        commands.append(words)
        monai_bundle(*words[3:], "--logging_file=False")

    monkeypatch.setattr(subprocess, "run", in_this_process)
    study = study_file(tmp_path, {"maps": {"method": "cdm"}}, seeds=[0, 1], training=TRAINING)
    conduct(study, tmp_path / "out", dataset, "--datalist", *folds, *SHORT)
    assert cells(tmp_path / "out") == ["maps/fold0", "maps/fold1"] and len(commands) == 2
    for k, case in enumerate(("p3", "p2")):
        cell = tmp_path / "out" / "cells" / "maps" / f"fold{k}"
        weights = tmp_path / "out" / "models" / f"fold{k}" / "ckpt_path" / "model.pt"
        assert read_json(cell / "cell.json")["weights_sha256"] == sha256(weights)
        assert {row["case"] for row in rows(cell / "metrics" / "per_slice.csv")} == {case}
    result = read_json(tmp_path / "out" / "results.json")["results"][0]
    assert (result["n_volumes"], result["repeats"]) == (2, 2) and result["dice"]["std"] is not None


def test_a_training_that_fails_is_reported(dataset, tmp_path, monkeypatch):
    def fails(words, check):
        raise subprocess.CalledProcessError(3, words)

    monkeypatch.setattr(subprocess, "run", fails)
    study = study_file(tmp_path, {"maps": {"method": "cdm"}}, training=TRAINING)
    lists = [dataset / "datalist.json", dataset / "tags_only.json"]
    with pytest.raises(SystemExit, match="2 runs failed(.|\n)*training, fold1: exit status 3"):
        conduct(study, tmp_path / "out", dataset, "--datalist", *lists)


# ---- figures


def test_a_study_is_drawn(compared, swept):
    assert [path.name for path in draw_study(compared)] == ["comparison.png"]
    paths = draw_study(swept)
    assert [path.name for path in paths] == ["ablation.png", "strips.png"]
    for path in (compared / "comparison.png", *paths):
        assert path.stat().st_size <= BYTES and imread(path)[..., :3].std() > 0.1, path
