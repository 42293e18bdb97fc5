"""Inference by the command, in processes as a user starts them: odd volumes, bad ones, three working directories."""

from __future__ import annotations

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.helpers.bundles import REPO, TAGS, config, failure, inference, monai_bundle_process


@pytest.fixture(scope="module")
def inferred(odd_volumes, trained, tmp_path_factory):
    """What the command wrote and printed, from the repository's root, for all odd volumes at once."""
    out = tmp_path_factory.mktemp("inferred")
    return out, monai_bundle_process(*inference("brats_flair", odd_volumes.folder, out, trained))


@pytest.mark.parametrize("name", ["lps", "ras", "permuted", "anisotropic", "one_slice"])
def test_results_stand_in_the_geometry_of_the_input(name, inferred, odd_volumes):
    out, process = inferred
    image = nib.load(odd_volumes.folder / f"{name}.nii.gz")
    assert sorted(path.name for path in (out / name).iterdir()) == [
        f"{name}_mask.nii.gz", f"{name}_provenance.json", f"{name}_saliency.nii.gz"
    ], process.stdout  # fmt: skip
    mask, saliency = (nib.load(out / name / f"{name}_{kind}.nii.gz") for kind in ("mask", "saliency"))
    assert (mask.get_data_dtype(), saliency.get_data_dtype()) == (np.uint8, np.float32)
    assert mask.shape == saliency.shape == image.shape
    assert np.allclose(mask.affine, image.affine, atol=1e-5) and np.allclose(saliency.affine, image.affine, atol=1e-5)
    mask, saliency = np.asarray(mask.dataobj), np.asarray(saliency.dataobj)
    assert set(np.unique(mask)) <= {0, 1} and np.isfinite(saliency).all()
    assert (saliency[mask == 1] > 0).all()

    report = json.loads((out / name / f"{name}_provenance.json").read_text())
    assert report["case"] == name and report["settings"]["num_steps"] == 2 and report["settings"]["seed"] == 0
    assert re.fullmatch("[0-9a-f]{64}", report["weights_sha256"]) and report["versions"]["torch"] == torch.__version__
    assert report["slices_processed"] == (1 if name == "one_slice" else len(TAGS))


@pytest.mark.parametrize("name", ["ras", "permuted"])
def test_the_order_on_disk_does_not_change_the_result(name, inferred):
    out, _ = inferred
    maps = [nib.load(out / n / f"{n}_saliency.nii.gz") for n in ("lps", name)]
    lps, other = (nib.as_closest_canonical(m).get_fdata() for m in maps)
    assert np.allclose(lps, other, atol=1e-3 * np.abs(lps).max())


def test_bad_cases_are_named_and_stop_nothing(inferred, odd_volumes):
    out, process = inferred
    assert process.returncode != 0
    total = len(odd_volumes.good) + len(odd_volumes.bad)
    summary = process.stdout.rpartition(f"{len(odd_volumes.bad)} of {total} cases failed:")[2]
    for name, why in odd_volumes.bad.items():
        assert re.search(rf"{name}: .*({why})", summary), process.stdout
    assert sorted(path.name for path in out.iterdir()) == [*odd_volumes.good, "report.html"]  # nothing is half there
    report = (out / "report.html").read_text(encoding="utf-8")
    assert f"{len(odd_volumes.good)} cases, {len(odd_volumes.bad)} failed" in report
    for name in (*odd_volumes.good, *odd_volumes.bad):
        assert f">{name}<" in report
    assert not list(out.rglob(".partial*"))


@pytest.mark.parametrize(
    ("bundle", "cwd"), [("brats_flair", REPO / "bundles" / "brats_flair"), ("chaos_kidney", None)], ids=["root", "else"]
)
def test_the_command_runs_from_any_folder(bundle, cwd, odd_volumes, trained, tmp_path):
    command = inference(bundle, odd_volumes.folder / "one_slice.nii.gz", tmp_path / "out", trained)
    weights = tmp_path / "model.pt"
    torch.save(torch.load(trained.weights), weights)  # saved anew, they do not say that they are brats_flair's
    command += ["--ckpt_path", weights]
    command[2] = "configs/inference.yaml" if cwd else REPO / config(bundle, "inference")
    process = monai_bundle_process(*command, cwd=cwd or tmp_path)
    assert process.returncode == 0, process.stdout
    assert (tmp_path / "out" / "one_slice" / "one_slice_mask.nii.gz").is_file()


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ("--method=cdn", r"method must be one of \[.*'cdm', 'cg_cdm'.*\]; got 'cdn'"),
        ("--gate=tag", r"gate must be one of \['classifier', 'tags', 'all'\]; got 'tag'"),
        ("--threshold=otzu", "threshold must be 'otsu', 'average_otsu' or a number; got 'otzu'"),
        ("--num_steps=500", r"num_steps \(R\) must be .*<= noise_level \(Q\); got R=500, Q=150"),
        ("--noise_level=1000", r"noise_level \(Q\) must be .*1\.\.999"),
        ("--tau=1", r"tau must be in \[0, 1\)"),
        ("--ckpt_path=nowhere.pt", r"ckpt_path 'nowhere.pt' does not exist; .*--ckpt_path"),
        ("--image_size=36", "image_size must be divisible by 8"),
        ("--noise_levl=300", "no knob 'noise_levl'; did you mean one of .*'noise_level'"),
        ("--methods#cdm#seeds=1", "seeds"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_is_right(knob, message, odd_volumes, trained, tmp_path):
    command = inference("brats_flair", odd_volumes.folder / "one_slice.nii.gz", tmp_path / "out", trained, knob)
    assert re.search(message, failure(command))
    assert not list(tmp_path.rglob("*.nii.gz"))
