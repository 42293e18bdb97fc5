"""The demo: its synthetic head is a fair test, and its script reports what the bundle wrote."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_otsu

from custom_modules.inference.body import body_mask
from examples import demo
from examples.phantom import head_phantom

PRINTED = ("volume", "mask", "saliency", "report", "provenance", "overlay")


@pytest.fixture(scope="module")
def head():
    return head_phantom(seed=4)


@pytest.fixture
def quick_head(head, monkeypatch):
    monkeypatch.setattr(demo, "head_phantom", lambda seed: head)
    return head


def test_head_has_the_format_of_the_training_data(head):
    image, lesion = head
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.array_equal(image.affine, lesion.affine) and image.shape == lesion.shape == (256, 256, 32)
    assert image.get_data_dtype() == lesion.get_data_dtype() == np.uint8
    tagged = np.asarray(lesion.dataobj).any((0, 1))
    assert 6 <= tagged.sum() <= 16  # both kinds of slices, the lesion in one run of them
    assert np.diff(tagged.astype(int)).tolist().count(1) == 1
    assert ndimage.label(np.asarray(lesion.dataobj))[1] == 1


def test_intensity_alone_does_not_find_the_lesion(head):
    image, lesion = (np.asarray(volume.dataobj) for volume in head)
    inside = body_mask(image.astype(np.float32), erosion=8)
    as_bright = inside & (lesion == 0) & (image >= np.median(image[lesion > 0]))
    assert as_bright.sum() > lesion.sum()  # healthy voxels as bright as the lesion outnumber it

    bright = inside & (image > threshold_otsu(image[inside]))
    labels, _ = ndimage.label(bright)
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    assert demo.slice_dice(largest.astype(np.uint8), lesion) < 0.4


def fake_bundle(truth, calls, affine=None):
    """Stands for the bundle: the true mask for the default method, nothing for `intensity`."""

    def run(command, cwd):
        calls.append(command)
        folder = Path(command[command.index("--output_dir") + 1]) / demo.STEM
        folder.mkdir(parents=True)
        mask = np.asarray(truth.dataobj) * ("intensity" not in command)
        affine_ = truth.affine if affine is None else affine
        nib.save(nib.Nifti1Image(mask, affine_), folder / f"{demo.STEM}_mask.nii.gz")
        nib.save(nib.Nifti1Image(mask.astype(np.float32), affine_), folder / f"{demo.STEM}_saliency.nii.gz")
        (folder / f"{demo.STEM}.json").write_text("{}")
        (folder.parent / "report.html").write_text("<!doctype html>")
        return SimpleNamespace(returncode=0)

    return run


def test_demo_reports_files_and_dice(quick_head, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "run", fake_bundle(quick_head[1], calls))
    demo.main(["--output_dir", str(tmp_path), "--method", "cg_cdm"])

    assert calls[0][-2:] == ["--method", "cg_cdm"] and calls[1][-2:] == ["--method", "intensity"]
    printed = capsys.readouterr().out
    files = [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.split(" ")[0] in PRINTED]
    assert len(files) == len(PRINTED) and all(Path(file).stat().st_size for file in files)
    assert "bundle                          1.000" in printed  # the true mask
    assert "intensity Otsu inside the head  0.000" in printed  # an empty mask


def test_demo_stops_when_the_bundle_fails(quick_head, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, cwd: SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit, match="exit status 3"):
        demo.main(["--output_dir", str(tmp_path)])


def test_demo_stops_when_the_geometry_is_wrong(quick_head, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_bundle(quick_head[1], [], affine=np.eye(4)))
    with pytest.raises(ValueError, match="shape and affine"):
        demo.main(["--output_dir", str(tmp_path)])
