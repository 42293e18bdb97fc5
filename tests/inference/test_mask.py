"""From the saliency to the mask: thresholds, slice axis and components by hand."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu

from custom_modules.inference.mask import SaliencyToMaskd, otsu_of_volume, slice_axis_of, threshold_slices
from tests.helpers.inferers import LPS, answer, two_blobs

ALL = np.ones((4, 4), bool)
DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


def affine_of(codes: str) -> np.ndarray:
    """Makes the affine (4, 4) of an array of 1 mm voxels with the axis codes `codes`."""
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([DIRECTIONS[code] for code in codes])
    return affine


def slices(*planes) -> np.ndarray:
    return np.stack([np.asarray(plane, np.float32) for plane in planes])


# ---- thresholds


def test_otsu_finds_a_threshold_per_slice():
    weak = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0.25, 0, 0, 0]]
    strong = [[20, 20, 0, 0], [21, 19, 1, 1], [0, 0, 0, 0], [0, 0, 0, 2]]
    mask = threshold_slices(slices(weak, strong), np.stack([ALL, ALL]), "otsu")
    # the two classes of each slice are far apart: 1 against at most 0.25, about 20 against at most 2
    assert np.array_equal(mask, [np.array(weak) == 1, np.array(strong) > 10])
    assert mask.dtype == bool


def test_otsu_looks_at_the_region_only():
    plane = np.zeros((4, 4))
    plane[0, :2], plane[2:, 2:], plane[3, 0] = 5, 1, 100  # 100 is outside and would put 5 and 1 into one class
    region = ALL.copy()
    region[3, 0] = region[0] = False
    mask = threshold_slices(slices(plane), region[None], "otsu")
    assert np.array_equal(mask[0], plane == 1)  # 5 is outside too


def test_negative_values_count_as_0():
    plane = np.zeros((4, 4))
    plane[0], plane[1, :2] = -50, 1
    assert np.array_equal(threshold_slices(slices(plane), ALL[None], "otsu")[0], plane == 1)
    assert not threshold_slices(slices(plane - 2), ALL[None], "otsu").any()  # all negative


def test_average_otsu_is_the_mean_over_the_processed_slices():
    rng = np.random.default_rng(0)
    saliency = rng.gamma(2, 1, (4, 16, 16)).astype(np.float32) * np.array([1, 3, 9, 27])[:, None, None]
    saliency -= 1
    region = rng.random((4, 16, 16)) < 0.7
    region[3] = False  # not processed: its threshold, the highest, does not enter
    thresholds = [threshold_otsu(np.maximum(saliency[k], 0)[region[k]]) for k in range(3)]
    mask = threshold_slices(saliency, region, "average_otsu")
    assert np.array_equal(mask, region & (saliency > np.mean(thresholds)))
    assert not np.array_equal(mask, threshold_slices(saliency, region, "otsu"))


def test_otsu_of_a_volume_is_that_of_scikit_image():
    """The histograms may differ by a voxel at an edge of a bin, and the bins' centres by rounding."""
    values = np.random.default_rng(0).gamma(2, 100, (40, 40, 40)).astype(np.float32)
    assert otsu_of_volume(values) == pytest.approx(threshold_otsu(values), rel=1e-6)
    assert otsu_of_volume(np.full((2, 2, 2), 3, np.float32)) == 3  # its only intensity


def test_a_number_is_the_threshold():
    plane = np.arange(16).reshape(4, 4) / 10
    region = ALL.copy()
    region[3, 3] = False
    mask = threshold_slices(slices(plane), region[None], 1)
    assert np.flatnonzero(mask).tolist() == [11, 12, 13, 14]  # above 1.0, not 15


@pytest.mark.parametrize("threshold", ["otsu", "average_otsu", 0.5, 0])
def test_nothing_to_find_gives_an_empty_mask(threshold):
    zero, nowhere = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    assert not threshold_slices(zero, np.stack([ALL, ALL]), threshold).any()
    assert not threshold_slices(zero + 3, nowhere, threshold).any()


def test_otsus_threshold_may_be_scaled():
    plane = np.zeros((4, 4))
    plane[0], plane[1, 0] = 10, 4.5  # nearer to 0 than to 10: Otsu's threshold is its bin's centre, 4.5 within 10 / 256
    found = [threshold_slices(slices(plane), ALL[None], "otsu", scale)[0] for scale in (1.0, 0.8)]
    assert np.array_equal(found[0], plane == 10) and np.array_equal(found[1], plane > 0)


# ---- slice axis


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SPL", "IRA", "ARI", "PIR"])
@pytest.mark.parametrize(("orientation", "pair"), [("LPS", "SI"), ("RAS", "SI"), ("SRA", "AP"), ("IPL", "LR")])
def test_slice_axis_follows_the_last_letter(codes, orientation, pair):
    affine = affine_of(codes) @ np.diag([1.0, 2.0, 3.0, 1.0])
    assert nib.aff2axcodes(affine) == tuple(codes)
    assert slice_axis_of(affine, orientation) == next(i for i, code in enumerate(codes) if code in pair)


def test_slice_axis_of_an_oblique_volume():
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]]
    assert slice_axis_of(turn @ LPS, "LPS") == 2
    assert slice_axis_of((turn @ LPS)[:, [2, 0, 1, 3]], "LPS") == 0


# ---- the transform


@pytest.mark.parametrize(("num_components", "voxels"), [(0, 16), (1, 12), (2, 16), (5, 16)])
def test_largest_components_are_kept(num_components, voxels):
    out = SaliencyToMaskd(threshold=0.5, num_components=num_components)({"pred": answer(two_blobs())})
    mask = out["pred"]
    assert mask.dtype == torch.uint8 and mask.shape == (1, 6, 6, 4) and mask.unique().tolist() == [0, 1]
    assert mask.sum() == voxels and mask[0, :2, :2, :3].all()


def test_saliency_is_kept_inside_the_region():
    saliency, region = two_blobs(), np.zeros((6, 6, 4), np.float32)
    region[:4], region[4:, 4:] = 1.0, 0.4  # interpolated: less than half inside
    pred = answer(saliency, region=region)
    out = SaliencyToMaskd(threshold=0.5)({"pred": pred, "stem": "p1_flair"})
    kept = out["saliency"]
    assert kept.dtype == torch.float32 and kept.shape == (1, 6, 6, 4)
    expected = np.where(region > 0.5, saliency, 0)
    assert np.array_equal(kept[0], expected) and kept.min() == -1  # signed, not cut at 0
    assert np.array_equal(out["pred"][0], expected == 1)
    for result in (out["pred"], kept):
        np.testing.assert_array_equal(result.affine, LPS)
        assert result.meta["filename_or_obj"] == "p1_flair.nii.gz"  # what SaveImaged names the file by


def test_an_empty_answer_gives_an_empty_mask():
    out = SaliencyToMaskd()({"pred": answer(np.zeros((6, 6, 4)), region=np.zeros((6, 6, 4)))})
    assert out["pred"].shape == out["saliency"].shape == (1, 6, 6, 4)
    assert not out["pred"].any() and not out["saliency"].any()


def test_otsu_runs_along_the_slices_of_the_orientation():
    saliency = np.zeros((3, 8, 8), np.float32)  # stored as S, P, L: slices along the first axis
    saliency[0, :2, :2], saliency[1, :2, :2], saliency[1, 4:6, 4:6] = 1, 12, 1
    affine = affine_of("SPL")
    out = SaliencyToMaskd(num_components=0)({"pred": answer(saliency, affine=affine)})
    expected = np.zeros((3, 8, 8))  # by hand: in slice 0 the 1 is the target, in slice 1 it is not
    expected[:2, :2, :2] = 1
    assert np.array_equal(out["pred"][0], expected)
    other = SaliencyToMaskd(num_components=0, orientation="SPL")({"pred": answer(saliency, affine=affine)})
    assert other["pred"][0, 1, 4:6, 4:6].all()  # along L nothing brighter is in the same slice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": "otsy"}, r"threshold must be 'otsu', 'average_otsu' or a number; got 'otsy'"),
        ({"num_components": -1}, r"num_components must be >= 0; got -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SaliencyToMaskd(**settings)
