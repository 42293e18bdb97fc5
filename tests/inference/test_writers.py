"""A NIfTI file is whole or absent, an earlier one survives a failed write, and a slice stays a volume."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import SaveImage

from custom_modules.inference.writers import AtomicNibabelWriter

AFFINE = np.diag([-0.7, -1.3, 6.0, 1.0])


def writer(value: int = 1) -> AtomicNibabelWriter:
    filled = AtomicNibabelWriter(output_dtype=np.uint8)
    filled.set_data_array(np.full((4, 3, 2), value), channel_dim=None)
    filled.set_metadata({"affine": AFFINE}, resample=False)
    return filled


def half_written(image, filename) -> None:
    """A write that breaks off: some bytes, then a full disk."""
    with open(filename, "wb") as file:
        file.write(b"half")
    raise OSError("No space left on device")


def test_a_volume_is_written_whole(tmp_path):
    writer().write(tmp_path / "mask.nii.gz")
    image = nib.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj), np.ones((4, 3, 2))) and image.get_data_dtype() == np.uint8
    np.testing.assert_allclose(image.affine, AFFINE)
    assert os.listdir(tmp_path) == ["mask.nii.gz"]


def test_a_new_volume_replaces_the_old(tmp_path):
    for value in (1, 7):
        writer(value).write(str(tmp_path / "mask.nii.gz"))
    assert np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj).max() == 7


def test_run_lengths_lose_nothing_and_are_small(tmp_path):
    """A map: zeros, and values in 1 of 8 voxels; gzip by name and by content."""
    values = np.zeros((32, 32, 32), np.float32)
    values[:16, :16, :16] = np.random.default_rng(0).random((16, 16, 16))
    image = MetaTensor(values[None], affine=AFFINE, meta={"filename_or_obj": "case.nii.gz"})
    for _ in range(2):
        SaveImage(tmp_path, "map", resample=False, writer=AtomicNibabelWriter, print_log=False)(image)
    written = tmp_path / "case" / "case_map.nii.gz"
    assert np.array_equal(np.asarray(nib.load(written).dataobj), values)
    assert written.stat().st_size < values.nbytes / 7


def test_a_failed_volume_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(nib, "save", half_written)
    with pytest.raises(OSError, match="No space left"):
        writer().write(tmp_path / "mask.nii.gz")
    assert os.listdir(tmp_path) == []


def test_a_failed_volume_leaves_the_old_one(tmp_path, monkeypatch):
    writer(3).write(tmp_path / "mask.nii.gz")
    before = (tmp_path / "mask.nii.gz").read_bytes()
    monkeypatch.setattr(nib, "save", half_written)
    with pytest.raises(OSError, match="No space left"):
        writer(4).write(tmp_path / "mask.nii.gz")
    assert os.listdir(tmp_path) == ["mask.nii.gz"]
    assert (tmp_path / "mask.nii.gz").read_bytes() == before


def test_monai_saves_through_it(tmp_path):
    image = MetaTensor(np.ones((1, 4, 3, 2)), affine=AFFINE, meta={"filename_or_obj": "case.nii.gz"})
    SaveImage(tmp_path, "mask", resample=False, writer=AtomicNibabelWriter, print_log=False)(image)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["case_mask.nii.gz"]


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 1, 1), (1, 3, 2)])
def test_a_slice_stays_a_volume(tmp_path, shape):
    image = MetaTensor(np.ones((1, *shape)), affine=AFFINE, meta={"filename_or_obj": "case.nii.gz"})
    SaveImage(tmp_path, "mask", resample=False, writer=AtomicNibabelWriter, print_log=False)(image)
    written = nib.load(tmp_path / "case" / "case_mask.nii.gz")
    assert written.shape == shape
    np.testing.assert_allclose(written.affine, AFFINE)
