"""Training by the command, in three stages: from tags alone, over a kill in each, with misspelt knobs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from custom_modules.files import flat_name
from tests.helpers.bundles import SHORT, TINY, config, failure, monai_bundle, state
from tests.helpers.processes import forked_bundle


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_training_needs_no_mask(trained, dataset_without_masks):
    assert not list(dataset_without_masks.rglob("*_seg*"))
    weights = state(trained.weights)
    assert all(isinstance(value, torch.Tensor) and value.isfinite().all() for value in weights.values())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    assert {name.split(".")[0] for name in weights} == {"denoiser", "classifier", "segmenter", "distilled"}
    assert weights["distilled"] == 1  # so `--method segmenter` takes them
    assert (trained.ckpt_dir / "model.training.txt").read_text() == "p0\np1\n"
    written = sorted(path.name for path in trained.ckpt_dir.iterdir())
    assert written == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "distill", "model.pt", "model.training.txt"]
    for folder in (trained.folder / "runs", trained.folder / "runs" / "distill"):
        assert list(folder.glob("events.out.tfevents.*"))


def command(dataset, folder, *more) -> list:
    where = ["--dataset_dir", dataset, "--datalist", dataset / "tags_only.json", "--output_dir", folder]
    return ["run", "--config_file", config("brats_flair", "train"), *where, *TINY, *SHORT, *more]


def done(folder: Path) -> dict[Path, int]:
    """When the checkpoints, the maps and the teacher were written."""
    files = [path for path in folder.rglob("*") if re.search(r"checkpoint|saliency\.nii|teacher\w+\.pt", path.name)]
    return {path: path.stat().st_mtime_ns for path in files}


HANDLER = "{_target_: tests.helpers.bundles.Kill, iteration: %d}"
STAGES = {  # where a kill is put, what it is, and the checkpoints, maps and teacher that are there by then
    "denoiser": ("config_file", "train", "+train#handlers", 3, ["checkpoint_epoch=1.pt"]),
    "maps": (
        *("map_config", "inference", "+handlers", 1),
        ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "p0", "teacher"],
    ),
    "student": (
        *("student#config_file", "distill", "+train#handlers", 3),
        ["checkpoint_epoch=1.pt", "checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "p0", "p1", "teacher"],
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_continues_in_its_stage_as_if_it_had_not_been(stage, trained, dataset_without_masks, tmp_path):
    knob, name, handlers, iteration, left = STAGES[stage]
    kill = tmp_path / "kill.yaml"  # in the middle of the second epoch, or after the first map
    kill.write_text(f"{handlers}:\n  - {HANDLER % iteration}\n")
    files = [config("brats_flair", name) for name in dict.fromkeys(("train", name) if name == "distill" else (name,))]
    killed = forked_bundle(*command(dataset_without_masks, tmp_path / "runs", f"--{knob}", str([*files, str(kill)])))
    assert killed.returncode == -9, killed.stdout
    before = done(tmp_path / "runs")
    assert sorted(re.sub(r"_(flair|[0-9a-f]{12}\.pt).*", "", path.name) for path in before) == left

    monai_bundle(*command(dataset_without_masks, tmp_path / "runs"))
    after = done(tmp_path / "runs")
    assert {path: after[path] for path in before} == before  # nothing is done twice
    models = tmp_path / "runs" / "models"  # the default
    for key in ("network", "ema"):
        last = "checkpoint_epoch=2.pt"
        assert not differing(state(models / last, key), state(trained.ckpt_dir / last, key)), key
    assert not differing(state(models / "model.pt"), state(trained.weights))


def test_a_finished_run_has_nothing_left_to_do_but_restores_its_weights(trained, dataset_without_masks, tmp_path):
    run = command(dataset_without_masks, tmp_path / "runs")
    monai_bundle("run", "training", *run[1:])  # the other name
    models, before = tmp_path / "runs" / "models", done(tmp_path / "runs")
    content = (models / "model.pt").read_bytes()
    for gone in ((), ("model.pt",), ("model.pt", "model.training.txt")):
        for name in gone:
            (models / name).unlink()
        monai_bundle(*run)
        assert (models / "model.pt").read_bytes() == content and done(tmp_path / "runs") == before
        assert (models / "model.training.txt").read_text() == "p0\np1\n"


def test_weights_of_another_bundle_are_refused_wherever_they_lie(trained, tmp_path):
    copy = shutil.copy(trained.weights, tmp_path / "mine.pt")
    where = ["--dataset_dir", tmp_path, "--output_dir", tmp_path / "out", "--ckpt_path", copy]
    told = failure(["run", "--config_file", config("chaos_kidney", "inference"), *where, *TINY])
    assert "mine.pt' are of the bundle 'BraTS FLAIR weakly supervised" in told


def test_a_case_is_data_whatever_its_name(dataset_without_masks, tmp_path):
    """A text that a config would evaluate, in a stage that gives the cases of the first to configs of its own."""
    sections = json.loads((dataset_without_masks / "tags_only.json").read_text())
    names = [f"$__import__('pathlib').Path({str(tmp_path / 'executed')!r}).touch()", "@device"]
    for case, name in zip(sections["training"], names, strict=True):
        case["case"] = name
    listed = tmp_path / "datalist.json"
    listed.write_text(json.dumps(sections))
    monai_bundle(*command(dataset_without_masks, tmp_path / "runs", "--datalist", listed))
    recorded = (tmp_path / "runs" / "models" / "model.training.txt").read_text().splitlines()
    assert recorded == [flat_name(name) for name in names]
    assert not (tmp_path / "executed").exists()


def test_a_misspelt_knob_of_training_is_an_error(dataset_without_masks, tmp_path):
    where = ["--dataset_dir", dataset_without_masks, "--output_dir", tmp_path, "--ckpt_dir", tmp_path]
    command = ["run", "training", "--config_file", config("brats_flair", "train"), *where, *TINY, *SHORT]
    assert re.search("no knob 'val_intervall'.*'val_interval'", failure([*command, "--val_intervall=1"]))
    assert re.search("no knob 'segmenter_epoch'.*'segmenter_epochs'", failure([*command, "--segmenter_epoch=1"]))
