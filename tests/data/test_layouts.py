"""Layouts: the cases of each data set are found on disk, and named apart. Volumes of a few voxels."""

import os
import re

import numpy as np
import pytest

from custom_modules.data.datalist import check_cases
from custom_modules.data.geometry import read_geometry
from custom_modules.data.layouts import find_cases
from custom_modules.data.tags import tag_cases
from tests.helpers.series import save_chaos, save_series
from tests.helpers.volumes import SHAPE, brats_case, mask_of, named, save_volume


def test_brats_2023_names_and_unpacked_twins(tmp_path):
    name = "BraTS-GLI-00001-000"
    save_volume(tmp_path / name / f"{name}-t2f.nii.gz")
    save_volume(tmp_path / name / f"{name}-t2f.nii")  # the same volume, unpacked
    save_volume(tmp_path / name / f"{name}-seg.nii.gz")
    (item,) = find_cases(tmp_path)
    assert item["case"] == name and item["image"].endswith(".gz") and item["label"].endswith("-seg.nii.gz")


def test_msd_layout_reads_channel_zero(tmp_path):
    root = tmp_path / "Task01_BrainTumour"
    save_volume(root / "imagesTr/BRATS_001.nii.gz", np.zeros((*SHAPE, 4), np.int16))
    save_volume(root / "labelsTr/BRATS_001.nii.gz", mask_of([1, 0, 0, 0, 1], value=3))
    (root / "imagesTr/._BRATS_001.nii.gz").write_bytes(b"macOS")
    cases = find_cases(tmp_path)
    assert named(cases) == ["BRATS_001"] and cases[0]["channel"] == 0
    (item,) = tag_cases(cases)[0]
    assert item["slice_labels"] == [1, 0, 0, 0, 1]
    assert check_cases([item], with_label=True) == {"n_cases": 1, "n_slices": 5, "n_positive": 2}


def test_dicom_series_are_volumes_with_names_of_their_own(tmp_path):
    save_chaos(tmp_path / "ann", descending=False)
    save_chaos(tmp_path / "bob", descending=True)
    assert named(find_cases(tmp_path)) == ["ann_DICOM_anon", "bob_DICOM_anon"]
    assert named(find_cases(tmp_path / "ann/DICOM_anon")) == ["DICOM_anon"]  # the root is one volume


def test_dicom_exports_are_found_whatever_lies_beside_the_slices(tmp_path):
    """As from a disc: nested, without endings, with an index and a note; and a result of ours is no new case."""
    series = save_series(tmp_path / "DICOM/PA1/ST1/SE1", np.ones((4, 3, 2)))
    (series / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (series / "AREADME").write_text("not DICOM, and the first by name")
    save_series(tmp_path / "DICOM/PA2/ST1/SE1", np.ones((4, 3, 2)), names=["MR.1.2.840.1", "MR.1.2.840.2"])
    save_series(tmp_path / "out/SE1", np.ones((4, 3, 1)), names=["SE1_seg.dcm"])
    cases = find_cases(tmp_path)
    assert named(cases) == ["DICOM_PA1_ST1_SE1", "DICOM_PA2_ST1_SE1"]
    assert [read_geometry(item["image"])[0] for item in cases] == [(4, 3, 2)] * 2


def test_volumes_layout_globs_and_names_apart(tmp_path):
    for site in "AB":
        save_volume(tmp_path / site / "scan_t1.nii.gz")
    save_volume(tmp_path / "A/scan_seg.nii.gz", mask_of([0, 0, 0, 0, 1]))
    save_volume(tmp_path / "A/scan_t1_mask.nii.gz")  # output of an inference
    cases = find_cases(tmp_path)
    assert named(cases) == ["A_scan_t1", "B_scan_t1"]
    assert ["label" in item for item in cases] == [True, False]
    assert named(find_cases(tmp_path, glob="B/*.nii.gz")) == ["scan_t1"]
    assert named(find_cases(tmp_path / "B/scan_t1.nii.gz")) == ["scan_t1"]


def test_names_that_some_file_systems_take_for_one_are_told_apart(tmp_path):
    for name in (
        "A/Scan",
        "B/scan",
        "A/M\u00fcller",
        "B/Mu\u0308ller",
        "C/other",
    ):  # one code or two for the same letter
        save_volume(tmp_path / f"{name}.nii.gz")
    assert named(find_cases(tmp_path)) == ["A_M\u00fcller", "A_Scan", "B_Mu\u0308ller", "B_scan", "other"]


def test_one_brats_file_keeps_its_case_name(tmp_path):
    brats_case(tmp_path, "p1")
    (item,) = find_cases(tmp_path / "p1/p1_flair.nii.gz")
    assert item["case"] == "p1" and "label" in item


def test_find_cases_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="layout must be one of auto, brats"):
        find_cases(tmp_path, "bids")
    with pytest.raises(ValueError, match="DICOM series .one a folder.. Found: no file; convert them"):
        find_cases(tmp_path)
    for name in ("a.mha", "b.MHA", "x/c.mha", "x/notes.txt", "x/p1_seg.nii.gz", "README", ".hidden.mha"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = f"no volume found in {tmp_path} or below. Looked for: NIfTI files (.nii, .nii.gz), DICOM series (one a "
    found += "folder). Found: 3 .mha files, 1 .txt file, 1 file of labels or results (_seg, _mask, ...) and others; "
    with pytest.raises(ValueError, match=re.escape(found + "convert them to one of these.")):
        find_cases(tmp_path)
    with pytest.raises(ValueError, match=r"end in _flair or -t2f. Found: 3 .* others; choose another layout or --glob"):
        find_cases(tmp_path, "brats")
    with pytest.raises(ValueError, match=re.escape("(one a folder) that fit x/*.nii. Found: 3 .mha")):
        find_cases(tmp_path, glob="x/*.nii")
    with pytest.raises(ValueError, match="Found: 1 .mha file; convert"):
        find_cases(tmp_path / "a.mha")


def test_links_lead_to_each_volume_once(tmp_path):
    root = tmp_path / "data"
    save_volume(root / "p1/s/z.nii.gz")
    save_volume(tmp_path / "elsewhere/far.nii.gz")
    (root / "p1/up").symlink_to("..")
    (root / "p1/s/up").symlink_to("..")  # two loops: without end
    (root / "a_copy").symlink_to("p1")
    (root / "p1/a.nii.gz").symlink_to("s/z.nii.gz")
    (root / "p1/gone.nii.gz").symlink_to("nowhere.nii.gz")
    (root / "p1/far").symlink_to(tmp_path / "elsewhere")
    assert [item["image"] for item in find_cases(root)] == [f"{root}/p1/far/far.nii.gz", f"{root}/p1/s/z.nii.gz"]
    (tmp_path / "link").symlink_to(root)
    assert named(find_cases(tmp_path / "link", glob="*/*/*.nii.gz")) == ["far", "z"]


def test_endings_in_any_case_are_read(tmp_path):
    for name in ("A.NII.GZ", "b_FLAIR.Nii", "c_flair.NII.gz"):
        save_volume(tmp_path / name)
    assert named(find_cases(tmp_path, "volumes")) == ["A", "b_FLAIR", "c_flair"]
    assert named(find_cases(tmp_path)) == ["c"]


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_searched(tmp_path, caplog, monkeypatch):
    save_volume(tmp_path / "a.nii.gz")
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path):
        if "lost" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert named(find_cases(tmp_path, glob="**/*.nii.gz")) == ["a"]
    assert "not searched" in caplog.text and "lost+found" in caplog.text
