"""Layouts: cases found on disk, geometry, labels and tags as they are read. Volumes of a few voxels."""

import numpy as np
import pytest
from monai.transforms import LoadImage

from custom_modules.data.datalist import check_cases
from custom_modules.data.geometry import read_geometry
from custom_modules.data.labels import load_label
from custom_modules.data.layouts import CHAOS_KIDNEYS, find_cases
from custom_modules.data.tags import read_tags, tag_cases, tags_of_label
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


@pytest.mark.parametrize("descending", [False, True])
def test_chaos_pngs_follow_the_slices_of_the_dicom_reader(tmp_path, descending):
    save_chaos(tmp_path / "Train_Sets/MR/1/T2SPIR", descending)
    cases = find_cases(tmp_path)
    assert named(cases) == ["chaos_01"]
    volume = np.asarray(LoadImage(reader="ITKReader", image_only=True)(cases[0]["image"]))
    label = load_label(cases[0]["label"])
    assert label.shape == volume.shape == (4, 5, 3)  # columns x, rows y, slices
    first = 2 if descending else 0  # where the slice of the first name went
    assert volume[2, 1].tolist() == ([3, 2, 1] if descending else [1, 2, 3])
    assert label[2, 1].tolist() == [126 if z == first else 63 for z in range(3)]
    assert (label[0, 4] == 252).all() and (label > 0).sum() == 6
    (item,) = tag_cases(cases, target_labels=CHAOS_KIDNEYS)[0]
    assert item["slice_labels"] == [int(z == first) for z in range(3)]
    assert check_cases([item], with_label=True)["n_positive"] == 1


def test_chaos_reports_a_missing_png(tmp_path):
    save_chaos(tmp_path / "MR/13/T2SPIR", descending=False)
    next((tmp_path / "MR/13/T2SPIR/Ground").glob("*.png")).unlink()
    usable, skipped, _ = tag_cases(find_cases(tmp_path, "chaos"))
    assert not usable and "2 PNGs, 3 DICOM files" in skipped["chaos_13"]


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


def test_one_brats_file_keeps_its_case_name(tmp_path):
    brats_case(tmp_path, "p1")
    (item,) = find_cases(tmp_path / "p1/p1_flair.nii.gz")
    assert item["case"] == "p1" and "label" in item


def test_find_cases_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="layout must be one of auto, brats"):
        find_cases(tmp_path, "bids")
    with pytest.raises(ValueError, match="no volume found"):
        find_cases(tmp_path)


def test_tags_of_label_by_value_axis_and_area():
    label = np.zeros((3, 2, 2), np.int32)
    label[0, :, 1] = 2  # 2 pixels in slice 1 of axis 2, in slice 0 of axis 0
    label[1, 0, 0] = 5
    assert tags_of_label(label) == [1, 1]
    assert tags_of_label(label, [2]) == [0, 1]
    assert tags_of_label(label, min_area=1) == [0, 1]
    assert tags_of_label(label, min_area=2) == [0, 0]
    assert tags_of_label(label, slice_axis=0) == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,slice\np1,0\n", "must start with the header case,slice,label"),
        ("", "must start with the header"),
        ("case,slice,label\np1,0,2\n", r"line 2 \(case 'p1'\): label must be 0 or 1; got '2'"),
        ("case,slice,label\np1,0,1\np1,-1,1\n", "line 3 .*whole number from 0; got '-1'"),
        ("case,slice,label\np1,0\n", "line 2 .*label must be 0 or 1; got ''"),
        ("case,slice,label\np1,0,1\np1,0,0\n", "line 3 .*slice 0 is 0 here and 1 above"),
        ("case,slice,label\nq,0,1\n", "unknown cases: q. Cases are named like p1"),
        ("case,slice,label\np1,5,1\n", "'p1' name slice 5; its last is 4"),
    ],
)
def test_csv_errors_name_line_or_case(tmp_path, text, message):
    brats_case(tmp_path, "p1")
    (tmp_path / "tags.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tag_cases(find_cases(tmp_path), read_tags(tmp_path / "tags.csv"))
