"""DICOM: the folder of a series is one volume or a clear error; CHAOS as published, from the datalist to evaluation."""

from __future__ import annotations

import csv
import json
import re

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from custom_modules.data.__main__ import main
from custom_modules.data.datalist import check_cases
from custom_modules.data.dicom import check_source, read_series
from custom_modules.inference.cases import CaseDataset
from tests.helpers.bundles import SHORT, TAGS, TINY, config, head, monai_bundle
from tests.helpers.series import as_nifti, assert_same, save_enhanced, save_series

VOLUME = np.random.default_rng(0).integers(0, 1000, (7, 5, 4)).astype(np.int16)  # (W, H, D)

# ---- folders that are no volume


def break_series(folder, kind: str) -> None:
    """Spoils a series of four slices in files 0 to 3."""
    file = folder / "1"
    header = pydicom.dcmread(file)
    position = np.array(header.ImagePositionPatient, float)
    if kind == "missing":
        return file.unlink()
    if kind == "repeated":
        header.ImagePositionPatient = pydicom.dcmread(folder / "2").ImagePositionPatient
    elif kind == "sheared":
        header.ImagePositionPatient = list(np.round(position + 2 * np.array(header.ImageOrientationPatient[:3]), 6))
    elif kind == "turned":
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    elif kind == "unplaced":
        del header.ImagePositionPatient
    elif kind == "cut short":
        file = folder / "3"  # at an end, so that the others are evenly spaced
        return file.write_bytes(file.read_bytes()[:-20])
    elif kind == "other series":
        header.SeriesInstanceUID, header.SeriesDescription = "1.2.3.99", "T1 DUAL"
    elif kind == "other size":  # a localizer under the same UID
        header.Rows, header.PixelData = 1, header.PixelData[: 2 * header.Columns]
    header.save_as(file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing or unevenly spaced: 9\.00 mm between slices \d and \d, .* in the median"),
        ("repeated", "1 of its 4 slices lie where another one does"),
        ("sheared", "shifted against each other"),
        ("turned", "differ in orientation"),
        ("cut short", r"3 cannot be read \(cut short\?\)"),
        ("unplaced", "1 lacks ImagePositionPatient"),
        ("other series", r"holds 2 DICOM series.* T1 DUAL \(MR, 7 x 5, 1 files, such as 1\).*folder of its own"),
        ("other size", r"holds 2 DICOM series.*MR, 7 x 1, 1 files.*MR, 7 x 5, 3 files"),
    ],
)
def test_what_is_no_volume_is_an_error(kind, message, tmp_path):
    folder = save_series(tmp_path, VOLUME, names=range(4))
    assert len(read_series(folder)) == 4
    break_series(folder, kind)
    with pytest.raises(ValueError, match=message):
        read_series(folder)
    with pytest.raises(ValueError, match=message):
        check_cases([{"case": "p7", "image": str(folder), "slice_labels": [0, 1, 1, 0]}])
    (item,) = CaseDataset([{"case": "p7", "image": str(folder)}], None)
    assert item["case"] == "p7" and re.search(message, item["error"])


def test_enhanced_frames_out_of_order_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="not stored in the order of their positions"):
        read_series(save_enhanced(tmp_path, VOLUME, order=[1, 0, 2, 3]))


def test_an_empty_folder_is_no_series(tmp_path):
    with pytest.raises(ValueError, match="holds no DICOM series"):
        read_series(tmp_path)


def test_a_single_slice_is_a_volume(tmp_path):
    assert len(read_series(save_series(tmp_path, VOLUME[..., :1]))) == 1


def test_only_a_series_can_be_referred_to(tmp_path):
    case = {"case": "p7", "image": str(tmp_path / "p7.nii.gz")}
    check_source(case, "nifti")
    with pytest.raises(ValueError, match=r"case 'p7': .*p7.nii.gz is not one; .* or --output_format nifti"):
        check_source(case, "dicom_seg")
    case["image"] = str(save_series(tmp_path / "in", VOLUME, FrameOfReferenceUID=None))
    check_source(case, "nifti")
    with pytest.raises(ValueError, match=r"case 'p7': .* has no FrameOfReferenceUID"):
        check_source(case, "dicom_seg")
    with pytest.raises(ValueError, match=r"output_format must be one of \['nifti', 'dicom_seg'\]; got 'dicom'"):
        CaseDataset([], None, output_format="dicom")


# ---- CHAOS as published

ORGANS = {"liver": 63, "right kidney": 126, "left kidney": 189, "spleen": 252}
KIDNEYS = TAGS[1:]  # another order of slices gives other tags


def save_chaos_case(root, seed: int) -> None:
    """`<id>/T2SPIR/DICOM_anon/*.dcm` and `Ground/*.png`, paired by the order of their names, which is against z."""
    image, lesion = (volume[..., 1:] for volume in head(seed))
    names = [f"IMG-0004-{len(KIDNEYS) - z:05d}" for z in range(len(KIDNEYS))]
    folder = root / "MR" / str(seed + 1) / "T2SPIR"
    save_series(folder / "DICOM_anon", image, np.diag([-1.0, -1.0, 7.7, 1.0]), [f"{name}.dcm" for name in names])
    x = np.arange(image.shape[0])[:, None, None]
    label = np.where(lesion, np.where(x % 2, ORGANS["right kidney"], ORGANS["left kidney"]), 0)
    label[:2], label[-2:] = ORGANS["liver"], ORGANS["spleen"]
    (folder / "Ground").mkdir()
    for z, name in enumerate(names):
        Image.fromarray(label[..., z].T.astype(np.uint8)).save(folder / "Ground" / f"{name}.png")


def test_chaos_as_published_from_datalist_to_evaluation(tmp_path):
    root, listed = tmp_path / "CHAOS", tmp_path / "CHAOS" / "datalist.json"
    for seed in range(3):
        save_chaos_case(root, seed)
    splits = {"training": ["chaos_01", "chaos_02"], "test": ["chaos_03"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    main(["chaos", "--root", str(root), "--output", str(listed), "--splits", str(tmp_path / "splits.json")])
    sections = json.loads(listed.read_text())
    assert all(item["slice_labels"] == KIDNEYS for item in (*sections["training"], *sections["test"]))

    where = ["--dataset_dir", root, "--output_dir", tmp_path / "runs", "--ckpt_dir", tmp_path / "models"]
    monai_bundle("run", "training", "--config_file", config("chaos_kidney", "train"), *where, *TINY, *SHORT)

    stages = f"['{config('chaos_kidney', 'inference')}','{config('chaos_kidney', 'evaluate')}']"
    kidneys = head(2)[1][..., 1:]  # liver and spleen are no target
    for method in ("cdm", "intensity"):  # a network of two iterations may find nothing
        out = tmp_path / method
        where = ["--dataset_dir", root, "--output_dir", out, "--ckpt_path", tmp_path / "models" / "model.pt"]
        more = ["--output_format=dicom_seg", f"--method={method}"]
        monai_bundle("run", "--config_file", stages, *where, *TINY, *more)
        mask = nib.load(out / "chaos_03" / "chaos_03_mask.nii.gz")
        assert_same(as_nifti(out / "chaos_03" / "chaos_03_seg.dcm"), mask)
        with (out / "metrics" / "per_slice.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["slice"]) for row in rows] == [z for z, tag in enumerate(KIDNEYS) if tag]
        for row in rows:
            found, true = (volume[..., int(row["slice"])] > 0 for volume in (mask.get_fdata(), kidneys))
            dice = 2 * (found & true).sum() / (found.sum() + true.sum())
            assert float(row["dice"]) == pytest.approx(dice, abs=1e-4)
    assert dice > 0
