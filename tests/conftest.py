"""Fixtures: a small data set, a trained network, packed bundles, odd volumes; each made once a session."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from packing.pack import pack
from tests.helpers.bundles import LPS, SHAPE, SHORT, TAGS, TINY, config, head, monai_bundle, save_nifti


def pytest_collection_modifyitems(config, items):
    if "long" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes many minutes: make test-long"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny arrays gain nothing from threads, and sums in another order would differ between processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


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
    """An uninterrupted training, two epochs a stage, on `dataset_without_masks`: folder, ckpt_dir and the weights,
    and those of the first stage alone (`teacher`)."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["--config_file", config("brats_flair", "train"), "--dataset_dir", dataset_without_masks]
    where = ["--output_dir", folder / "runs", "--ckpt_dir", folder / "models"]
    monai_bundle("run", "training", *arguments, *where, *TINY, *SHORT)
    (teacher,) = (folder / "models" / "distill").glob("*.pt")
    return SimpleNamespace(
        folder=folder, ckpt_dir=folder / "models", weights=folder / "models" / "model.pt", teacher=teacher
    )


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
