"""Training by the command: from tags alone, over a kill, with misspelt knobs."""

from __future__ import annotations

import re

import torch

from tests.helpers.bundles import SHORT, TINY, config, failure, monai_bundle, monai_bundle_process, state


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_training_needs_no_mask(trained, dataset_without_masks):
    assert not list(dataset_without_masks.rglob("*_seg*"))
    weights = state(trained.weights)
    assert all(isinstance(value, torch.Tensor) and value.isfinite().all() for value in weights.values())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    assert {name.split(".")[0] for name in weights} == {"denoiser", "classifier", "segmenter", "distilled"}
    assert weights["distilled"] == 0  # so the segmenter has its random start
    assert (trained.ckpt_dir / "model.training.txt").read_text() == "p0\np1\n"
    written = sorted(path.name for path in trained.ckpt_dir.iterdir())
    assert written == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "model.pt", "model.training.txt"]
    assert list(trained.folder.glob("runs/events.out.tfevents.*"))


def test_a_killed_run_continues_as_if_it_had_not_been(trained, dataset_without_masks, tmp_path):
    kill = tmp_path / "kill.yaml"  # in the middle of the second epoch
    kill.write_text("+train#handlers:\n  - {_target_: tests.helpers.bundles.Kill, iteration: 3}\n")
    where = ["--dataset_dir", dataset_without_masks, "--datalist", dataset_without_masks / "tags_only.json"]
    where += ["--output_dir", tmp_path / "runs", "--ckpt_dir", tmp_path / "models"]
    train = config("brats_flair", "train")
    killed = monai_bundle_process("run", "training", "--config_file", f"['{train}','{kill}']", *where, *TINY, *SHORT)
    assert killed.returncode == -9, killed.stdout
    assert [path.name for path in (tmp_path / "models").glob("*.pt")].count("checkpoint_epoch=1.pt") == 1
    assert not (tmp_path / "models" / "checkpoint_epoch=2.pt").exists()

    monai_bundle("run", "--config_file", train, *where, *TINY, *SHORT)  # the run id `run` is the other name
    for key in ("network", "ema"):
        last = "checkpoint_epoch=2.pt"
        assert not differing(state(tmp_path / "models" / last, key), state(trained.ckpt_dir / last, key)), key
    assert not differing(state(tmp_path / "models" / "model.pt"), state(trained.weights))

    before = (tmp_path / "models" / "model.pt").read_bytes()
    monai_bundle("run", "--config_file", train, *where, *TINY, *SHORT)  # nothing is left to do
    assert (tmp_path / "models" / "model.pt").read_bytes() == before


def test_a_misspelt_knob_of_training_is_an_error(dataset_without_masks, tmp_path):
    where = ["--dataset_dir", dataset_without_masks, "--output_dir", tmp_path, "--ckpt_dir", tmp_path]
    command = ["run", "training", "--config_file", config("brats_flair", "train"), *where, *TINY, *SHORT]
    assert re.search("no knob 'val_intervall'.*'val_interval'", failure([*command, "--val_intervall=1"]))
