"""MONAI Label 0.8.5 serves both packed bundles: the masks are those of the command line, and slice tags train it.

A real server in an environment of its own; `-s` shows its answers. The tests run in order on one server.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from examples.phantom import head_phantom
from tests.helpers.bundles import REPO, config, monai_bundle_process
from tests.toolchains.monai_label.server import Server, serve

HERE = Path(__file__).parent
IMAGES = {"brats_flair": "head0", "chaos_kidney": "abdomen"}
HEAD_TAGS = [int(12 <= i < 24) for i in range(32)]


def abdomen() -> nib.Nifti1Image:
    """A trunk with a liver, a spine and two bright kidneys (128, 104, 20) int16, stored R, A, S and a little turned."""
    shape = (128, 104, 20)
    at = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")

    def inside(centre, radii):
        return sum(((a - c) / r) ** 2 for a, c, r in zip(at, centre, radii)) < 1

    image = 110.0 * inside((0, 0, 0), (0.92, 0.88, 9))
    image[inside((0, -0.05, 0), (0.8, 0.75, 9))] = 60
    image[inside((-0.38, -0.2, 0.2), (0.4, 0.5, 0.9))] = 75
    image[inside((0, 0.45, 0), (0.14, 0.17, 9))] = 35
    for side in (-0.42, 0.42):
        image[inside((side, 0.32, -0.1), (0.16, 0.2, 0.6))] = 190
    image = ndimage.gaussian_filter(image, (1, 1, 0.4))
    image += np.random.default_rng(0).normal(0, 3, shape) * (image > 0)
    affine = np.diag([-2.8, -2.8, 8.0, 1.0])
    affine[:2, :2] = np.array([[0.995, -0.0998], [0.0998, 0.995]]) @ affine[:2, :2]
    affine[:3, 3] = 170, 140, -90
    return nib.as_closest_canonical(nib.Nifti1Image(image.clip(0).astype(np.int16), affine))


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for seed in (0, 1):
        nib.save(head_phantom(seed)[0], folder / f"head{seed}.nii.gz")
    nib.save(abdomen(), folder / "abdomen.nii.gz")
    return folder


@pytest.fixture(scope="module")
def server(toolchain_env, packed_bundles, studies, tmp_path_factory) -> Server:
    requirements = ["-r", str(HERE / "requirements.txt")]
    without_dependencies = ["--no-deps", "-r", str(HERE / "requirements-no-deps.txt")]
    python = toolchain_env("monai_label", requirements, without_dependencies)
    with serve(python, packed_bundles, studies, tmp_path_factory.mktemp("app")) as running:
        yield running


def by_command_line(bundle: str, image: Path, output_dir: Path, *knobs) -> nib.Nifti1Image:
    where = ["--dataset_dir", image, "--output_dir", output_dir]
    done = monai_bundle_process("run", "--config_file", REPO / config(bundle, "inference"), *where, *knobs)
    assert done.returncode == 0, done.stdout
    stem = image.name.removesuffix(".nii.gz")
    return nib.load(output_dir / stem / f"{stem}_mask.nii.gz")


def by_server(server: Server, bundle: str, folder: Path) -> nib.Nifti1Image:
    start = time.perf_counter()
    params, mask = server.infer(bundle, IMAGES[bundle])
    print(f"POST /infer/{bundle}?image={IMAGES[bundle]}: {time.perf_counter() - start:.1f} s", json.dumps(params))
    file = folder / f"{bundle}.nii.gz"
    file.write_bytes(mask)
    return nib.load(file)


def assert_same(mask: nib.Nifti1Image, wanted: nib.Nifti1Image) -> None:
    a, b = (np.asanyarray(volume.dataobj) for volume in (mask, wanted))
    print(f"voxels in the mask: {np.count_nonzero(a)}, different: {np.count_nonzero(a != b)}; shape {a.shape}")
    assert a.shape == b.shape and (a == b).all()
    np.testing.assert_allclose(mask.affine, wanted.affine, rtol=0, atol=1e-4)


def test_the_server_offers_both_bundles(server):
    info = server.get("/info/")
    for kind in ("models", "trainers"):
        for entry in info[kind].values():
            entry["description"] = entry["description"].split(".")[0]
    print("GET /info/", json.dumps(info))
    assert {name: model["labels"] for name, model in info["models"].items()} == {
        "brats_flair": {"tumour": 1},
        "chaos_kidney": {"kidney": 1},
    }
    assert info["trainers"].keys() == info["models"].keys() and info["datastore"]["total"] == 3


@pytest.mark.parametrize("bundle", IMAGES)
def test_masks_are_those_of_the_command_line(bundle, server, studies, tmp_path):
    mask = by_server(server, bundle, tmp_path)
    assert_same(mask, by_command_line(bundle, studies / f"{IMAGES[bundle]}.nii.gz", tmp_path / "out"))
    assert mask.get_fdata().any()
    start = time.perf_counter()
    by_server(server, bundle, tmp_path)
    assert time.perf_counter() - start < 60  # seconds, the network being loaded; a slow default blocks the server


def test_a_request_chooses_the_method(server, studies, tmp_path):
    offered = server.get("/info/")["models"]["brats_flair"]["config"]["method"]
    assert offered[0] == "segmenter" and {"cdm", "intensity"} < set(offered)
    file = tmp_path / "intensity.nii.gz"
    file.write_bytes(server.infer("brats_flair", "head0", method="intensity")[1])
    wanted = by_command_line("brats_flair", studies / "head0.nii.gz", tmp_path / "out", "--method=intensity")
    assert_same(nib.load(file), wanted)
    with pytest.raises(AssertionError, match="500"):
        server.infer("brats_flair", "head0", method="intensty")
    server.get("/info/")
    assert "method must be one of" in server.log
    by_server(server, "brats_flair", tmp_path)  # the default again


def test_weights_of_another_network_are_refused(server):
    with pytest.raises(AssertionError, match="500"):
        server.infer("brats_flair", "head0", model_filename="supervised.pt")
    server.get("/info/")  # the server logs an error after its answer
    assert "was it trained with another network_def?" in server.log


def knobs_of_training(server: Server, bundle: str, **knobs) -> None:
    """Sets knobs as docs/monai_label.md tells: in the train.json of the server's copy of the bundle."""
    file = server.models / bundle / "configs" / "train.json"
    content = json.loads(file.read_text())
    assert knobs.keys() <= content.keys()
    file.write_text(json.dumps(content | knobs))


def tags_file(folder: Path, tags: list[int]) -> Path:
    file = folder / "tags.json"
    file.write_text(json.dumps({"slice_labels": tags}))
    return file


def train(server: Server, bundle: str, **request) -> dict:
    knobs_of_training(server, bundle, epoch_length=2, segmenter_epochs=3)
    task = server.train(bundle, max_epochs=4, **request)
    print(f"POST /train/{bundle}", *task["details"], f"status: {task['status']}", sep="\n  ")
    return task


def test_a_mask_is_no_label(server, tmp_path):
    mask = tmp_path / "mask.nii.gz"
    nib.save(head_phantom(1)[1], mask)
    server.save_label("head0", tags_file(tmp_path, HEAD_TAGS))
    server.save_label("head1", mask)
    task = train(server, "brats_flair")
    log = server.log  # the details are the last 20 lines of MONAI's own chain of errors
    assert task["status"] == "ERROR"
    print(*(line for line in log.splitlines() if "slice tags" in line), sep="\n")
    assert "head1: it is not a JSON file" in log and 'Save {"slice_labels": [0, 1' in log
    server.call("DELETE", "/datastore/label?id=head1&tag=final")
    deadline = time.monotonic() + 30  # the server watches the folder and follows it after a moment
    while len(listed := server.get("/datastore/?output=train")) > 1 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [Path(case["label"]).name for case in listed] == ["head0.json"]


def test_tags_train_on_and_the_next_mask_shows_it(server, studies, tmp_path):
    for image in ("head0", "head1"):
        print(f"PUT /datastore/label?image={image}", server.save_label(image, tags_file(tmp_path, HEAD_TAGS)))
    weights = server.models / "brats_flair" / "models" / "model.pt"
    trained_on = weights.with_suffix(".training.txt")
    before, cases = torch.load(weights, weights_only=True), trained_on.read_text()
    task = train(server, "brats_flair", val_split=0.5)
    assert task["status"] == "DONE" and "val_classifier_auc" in server.log and "epoch 4 of 4: loss" in server.log
    after = torch.load(weights, weights_only=True)
    moved = {name: (after[name].float() - before[name].float()).abs().max().item() for name in before}
    student = max(change for name, change in moved.items() if name.startswith("segmenter"))
    others = max(change for name, change in moved.items() if not name.startswith("segmenter"))
    assert 0 < others < 0.01 < student  # eight iterations of a warm-up, from the weights that were there; a new student
    assert after["distilled"] == 1 and "stage 3 of 3" in server.log
    assert len(cases.split()) == 94 and trained_on.read_text() == cases + "head0\n"
    mask = by_server(server, "brats_flair", tmp_path)
    assert "Reload model from cache" in server.log
    wanted = by_command_line("brats_flair", studies / "head0.nii.gz", tmp_path / "out", "--ckpt_path", weights)
    assert_same(mask, wanted)


def test_a_second_training_from_scratch(server, studies, tmp_path):
    """Nothing of a run remains that would keep the next from learning."""
    weights = server.models / "brats_flair" / "models" / "model.pt"
    before = torch.load(weights, weights_only=True)
    task = train(server, "brats_flair", val_split=0, model_filename="none.pt")
    assert task["status"] == "DONE"
    after = torch.load(weights, weights_only=True)
    assert max((after[name].float() - before[name].float()).abs().max().item() for name in before) > 0.1
    assert not list(weights.parent.glob("checkpoint*"))
    (tmp_path / "new").mkdir()
    new = by_server(server, "brats_flair", tmp_path / "new")
    wanted = by_command_line("brats_flair", studies / "head0.nii.gz", tmp_path / "out", "--ckpt_path", weights)
    assert (new.get_fdata() == wanted.get_fdata()).all()
