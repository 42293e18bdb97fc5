"""A result file is whole or absent, and what stood there before survives a failed write."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import SaveImage

from custom_modules.files import DAY, atomic_path, remove_partial, write_json
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


def test_json_is_written_with_its_folder(tmp_path):
    write_json(tmp_path / "a" / "b" / "facts.json", {"seed": 0, "name": "p1"})
    text = (tmp_path / "a" / "b" / "facts.json").read_text()
    assert json.loads(text) == {"seed": 0, "name": "p1"} and text.endswith("}\n")
    assert os.listdir(tmp_path / "a" / "b") == ["facts.json"]


@pytest.mark.parametrize("step", ["content", "rename"])
def test_failed_json_leaves_the_old_one(tmp_path, monkeypatch, step):
    path = tmp_path / "facts.json"
    write_json(path, {"seed": 0})

    def fail(*_):
        raise OSError("No space left on device")

    if step == "rename":  # what was written aside has to go
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, TypeError)):
        write_json(path, {"seed": object() if step == "content" else 1})
    assert os.listdir(tmp_path) == ["facts.json"] and json.loads(path.read_text()) == {"seed": 0}


def test_only_old_remains_are_removed(tmp_path, monkeypatch):
    for name, age in ((".partial-1-mask.nii.gz", 1.1 * DAY), (".partial-2-mask.nii.gz", 0.9 * DAY), ("mask", 9 * DAY)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".partial-2-mask.nii.gz", "mask"], "another job may still write the second"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / ".partial-3-mask"])  # gone since it was listed
    remove_partial(tmp_path)


def test_a_write_whose_file_is_gone_afterwards_is_well(tmp_path):
    with atomic_path(tmp_path / "facts.json") as aside:
        aside.write_text("{}")
    assert os.listdir(tmp_path) == ["facts.json"]
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "facts.json") as aside:
        pass  # and one whose file was never there says so
    assert (tmp_path / "facts.json").read_text() == "{}"
