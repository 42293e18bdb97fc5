"""The upper bound: masks that follow their image, and a run that learns, resumes and stays apart."""

from __future__ import annotations

import os
import re
import traceback

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, SpatialCropd

from custom_modules.methods.segmenter import SegmentationStep, UpperBound
from custom_modules.networks.weights import training_cases
from custom_modules.training.slices import SliceDataset
from custom_modules.training.supervised import LoadMaskd
from tests.helpers.bundles import BUNDLES, LPS, REPO, config, monai_bundle, save_nifti
from tests.helpers.series import save_chaos

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
TINY = (
    "--network_def#features=[8,8,8,8,8,8] --network_def#norm_num_groups=4 "
    "--segmenter_size=32 --batch_size=4 --device=cpu --logging_file=False"
).split()


def files(bundle: str, *more: str) -> str:
    return str([config(bundle, "train"), config(bundle, "train_supervised"), *more])


def parser(bundle: str, **knobs) -> ConfigParser:
    content = ConfigParser(ConfigParser.load_config_files([REPO / f for f in eval(files(bundle))]))
    content.update(knobs)
    return content


# ---- masks


def two_blocks() -> tuple[np.ndarray, np.ndarray]:
    """An image (48, 40, 6) whose bright blocks are labels 1 and 2; no axis is symmetric."""
    label = np.zeros((48, 40, 6), np.uint8)
    label[10:20, 8:16, 1:3], label[30:36, 20:32, 3:5] = 1, 2
    tissue = np.zeros(label.shape, np.float32)
    tissue[4:44, 4:36] = 100
    return tissue + 100 * (label > 0), label


def case(folder, codes: str = "LPS") -> dict:
    """`two_blocks` stored in the order `codes`, as `labelled_cases` lists it."""
    turn = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(order) for order in ("LPS", codes)))
    paths = []
    for name, array in zip(("image", "label"), two_blocks()):
        stored = nib.Nifti1Image(array, LPS).as_reoriented(turn)
        paths.append(str(save_nifti(np.asarray(stored.dataobj), folder / f"{name}.nii.gz", stored.affine)))
    return {"case": "p7", "image": paths[0], "image_file": paths[0], "label_file": paths[1]}


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP", "PIR"])
@pytest.mark.parametrize(("target_labels", "values"), [([], (1, 2)), ([2], (2,))])
def test_the_mask_is_turned_and_cropped_with_its_image(tmp_path, codes, target_labels, values):
    prepare = Compose([
        LoadImaged(keys="image"),
        EnsureChannelFirstd(keys="image"),
        Orientationd(keys="image", axcodes="LPS", labels=None),
        SpatialCropd(keys="image", roi_start=[9, 2, 1], roi_end=[40, 33, 6]),
        LoadMaskd(target_labels=target_labels),
    ])  # fmt: skip
    out = prepare(case(tmp_path, codes))
    _, label = two_blocks()
    assert out["label"].dtype == torch.float32 and out["label"].shape == out["image"].shape == (1, 31, 31, 5)
    assert np.array_equal(out["label"][0].numpy(), np.isin(label, values)[9:40, 2:33, 1:6])


@each_bundle
def test_the_mask_is_resized_with_its_image(bundle, tmp_path):
    """Through the bundle's own preprocessing the blocks are where the image is bright, up to their rim."""
    prepared = parser(bundle, target_labels=[]).get_parsed_content("preprocessing")(case(tmp_path, "PIR"))
    label, image = prepared["label"][0].as_tensor() > 0, prepared["image"][0].as_tensor()
    bright = image > (image[~label & (image > -0.9)].median() + image[label].median()) / 2
    assert label.shape == (128, 128, 6) and prepared["label"].unique().tolist() == [0, 1]
    dice = 2 * (label & bright).sum() / (label.sum() + bright.sum())
    assert dice > 0.98  # shifted by one pixel: below 0.97


def test_the_mask_of_a_dicom_series_comes_from_its_pngs(tmp_path):
    save_chaos(tmp_path, descending=True)
    where = {"image_file": str(tmp_path / "DICOM_anon"), "label_file": str(tmp_path / "Ground")}
    prepare = Compose([
        LoadImaged(keys="image"),
        EnsureChannelFirstd(keys="image"),
        Orientationd(keys="image", axcodes="LPS", labels=None),
        LoadMaskd(target_labels=[63, 126]),  # the one pixel of each slice in which the image is above 0
    ])  # fmt: skip
    out = prepare({"case": "c1", "image": where["image_file"], **where})
    assert torch.equal(out["label"].as_tensor() > 0, out["image"].as_tensor() > 0) and out["label"].sum() == 3
    kidney = LoadMaskd(target_labels=[126])({"case": "c1", "image": out["image"], **where})["label"]
    assert torch.equal(kidney.as_tensor() > 0, out["image"].as_tensor() == 1)  # the first name


def test_a_mask_of_another_shape_is_an_error(tmp_path):
    item = case(tmp_path)
    save_nifti(np.zeros((48, 40, 5), np.uint8), tmp_path / "label.nii.gz")
    with pytest.raises(ValueError, match=r"'p7': the label's shape \(48, 40, 5\) differs from .* \(48, 40, 6\)"):
        LoadMaskd()(item | {"image": MetaTensor(torch.zeros(1, 48, 40, 6))})


@each_bundle
def test_the_label_only_training_reads_no_mask(bundle, dataset):
    """It names nothing of this file, its cases carry no path of a mask, and its slices have none."""
    label_only = ConfigParser(ConfigParser.load_config_file(REPO / config(bundle, "train")))
    assert "supervised" not in str(label_only.get())
    label_only.update({"dataset_dir": str(dataset), "output_dir": "unused", "cache_dir": None})
    for key in ("training_cases", "validation_cases"):
        assert not any("_seg" in str(item) or "label_file" in item for item in label_only.get_parsed_content(key))
    assert label_only.get_parsed_content("train#dataset").labels is None


# ---- training


def train(dataset, folder, *more, config_file=None) -> list:
    where = ["--dataset_dir", dataset, "--output_dir", folder / "runs", "--ckpt_dir", folder / "models"]
    return ["run", "training", "--config_file", config_file or files("brats_flair"), *where, *TINY, *more]


def dice_of(weights, dataset, section: str) -> float:
    """Dice of the probability at 0.5 over the positive slices of a section, at the network's size."""
    content = parser("brats_flair", dataset_dir=str(dataset), segmenter_size=32, cache_dir=None)
    content["training_cases#section"] = section
    content["network_def#features"], content["network_def#norm_num_groups"] = [8] * 6, 4
    slices = SliceDataset(content.get_parsed_content("training_cases"), content.get_parsed_content("preprocessing"))
    method = UpperBound(content.get_parsed_content("network_def"), weights)
    pred = method(slices.images.float(), None, range(len(slices))) > 0.5
    label, positive = slices.labels > 0, slices.tags > 0
    both = (pred & label)[positive].sum() * 2
    return float(both / (pred[positive].sum() + label[positive].sum()))


def test_it_learns_the_lesions_of_heads_it_has_not_seen(dataset, tmp_path):
    plain = "--train#trainer#prepare_batch#augmentation=$None"  # it is made for thousands of iterations
    settings = "--max_epochs=6 --epoch_length=25 --segmenter_lr=0.01 --ema_decay=0.9 --val_interval=2".split()
    monai_bundle(*train(dataset, tmp_path, plain, *settings))
    assert dice_of(tmp_path / "models" / "supervised.pt", dataset, "test") > 0.8  # all pixels: about 0.1
    assert any(b"val_slice_dice" in path.read_bytes() for path in (tmp_path / "runs").glob("events.out.*"))

    state = torch.load(tmp_path / "models" / "supervised.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert training_cases(tmp_path / "models" / "supervised.pt") == ["p0", "p1"]
    written = sorted(str(path.relative_to(tmp_path / "models")) for path in (tmp_path / "models").rglob("*.*"))
    assert written == [
        "supervised.pt",
        "supervised.training.txt",
        "supervised/checkpoint_epoch=5.pt",
        "supervised/checkpoint_epoch=6.pt",
    ]


def test_it_leaves_the_label_only_run_in_the_same_folder_alone(dataset, trained, tmp_path):
    (tmp_path / "models").mkdir()
    before = {path.name: path.read_bytes() for path in trained.ckpt_dir.glob("*.*")}
    for name, content in before.items():
        (tmp_path / "models" / name).write_bytes(content)
    monai_bundle(*train(dataset, tmp_path, "--max_epochs=1", "--epoch_length=1"))
    assert (tmp_path / "models" / "supervised.pt").is_file()  # it did not take the other's two epochs for its own
    assert {path.name: path.read_bytes() for path in (tmp_path / "models").glob("*.*") if path.name in before} == before


def test_a_stopped_run_continues_as_if_it_had_not_been(dataset, tmp_path, monkeypatch):
    def stop(*_):
        raise RuntimeError("stopped")

    short = ["--max_epochs=2", "--epoch_length=2"]
    monai_bundle(*train(dataset, tmp_path / "whole", *short))
    kill = tmp_path / "kill.yaml"  # in the middle of the second epoch
    kill.write_text("+train#handlers:\n  - {_target_: tests.helpers.bundles.Kill, iteration: 3}\n")
    command = train(dataset, tmp_path / "parts", *short, config_file=files("brats_flair", str(kill)))
    with monkeypatch.context() as patch, pytest.raises(Exception) as error:  # noqa: B017
        patch.setattr(os, "kill", stop)  # in this process: a real kill is tested in test_distill.py
        monai_bundle(*command)
    assert "stopped" in "".join(traceback.format_exception(error.value))
    monai_bundle(*train(dataset, tmp_path / "parts", *short))
    whole, parts = (torch.load(tmp_path / name / "models" / "supervised.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and [k for k in whole if not torch.equal(whole[k], parts[k])] == []


def test_without_masks_it_says_so(dataset_without_masks, tmp_path):
    with pytest.raises(Exception) as error:  # noqa: B017
        monai_bundle(*train(dataset_without_masks, tmp_path))
    assert re.search("none of the 2 cases .* has a label", "".join(traceback.format_exception(error.value)))


@each_bundle
def test_the_overlay_is_a_training_workflow_on_one_device_and_on_several(bundle, dataset, tmp_path):
    where = {"bundle_root": REPO / "bundles" / bundle, "dataset_dir": dataset, "output_dir": tmp_path}
    overrides = {name: str(path) for name, path in where.items()} | {"ckpt_dir": str(tmp_path), "segmenter_size": 32}
    paths = [str(REPO / f) for f in eval(files(bundle))]
    workflow = ConfigWorkflow(paths, workflow_type="train", **overrides)
    workflow.initialize()
    assert workflow.check_properties() == []
    several = ConfigParser.load_config_files([*paths, REPO / config(bundle, "multi_gpu_train")])
    assert several["train"]["trainer"]["network"]["model"] == "@training_step"
    assert several["training_step"]["_target_"].endswith("SegmentationStep")


# ---- the network


@each_bundle
def test_the_network_is_small(bundle):
    network = parser(bundle).get_parsed_content("network_def")
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert 1e6 < weights < 2e6  # at 2 bytes each
    step = SegmentationStep(network)
    logits = step(torch.zeros(2, 1, 64, 64))
    assert logits.shape == (2, 1, 64, 64) and logits.dtype == torch.float32
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # or several devices would wait
