"""Shared by the tests: heads of a few voxels with a bright lesion, and `monai.bundle` runs of tiny networks on them."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from scipy import ndimage

from packing.pack import pack

REPO = Path(__file__).resolve().parents[1]
BUNDLES = ("brats_flair", "chaos_kidney")
SHAPE = (48, 40, 6)
TAGS = [0, 0, 1, 1, 0, 0]  # slices of `head` that show the lesion
LPS = np.diag([-1.0, -1.0, 4.0, 1.0])
TINY = (  # a network of a few thousand weights, on the CPU wherever the tests run; logging stays pytest's
    "--network_def#denoiser#channels=[8,8,8] --network_def#denoiser#num_head_channels=8 "
    "--network_def#classifier#channels=[8,8,8] --network_def#classifier#num_head_channels=8 "
    "--network_def#denoiser#norm_num_groups=4 --network_def#classifier#norm_num_groups=4 "  # 8 would cancel the label
    "--network_def#segmenter#features=[8,8,8,8,8,8] --network_def#segmenter#norm_num_groups=4 "
    "--image_size=32 --batch_size=4 --device=cpu --logging_file=False"
).split()
SHORT = ["--epoch_length=2", "--max_epochs=2"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny arrays gain nothing from threads, and sums in another order would differ between processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def config(bundle: str, name: str) -> str:
    return f"bundles/{bundle}/configs/{name}.yaml"


def monai_bundle(*arguments, cwd: Path = REPO) -> None:
    """`python -m monai.bundle *arguments` without the seconds that a new process takes to start."""
    argv, path = ["monai.bundle", *map(str, arguments)], list(sys.path)
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", path):
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def monai_bundle_process(*arguments, cwd: Path = REPO) -> subprocess.CompletedProcess:
    """`python -m monai.bundle *arguments` as a user types it; stdout and stderr come back together."""
    command = [sys.executable, "-m", "monai.bundle", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=cwd, env=environment, encoding="utf-8", timeout=300, **streams)


class Kill:
    """Handler that ends its own process by SIGKILL after an iteration; a config names it `tests.conftest.Kill`."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        last = Events.ITERATION_COMPLETED(once=self.iteration)
        engine.add_event_handler(last, lambda: os.kill(os.getpid(), signal.SIGKILL))


def head(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A stripped head (48, 40, 6) float32 with a bright lesion in the slices of `TAGS`, and its mask uint8."""
    random = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    tissue = ((x - 24) / 18) ** 2 + ((y - 20) / 15) ** 2 < 1
    centre = random.integers((18, 14), (30, 26))
    lesion = (np.hypot(x - centre[0], y - centre[1]) < 5) & np.array(TAGS, bool)[z]
    texture = ndimage.gaussian_filter(random.normal(size=SHAPE), 2) * 100
    return (tissue * (100 + texture + 80 * lesion)).astype(np.float32), lesion.astype(np.uint8)


def save_nifti(array: np.ndarray, path: Path, affine: np.ndarray = LPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def _write_dataset(root: Path, with_masks: bool) -> Path:
    """Four heads in BraTS's layout and two datalists: `datalist.json` names masks, `tags_only.json` does not."""
    items = []
    for seed, case in enumerate(("p0", "p1", "p2", "p3")):
        image, lesion = head(seed)
        save_nifti(image, root / case / f"{case}_flair.nii.gz")
        if with_masks:
            save_nifti(lesion, root / case / f"{case}_seg.nii.gz")
        item = {"case": case, "image": f"{case}/{case}_flair.nii.gz", "slice_labels": TAGS}
        items.append(item | {"label": f"{case}/{case}_seg.nii.gz"})
    for name, keys in (("datalist", {"label"}), ("tags_only", set())):
        kept = [{k: v for k, v in item.items() if k != "label" or k in keys} for item in items]
        split = {"training": kept[:2], "validation": kept[2:3], "test": kept[3:]}
        (root / f"{name}.json").write_text(json.dumps(split))
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Folder of four labelled cases: p0, p1 for training, p2 for validation, p3 for test."""
    return _write_dataset(tmp_path_factory.mktemp("dataset"), with_masks=True)


@pytest.fixture(scope="session")
def dataset_without_masks(tmp_path_factory) -> Path:
    """The same cases with every mask file deleted, though `datalist.json` still names them."""
    return _write_dataset(tmp_path_factory.mktemp("without_masks"), with_masks=False)


@pytest.fixture(scope="session")
def trained(dataset_without_masks, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted training of two epochs on `dataset_without_masks`: folder, ckpt_dir and the weights."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["--config_file", config("brats_flair", "train"), "--dataset_dir", dataset_without_masks]
    where = ["--output_dir", folder / "runs", "--ckpt_dir", folder / "models"]
    monai_bundle("run", "training", *arguments, *where, *TINY, *SHORT)
    return SimpleNamespace(folder=folder, ckpt_dir=folder / "models", weights=folder / "models" / "model.pt")


@pytest.fixture(scope="session")
def packed_bundles(tmp_path_factory) -> dict[str, Path]:
    """Folder of each packed bundle, read only; the zips and their checksums lie beside it."""
    return pack(tmp_path_factory.mktemp("dist"), export_dir=tmp_path_factory.mktemp("no_exports"))


@pytest.fixture(scope="session")
def odd_volumes(tmp_path_factory) -> SimpleNamespace:
    """Folder of one head in five geometries (`good`) and of files that hold no volume (`bad`: why, as a regex)."""
    folder = tmp_path_factory.mktemp("odd_volumes")
    image, _ = head()
    lps = nib.Nifti1Image(image, LPS)
    turn = np.eye(4)
    turn[:2, :2] = [[0.98, -0.2], [0.2, 0.98]]
    good = {
        "lps": lps,
        "ras": nib.as_closest_canonical(lps),
        "permuted": lps.as_reoriented([[2, 1], [0, -1], [1, 1]]),
        "anisotropic": nib.Nifti1Image(image.astype(np.int16), turn @ np.diag([0.7, 1.3, 6.5, 1])),
        "one_slice": nib.Nifti1Image(image[..., 2:3], LPS),
    }
    for name, volume in good.items():
        nib.save(volume, folder / f"{name}.nii.gz")
    with_nan = image.copy()
    with_nan[24, 20, 3] = np.nan
    save_nifti(np.stack([image, image], axis=3), folder / "four_d.nii.gz")
    save_nifti(with_nan, folder / "nan.nii.gz")
    save_nifti(np.full(SHAPE, 7, np.int16), folder / "constant.nii.gz")
    save_nifti(image[..., 2], folder / "two_d.nii.gz")
    packed = gzip.compress(lps.to_bytes())
    (folder / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    bad = {
        "four_d": "4D with 2 channels",
        "nan": "1 NaN or infinite voxels",
        "constant": "constant",
        "two_d": "must be one 3D volume; got 2 dimensions",
        "truncated": "EOFError|[Cc]ompressed|ended before",
    }
    return SimpleNamespace(folder=folder, good=sorted(good), bad=bad)
