"""Labels: the target by label values, and the PNGs of CHAOS, which follow the slices of the DICOM reader."""

import json
import re

import numpy as np
import pytest
import torch
from monai.transforms import LoadImage

from custom_modules.data.datalist import check_cases
from custom_modules.data.labels import choose_target, load_label, target_mask
from custom_modules.data.layouts import CHAOS_KIDNEYS, find_cases
from custom_modules.data.tags import tag_cases
from tests.helpers.series import save_chaos
from tests.helpers.volumes import SHAPE, mask_of, named, save_volume


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_the_target_is_above_0_or_has_one_of_the_values(convert, dtype):
    label = convert(np.array([[0, 1], [2, 126]], dtype))
    for target_labels, expected in (
        (None, [[False, True], [True, True]]),
        ([], [[False, True], [True, True]]),
        ([2], [[False, False], [True, False]]),
        (CHAOS_KIDNEYS, [[False, False], [True, True]]),
        ([7], [[False, False], [False, False]]),
    ):
        mask = target_mask(label, target_labels)
        assert mask.dtype == bool and mask.tolist() == expected


@pytest.mark.parametrize(
    ("named", "given", "chosen"),
    [
        (None, None, [2, 3]),  # the bundle's own
        (None, 4, [4]),
        (None, [], []),
        ([1], None, [1]),  # the datalist's
        ([1], [1], [1]),
        ([3, 2], [2, 3], [3, 2]),
    ],
)
def test_the_datalist_names_the_target(tmp_path, caplog, named, given, chosen):
    (tmp_path / "datalist.json").write_text(json.dumps({} if named is None else {"target_labels": named}))
    assert choose_target(None, tmp_path, given, (2, 3)) == chosen
    assert ("label values [1], not the bundle's own, [2, 3]" in caplog.text) == (chosen == [1])
    assert choose_target(None, tmp_path / "nowhere", None, [2, 3]) == [2, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([2, 3], r"datalist.json, whose tags are of [1]; got [2, 3]. Leave"),
        ([], "got []"),
        ("1 4", "such as --target_labels \"[1,4]\"; got '1 4'"),
    ],
)
def test_another_target_than_the_datalists_is_an_error(tmp_path, given, message):
    (tmp_path / "datalist.json").write_text('{"target_labels": [1]}')
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_target(None, tmp_path, given, [2, 3])


def test_what_a_datalist_names_as_target_or_label_must_be_one(tmp_path):
    (tmp_path / "datalist.json").write_text('{"target_labels": ["1"]}')  # no voxel would equal a text
    with pytest.raises(ValueError, match=r"datalist.json must be a list of whole numbers; got \['1'\]"):
        choose_target(None, tmp_path, None, [1])
    save_volume(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="is a folder, but .*a.nii is no DICOM series; give a NIfTI file as the label"):
        load_label(tmp_path, tmp_path / "a.nii")
    save_volume(tmp_path / "five.nii", mask_of([0, 1, 1, 0, 0])[..., None, None])
    assert load_label(tmp_path / "five.nii", tmp_path / "a.nii").shape == SHAPE


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


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (np.float32([0, 1, 0.5]), "0.5"),  # a mask that was interpolated; it would be cut at a half
        (np.int8([0, 126, -67]), "-67"),  # 189 as int8: a kidney would be lost
        (np.uint32([0, 1, 2**32 - 1]), "4.29497e+09"),
    ],
)
def test_values_that_are_no_whole_numbers_from_0_are_named(tmp_path, label, value):
    path = save_volume(tmp_path / "p_seg.nii.gz", np.broadcast_to(label, (4, 2, 3)))
    with pytest.raises(ValueError, match=re.escape(f"must hold whole numbers from 0; got {value}; save it as uint8")):
        load_label(path)
    nearly = np.broadcast_to(np.float32([0, 1.0001, 1.9999]), (4, 2, 3))  # as 255 / 255 may come out of a slope
    assert load_label(save_volume(path, nearly))[0, 0].tolist() == [0, 1, 2]
