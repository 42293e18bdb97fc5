"""Studies: what is evaluated, what is not done twice, what a failure costs, and the tables, checked by hand."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.evaluator import VolumeEvaluator
from study import runner
from study.tables import markdown, summarise_cells, write_tables
from tests.helpers.bundles import REPO, SHORT, TINY, config, monai_bundle

FAST = ["--num_draws=1", *(knob for knob in TINY if not knob.startswith("--logging_file"))]


def study_file(folder: Path, runs: dict, **more) -> Path:
    files = [str(REPO / config("brats_flair", name)) for name in ("inference", "evaluate")]
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"config_file": files, "runs": runs, **more}, sort_keys=False))
    return path


def conduct(study: Path, out: Path, dataset: Path, *more) -> None:
    lists = ["--datalist", str(dataset / "datalist.json")] if "--datalist" not in more else []
    runner.main(
        [str(study), "--dataset_dir", str(dataset), "--output_dir", str(out), *lists, *FAST, *map(str, more)]
    )


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
    words = shlex.split(json.loads((cell / "cell.json").read_text(encoding="utf-8"))["command"])
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

    (out / "cells" / "maps" / "seed5" / "cell.json").write_text(
        (out / "cells" / "maps" / "seed5" / "cell.json")
        .read_text(encoding="utf-8")
        .replace('"erosion": 3', '"erosion": 2')
    )  # as if the config had been edited since
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
    cases = json.loads((dataset / "datalist.json").read_text(encoding="utf-8"))
    for k, test in enumerate(("test", "validation")):
        folds.append(tmp_path / f"fold{k}.json")
        folds[-1].write_text(json.dumps({"training": cases["training"], "validation": [], "test": cases[test]}))
    commands = []

    def in_this_process(words, check):
        commands.append(words)
        monai_bundle(*words[3:], "--logging_file=False")

    monkeypatch.setattr(subprocess, "run", in_this_process)
    training = {"ckpt_path": {"config_file": [str(REPO / config("brats_flair", "train"))], "weights": "model.pt"}}
    study = study_file(tmp_path, {"maps": {"method": "cdm"}}, seeds=[0, 1], training=training)
    conduct(study, tmp_path / "out", dataset, "--datalist", *folds, *SHORT)
    assert cells(tmp_path / "out") == ["maps/fold0", "maps/fold1"] and len(commands) == 2
    for k, case in enumerate(("p3", "p2")):
        cell = tmp_path / "out" / "cells" / "maps" / f"fold{k}"
        weights = tmp_path / "out" / "models" / f"fold{k}" / "ckpt_path" / "model.pt"
        assert json.loads((cell / "cell.json").read_text(encoding="utf-8"))["weights_sha256"] == runner.sha256(
            weights
        )
        assert {row["case"] for row in rows(cell / "metrics" / "per_slice.csv")} == {case}
    result = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"][0]
    assert (result["n_volumes"], result["repeats"]) == (2, 2) and result["dice"]["std"] is not None


# ---- what is given


def test_a_training_that_fails_is_reported(dataset, tmp_path, monkeypatch):
    def fails(words, check):
        raise subprocess.CalledProcessError(3, words)

    monkeypatch.setattr(subprocess, "run", fails)
    training = {"ckpt_path": {"config_file": [str(REPO / config("brats_flair", "train"))], "weights": "model.pt"}}
    study = study_file(tmp_path, {"maps": {"method": "cdm"}}, training=training)
    lists = [dataset / "datalist.json", dataset / "tags_only.json"]
    with pytest.raises(SystemExit, match="2 runs failed(.|\n)*training, fold1: exit status 3"):
        conduct(study, tmp_path / "out", dataset, "--datalist", *lists)


def test_a_sweep_is_a_run_a_value(tmp_path):
    study = runner.read_study(study_file(tmp_path, {}, base={"method": "cg_cdm"}, sweeps={"tau": [0.5, 0.9]}))
    assert study["runs"] == {"tau=0.5": {"tau": 0.5}, "tau=0.9": {"tau": 0.9}}


def test_what_cannot_be_a_study_is_refused(dataset, tmp_path):
    with pytest.raises(SystemExit, match="each trains its own weights"):
        lists = [dataset / "datalist.json", dataset / "tags_only.json"]
        training = {"ckpt_path": {"config_file": [str(REPO / config("brats_flair", "train"))], "weights": "model.pt"}}
        conduct(study_file(tmp_path, RUNS, training=training), tmp_path, dataset, "--datalist", *lists, "--ckpt_path=x")
    with pytest.raises(ValueError, match="no runs and no sweeps"):
        runner.read_study(study_file(tmp_path, {}))
    with pytest.raises(ValueError, match=r"'big'.*image_size.*share"):
        runner.read_study(study_file(tmp_path, {"big": {"image_size": 128}}))
    study = study_file(tmp_path, RUNS)
    with pytest.raises(SystemExit, match=r"no \['mapz'\].*maps"):
        conduct(study, tmp_path, dataset, "--runs", "mapz")
    with pytest.raises(SystemExit, match="noise_level"):
        conduct(study, tmp_path, dataset, "--noise_levle", 3)
    with pytest.raises(SystemExit, match="pairs of --knob value"):
        conduct(study, tmp_path, dataset, "stray")


# ---- tables


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

    write_tables(tmp_path, {"runs": ["b", "a"], "min_areas": [0]}, ["seed0", "seed1"])
    line = rows(tmp_path / "results.csv")[0]
    assert (line["run"], float(line["dice_mean"]), line["hd95_undefined"]) == ("b", pytest.approx(0.5), "0")


def test_groups_stand_apart(tmp_path):
    write_cell(tmp_path, "a", "seed0", [("p", 0.1, 0.2)], group="LGG")
    text = (tmp_path / "cells/a/seed0/metrics/per_slice.csv").read_text(encoding="utf-8")
    (tmp_path / "cells/a/seed0/metrics/per_slice.csv").write_text(text + "\nr,BraTS,0,0,0.1,0.8,0.4,8")
    volumes = (tmp_path / "cells/a/seed0/metrics/per_volume.csv").read_text(encoding="utf-8")
    (tmp_path / "cells/a/seed0/metrics/per_volume.csv").write_text(volumes + "\nr,BraTS,0,0.3,0.5")
    results = summarise_cells(tmp_path, ["a"], ["seed0"], [0])
    assert [(r["group"], r["dice"]["mean"]) for r in results] == [("BraTS", 0.8), ("LGG", 0.2)]
