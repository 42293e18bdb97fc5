"""Distillation: a tiny network learns from its own maps without any mask, and then segments."""

from __future__ import annotations

import json
import shutil
import traceback
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from custom_modules.inference import appearance
from custom_modules.networks.weights import training_cases
from custom_modules.training.distill import mapped_cases
from tests.helpers.bundles import (
    BUNDLES,
    REPO,
    SHORT,
    TAGS,
    TINY,
    config,
    monai_bundle,
    state,
)
from tests.helpers.processes import forked_bundle

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)

# ---- cases


def test_a_case_gets_the_map_that_lies_where_inference_puts_it(tmp_path):
    cases = [
        {"case": "p0", "image": "/data/p0/p0_flair.nii.gz", "slice_labels": [0, 1]},
        {"case": "p1", "image": "/data/p1/series", "slice_labels": [1, 1], "channel": 2},
    ]
    for stem, content in (("p0_flair", b"a"), ("p1", b"b")):
        (tmp_path / stem).mkdir()
        (tmp_path / stem / f"{stem}_saliency.nii.gz").write_bytes(content)
    mapped = mapped_cases(cases, tmp_path)
    files = [tmp_path / stem / f"{stem}_saliency.nii.gz" for stem in ("p0_flair", "p1")]
    for case, out, file, content in zip(cases, mapped, files, (b"a", b"b"), strict=True):
        assert out == case | {"map_file": str(file), "map_sha256": sha256(content).hexdigest()}
    files[0].write_bytes(b"c")  # made again: a cache must not take it for the old one
    assert mapped_cases(cases, tmp_path)[0]["map_sha256"] != mapped[0]["map_sha256"]
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"no map of \['p1'\]"):
        mapped_cases(cases, tmp_path)


# ---- what the files say


def load(bundle: str, name: str) -> dict:
    return ConfigParser.load_config_file(REPO / config(bundle, name))


@each_bundle
def test_distillation_is_set_as_inference_and_the_upper_bound_are(bundle):
    distill, inference, supervised = (load(bundle, name) for name in ("distill", "inference", "train_supervised"))
    train, default = load(bundle, "train"), inference["profiles"]["default"]
    assert distill["slice_size"] == supervised["slice_size"] == "@segmenter_size"
    assert train["segmenter_size"] == inference["segmenter_size"] and train["map_size"] == "@image_size"
    assert train["map_blur"] == default["blur"]
    assert train["label_power"] == default["intensity_power"]
    assert train["label_components"] == default["num_components"]
    own = ("bundle_root", "output_dir", "ckpt_dir", "annotated", "network_def")  # of the run, or made once more
    assert all(value == f"@{name}" for name, value in train["student"]["knobs"].items() if name not in own)
    assert not {"label", "label_file"} & set(json.dumps(distill["maps"]).split('"'))


def test_the_maps_of_both_bundles_are_made_alike():
    brats, chaos = (load(bundle, "distill")["maps"] for bundle in BUNDLES)
    assert brats == chaos and brats["gate"] == "tags" and brats["intensity_power"] == brats["erosion"] == 0


# ---- a run


def distill(folder, dataset, overlay=None) -> list:
    """The command, in `folder` with its models/model.pt, for a network of TINY's sizes."""
    files = [config("brats_flair", "train"), config("brats_flair", "distill"), *([overlay] if overlay else [])]
    where = ["--dataset_dir", dataset, "--output_dir", folder / "runs", "--ckpt_dir", folder / "models"]
    return ["run", "distill", *where, "--config_file", str([str(file) for file in files]), *TINY, *SHORT]


def start(folder, weights):
    """`folder` with weights as its models/model.pt."""
    (folder / "models").mkdir(parents=True)
    shutil.copy(weights, folder / "models" / "model.pt")
    (folder / "models" / "model.training.txt").write_text("p0\np1\n")
    return folder


def differing(a: dict, b: dict) -> set[str]:
    """Parts of two networks that are not the same to the bit."""
    assert a.keys() == b.keys()
    return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}


@pytest.fixture(scope="module")
def distilled(trained, dataset_without_masks, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted distillation of two epochs on `dataset_without_masks`: folder and weights."""
    folder = start(tmp_path_factory.mktemp("distilled"), trained.teacher)
    monai_bundle(*distill(folder, dataset_without_masks))
    return SimpleNamespace(folder=folder, weights=folder / "models" / "model.pt")


def kept(models: Path) -> Path:
    """The folder in which the one distillation in `models` keeps its checkpoints."""
    (folder,) = (path for path in (models / "distill").iterdir() if path.is_dir())
    return folder


def test_the_segmenter_learns_and_nothing_else_changes(distilled, trained, dataset_without_masks):
    assert not list(dataset_without_masks.rglob("*_seg*"))
    after, before = state(distilled.weights), state(trained.teacher)
    assert after["distilled"] == 1
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"segmenter", "distilled"}
    assert not differing({name: after[name] for name in before}, before)
    assert not differing(after, state(trained.weights))  # `run training` ends with the same student
    assert all(value.isfinite().all() for value in after.values())
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float16}
    assert training_cases(distilled.weights) == ["p0", "p1"]
    written = sorted(str(p.relative_to(distilled.weights.parent)) for p in distilled.weights.parent.rglob("*.*"))
    teacher = f"distill/{kept(distilled.weights.parent).name}"
    epochs = (f"{teacher}/checkpoint_epoch=1.pt", f"{teacher}/checkpoint_epoch=2.pt")
    assert written == [f"{teacher}.pt", *epochs, "model.pt", "model.training.txt"]


def test_the_maps_are_those_of_the_training_volumes_in_their_tagged_slices(distilled):
    maps = distilled.folder / "runs" / "distill" / "maps"
    assert sorted(path.name for path in maps.iterdir()) == ["p0_flair", "p1_flair"]
    for case in maps.iterdir():
        saliency = nib.load(case / f"{case.name}_saliency.nii.gz").get_fdata()
        assert saliency.any(axis=(0, 1)).astype(int).tolist() == TAGS
        settings = json.loads((case / f"{case.name}_provenance.json").read_text())["settings"]
        wanted = {"method": "cdm", "gate": "tags", "image_size": 32, "intensity_power": 0, "erosion": 0}
        assert {key: settings[key] for key in wanted} == wanted


def test_a_second_start_does_nothing_twice(distilled, dataset_without_masks, tmp_path, monkeypatch):
    monkeypatch.setattr(appearance, "FEWEST", 2)
    shutil.copytree(distilled.folder, tmp_path / "again")
    maps = {path: path.stat().st_mtime_ns for path in (tmp_path / "again" / "runs" / "distill").rglob("*.nii.gz")}
    monai_bundle(*distill(tmp_path / "again", dataset_without_masks))
    assert {path: path.stat().st_mtime_ns for path in maps} == maps
    assert (tmp_path / "again" / "models" / "model.pt").read_bytes() == distilled.weights.read_bytes()
    assert (tmp_path / "again" / "models" / "model.statistics.json").is_file()  # of both volumes; three are the least
    assert not differing(state(tmp_path / "again" / "models" / "model.pt"), state(distilled.weights))


def test_the_student_does_not_start_from_an_earlier_one(distilled, dataset_without_masks, tmp_path):
    monai_bundle(*distill(start(tmp_path / "again", distilled.weights), dataset_without_masks))
    assert not differing(state(tmp_path / "again" / "models" / "model.pt"), state(distilled.weights))


def test_a_killed_run_leaves_the_weights_and_the_same_command_finishes(
    distilled, trained, dataset_without_masks, tmp_path
):
    folder = start(tmp_path / "parts", trained.teacher)
    kill = tmp_path / "kill.yaml"  # in the middle of the second epoch
    kill.write_text("+train#handlers:\n  - {_target_: tests.helpers.bundles.Kill, iteration: 3}\n")
    killed = forked_bundle(*distill(folder, dataset_without_masks, overlay=kill))
    assert killed.returncode == -9, killed.stdout
    assert (kept(folder / "models") / "checkpoint_epoch=1.pt").is_file()
    assert (folder / "models" / "model.pt").read_bytes() == trained.teacher.read_bytes()
    maps = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "distill").rglob("*.nii.gz")}

    monai_bundle(*distill(folder, dataset_without_masks))
    assert not differing(state(folder / "models" / "model.pt"), state(distilled.weights))
    assert len(maps) == 4 and {path: path.stat().st_mtime_ns for path in maps} == maps  # they are not made twice
    last = [kept(models) / "checkpoint_epoch=2.pt" for models in (folder / "models", distilled.weights.parent)]
    for key in ("network", "ema"):
        assert not differing(*(state(path, key) for path in last)), key


def test_new_weights_are_not_replaced_by_those_of_an_earlier_distillation(
    distilled, trained, dataset_without_masks, tmp_path
):
    """`run training` with more epochs, in the same folder: its denoiser must outlive the next `run distill`."""
    shutil.copytree(distilled.folder, tmp_path / "again")
    weights = tmp_path / "again" / "models" / "model.pt"
    new = {name: v * 1.5 if name.startswith("denoiser") else v for name, v in state(trained.weights).items()}
    torch.save(new | {"segmenter.unet.final_conv.bias": torch.ones(1).half()}, weights)
    monai_bundle(*distill(tmp_path / "again", dataset_without_masks))
    assert differing(state(weights), new) == {"segmenter"}
    assert differing(state(weights), state(distilled.weights)) == {"denoiser", "segmenter"}


# ---- inference with it


def infer(weights, out, dataset, *more) -> list:
    where = ["--dataset_dir", dataset, "--output_dir", out, "--ckpt_path", weights, "--section=test"]
    return ["run", "--config_file", config("brats_flair", "inference"), *where, *TINY, "--segmenter_size=64", *more]


def test_inference_by_the_segmenter(distilled, dataset_without_masks, tmp_path):
    monai_bundle(*infer(distilled.weights, tmp_path, dataset_without_masks, "--uncertainty=True"))
    names = ("mask", "saliency", "uncertainty")
    files = [tmp_path / "p3_flair" / f"p3_flair_{name}.nii.gz" for name in names]
    mask, p, entropy = (np.asarray(nib.load(file).dataobj) for file in files)
    assert mask.shape == p.shape == entropy.shape and entropy.dtype == np.float32
    assert 0 <= p.min() < p.max() <= 1 and 0 <= entropy.min() < entropy.max() <= 1 and p[mask == 1].min(initial=1) > 0.5
    inside = (p > 0) & (p < 1)
    q = p[inside].astype(float)
    np.testing.assert_allclose(entropy[inside], -(q * np.log2(q) + (1 - q) * np.log2(1 - q)), atol=1e-5)
    provenance = json.loads((tmp_path / "p3_flair" / "p3_flair_provenance.json").read_text())
    dice = 2 * (p * mask).sum() / (p.sum() + mask.sum())
    assert provenance["expected_dice"] == pytest.approx(dice, abs=1e-4)
    assert (provenance["settings"]["method"], provenance["settings"]["segmenter_size"]) == ("segmenter", 64)


def test_the_segmenter_is_refused_where_it_has_not_learned(trained, dataset_without_masks, tmp_path):
    with pytest.raises(Exception) as error:  # noqa: B017
        monai_bundle(*infer(trained.teacher, tmp_path / "out", dataset_without_masks))
    message = "".join(traceback.format_exception(error.value))
    assert "these weights (ckpt_path) have no trained segmenter: run distill" in message
    assert not (tmp_path / "out").exists()  # before any work


@pytest.mark.parametrize("method", ["gradcam", "cg_diff"])
def test_uncertainty_is_refused_where_a_method_has_none(method, trained, dataset_without_masks, tmp_path):
    command = infer(trained.weights, tmp_path / "out", dataset_without_masks, f"--method={method}")
    with pytest.raises(Exception) as error:  # noqa: B017
        monai_bundle(*command, "--uncertainty=True")
    message = "".join(traceback.format_exception(error.value))
    assert f"must be one of ['cdm', 'cg_cdm', 'segmenter', 'supervised']; got '{method}'" in message
    assert not (tmp_path / "out").exists()


def test_given_weights_get_statistics_and_inference_uses_them(distilled, dataset_without_masks, tmp_path):
    weights = shutil.copy(distilled.weights, tmp_path / "mine.pt")  # without a list of cases: all four count
    where = ["--config_file", config("brats_flair", "inference"), "--dataset_dir", dataset_without_masks, *TINY]
    where += ["--ckpt_path", weights, "--segmenter_size=64"]
    monai_bundle("run", "statistics", *where)
    written = json.loads((tmp_path / "mine.statistics.json").read_text())
    assert len(written["volumes"]) == 4
    assert written["proportions"] == pytest.approx([48 / 40] * 2, rel=0.15)  # of `head`, in pixels and in mm
    monai_bundle("run", *where, "--section=test", "--output_dir", tmp_path)
    facts = json.loads((tmp_path / "p3_flair" / "p3_flair_provenance.json").read_text())
    assert facts["unlike_contrast"] < 0.05 and facts["unlike_proportions"] <= 1  # it is one of the four
