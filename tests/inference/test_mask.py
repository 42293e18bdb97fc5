"""From the saliency to the mask: thresholds by hand, and the way back to the geometry of the input.

The way back runs a bundle's own preprocessing and postprocessing around a method that returns the slice as its map.
"""

from __future__ import annotations

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, MetaTensor
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import nn

from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.evaluator import VolumeBatch, VolumeEvaluator
from custom_modules.inference.inferer import SaliencyInferer
from custom_modules.inference.mask import SaliencyToMaskd, slice_axis_of, threshold_slices
from tests.helpers.bundles import REPO, config

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ALL = np.ones((4, 4), bool)
DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


def affine_of(codes: str) -> np.ndarray:
    """Affine (4, 4) of an array of 1 mm voxels whose axes run as `codes` say."""
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([DIRECTIONS[code] for code in codes])
    return affine


def slices(*planes) -> np.ndarray:
    return np.stack([np.asarray(plane, np.float32) for plane in planes])


# ---- thresholds


def test_otsu_takes_a_threshold_a_slice():
    weak = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0.25, 0, 0, 0]]
    strong = [[20, 20, 0, 0], [21, 19, 1, 1], [0, 0, 0, 0], [0, 0, 0, 2]]
    mask = threshold_slices(slices(weak, strong), np.stack([ALL, ALL]), "otsu")
    # the two classes of each slice are far apart: 1 against at most 0.25, about 20 against at most 2
    assert np.array_equal(mask, [np.array(weak) == 1, np.array(strong) > 10])
    assert mask.dtype == bool


def test_otsu_looks_at_the_region_only():
    plane = np.zeros((4, 4))
    plane[0, :2], plane[2:, 2:], plane[3, 0] = 5, 1, 100  # 100 lies outside and would put 5 and 1 into one class
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


def answer(saliency: np.ndarray, region: np.ndarray | None = None, affine=LPS) -> MetaTensor:
    """What `SaliencyInferer` returns for a volume, back on the native grid: (2, H, W, D)."""
    region = np.ones_like(saliency) if region is None else region
    return MetaTensor(torch.as_tensor(np.stack([saliency, region]), dtype=torch.float32), affine=affine)


def two_blobs() -> np.ndarray:
    """(6, 6, 4): 1 in a blob of 2 x 2 x 3 = 12 voxels, 3 in one of 4, -1 somewhere."""
    saliency = np.zeros((6, 6, 4), np.float32)
    saliency[:2, :2, :3], saliency[4:, 4:, 1], saliency[0, 5] = 1, 3, -1
    return saliency


@pytest.mark.parametrize(("num_components", "voxels"), [(0, 16), (1, 12), (2, 16), (5, 16)])
def test_largest_components_are_kept(num_components, voxels):
    out = SaliencyToMaskd(threshold=0.5, num_components=num_components)({"pred": answer(two_blobs())})
    mask = out["pred"]
    assert mask.dtype == torch.uint8 and mask.shape == (1, 6, 6, 4) and mask.unique().tolist() == [0, 1]
    assert mask.sum() == voxels and mask[0, :2, :2, :3].all()


def test_saliency_is_kept_inside_the_region():
    saliency, region = two_blobs(), np.zeros((6, 6, 4), np.float32)
    region[:4], region[4:, 4:] = 1.0, 0.4  # interpolated: less than half inside
    pred = answer(saliency, region)
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
    out = SaliencyToMaskd()({"pred": answer(np.zeros((6, 6, 4)), np.zeros((6, 6, 4)))})
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


# ---- how sure the mask is


def several(*maps: np.ndarray, region: np.ndarray | None = None) -> MetaTensor:
    """`answer` for several maps of one volume."""
    region = np.ones_like(maps[0]) if region is None else region
    return MetaTensor(torch.as_tensor(np.stack([*maps, region]), dtype=torch.float32), affine=LPS)


def votes() -> list[np.ndarray]:
    """Four maps (4, 4, 1) above 0.5 in 4, 4, 2 and 2 pixels of the first row; only two are in all of them."""
    maps = np.zeros((4, 4, 4, 1), np.float32)
    maps[:, 0, :2], maps[:2, 0, 2:] = 1, 0.8
    return list(maps)


def test_the_mask_of_several_maps_is_that_of_their_mean():
    maps = votes()
    settings = {"threshold": 0.5, "num_components": 0}
    out = SaliencyToMaskd(**settings)({"pred": several(*maps)})
    assert "uncertainty" not in out and "expected_dice" not in out
    torch.testing.assert_close(out["saliency"][0].as_tensor(), torch.as_tensor(np.mean(maps, axis=0)))
    assert torch.equal(out["pred"][0, 0, :, 0].as_tensor(), torch.tensor([1, 1, 0, 0]).byte())  # means 1, 1, 0.4, 0.4
    unsure = SaliencyToMaskd(**settings, uncertainty=True)({"pred": several(*maps)})
    assert torch.equal(unsure["pred"], out["pred"]) and torch.equal(unsure["saliency"], out["saliency"])


def test_uncertainty_is_the_entropy_of_the_votes():
    maps = votes()
    maps[0][0, 2:] = 0  # 1 of 4 is left there
    out = SaliencyToMaskd(threshold=0.5, num_components=0, uncertainty=True)({"pred": several(*maps), "stem": "p1"})
    entropy = out["uncertainty"]
    assert entropy.shape == (1, 4, 4, 1) and entropy.dtype == torch.float32
    # H(1/4) = 1/4 log2 4 + 3/4 log2 (4/3); all agree about the others
    assert entropy[0, 0, :, 0].tolist() == pytest.approx([0, 0, 0.811278, 0.811278])
    assert not entropy[0, 1:].any() and entropy.isfinite().all()
    np.testing.assert_array_equal(entropy.affine, LPS)
    assert entropy.meta["filename_or_obj"] == "p1.nii.gz"
    # the mask is the first two pixels; the four masks hold 2, 4, 2 and 2: Dice 1, 2 * 2 / (2 + 4), 1, 1
    assert out["expected_dice"] == pytest.approx((1 + 4 / 6 + 1 + 1) / 4)


def test_halves_are_one_bit_and_disagreement_costs_dice():
    maps = [np.zeros((4, 4, 1), np.float32) for _ in range(2)]
    maps[0][0], maps[1][1] = 1, 1
    out = SaliencyToMaskd(threshold=0.4, num_components=0, uncertainty=True)({"pred": several(*maps)})
    assert out["uncertainty"][0, :2].unique().tolist() == [1] and not out["uncertainty"][0, 2:].any()
    assert out["pred"].sum() == 8  # the mean is 0.5 in either row
    assert out["expected_dice"] == pytest.approx(2 * 4 / (8 + 4))


def test_each_vote_has_its_own_threshold_and_components():
    """Otsu of a map that is ten times as high, and the largest of its two components."""
    maps = [two_blobs() for _ in range(2)]
    maps[1] = 10 * np.where(maps[1] == 3, 1, maps[1]).astype(np.float32)
    out = SaliencyToMaskd(num_components=1, uncertainty=True)({"pred": several(*maps)})
    one, ten = (SaliencyToMaskd(num_components=1)({"pred": answer(m)})["pred"].as_tensor() > 0 for m in maps)
    assert one.any() and not torch.equal(one, ten)
    assert torch.equal(out["uncertainty"].as_tensor() > 0.5, one ^ ten)  # 1 bit where one of two says so
    mask = out["pred"].as_tensor() > 0
    dice = [2 * (mask & vote).sum() / (mask.sum() + vote.sum()) for vote in (one, ten)]
    assert out["expected_dice"] == pytest.approx(float(sum(dice) / 2))


def test_of_a_single_map_the_value_is_the_probability():
    p = np.zeros((4, 4, 1), np.float32)
    p[0] = np.array([1, 0.75, 0.5, 0.25])[:, None]
    region = np.ones_like(p)
    region[3], p[3] = 0, 0.5  # does not count
    settings = {"threshold": 0.5, "num_components": 0, "uncertainty": True}
    out = SaliencyToMaskd(**settings)({"pred": several(p, region=region)})
    assert out["uncertainty"][0, 0, :, 0].tolist() == pytest.approx([0, 0.811278, 1, 0.811278])
    assert not out["uncertainty"][0, 1:].any()
    # the mask is the pixels of 1 and 0.75: 2 sum(p mask) / (sum(p) + sum(mask)) = 2 * 1.75 / (2.5 + 2)
    assert out["expected_dice"] == pytest.approx(3.5 / 4.5)


@pytest.mark.parametrize("number", [1, 3])
def test_where_nothing_is_expected_there_is_no_dice(number):
    zero = [np.zeros((4, 4, 1), np.float32)] * number
    for region in (None, np.zeros((4, 4, 1), np.float32)):
        out = SaliencyToMaskd(uncertainty=True)({"pred": several(*zero, region=region)})
        assert out["expected_dice"] is None and not out["uncertainty"].any() and not out["pred"].any()


def test_otsus_threshold_may_be_scaled():
    plane = np.zeros((4, 4))
    plane[0], plane[1, 0] = 10, 4.5  # nearer to 0 than to 10: Otsu's threshold is its bin's centre, 4.5 within 10 / 256
    found = [threshold_slices(slices(plane), ALL[None], "otsu", scale)[0] for scale in (1.0, 0.8)]
    assert np.array_equal(found[0], plane == 10) and np.array_equal(found[1], plane > 0)


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


# ---- back to the geometry of the input

SHAPE, CENTRE = (40, 36, 12), (24, 14, 4)  # of the phantom in LPS; the blob is off the centre in all three directions
TISSUE, BRIGHT = 100, 250


def phantom(depth: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid of 100 with a ball of 250 in it, (40, 36, 12) float32, and the ball (bool); LPS."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    head = ((x - 20) / 17) ** 2 + ((y - 18) / 15) ** 2 + ((z - 5.5) / 9) ** 2 < 1
    ball = ((x - CENTRE[0]) / 6) ** 2 + ((y - CENTRE[1]) / 6) ** 2 + ((z - CENTRE[2]) / 2.5) ** 2 < 1
    image = np.where(ball, BRIGHT, np.where(head, TISSUE, 0)).astype(np.float32)
    return image[..., depth], ball[..., depth]


def stored_as(array: np.ndarray, codes: str, affine: np.ndarray) -> nib.Nifti1Image:
    """An LPS array, stored with other axis codes."""
    to = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    return nib.Nifti1Image(array.astype(np.float32), affine).as_reoriented(to)


def identity(x_0: torch.Tensor, network: nn.Module, slices: list[int]) -> torch.Tensor:
    return x_0


def segment(folder, codes="LPS", spacing=(1, 1, 4), turn=0.0, depth=slice(None), **knobs) -> SimpleNamespace:
    """The phantom through brats_flair's preprocessing, `identity` and its postprocessing; what lies on disk then."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = 30, -12, 7
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    image, ball = (stored_as(array, codes, rotation @ affine) for array in phantom(depth))
    nib.save(image, folder / "scan.nii.gz")
    axis = next(i for i, code in enumerate(codes) if code in "SI")
    tags = np.asarray(ball.dataobj).any(axis=tuple({0, 1, 2} - {axis}))
    case = {"case": "p1", "image": str(folder / "scan.nii.gz"), "slice_labels": tags.astype(int).tolist()}

    parser = ConfigParser()
    parser.read_config(str(REPO / config("brats_flair", "inference")))
    settings = {"output_dir": str(folder / "out"), "slice_axis": axis, "image_size": 48} | knobs
    for name, value in settings.items():
        parser[name] = value
    inferer = SaliencyInferer(identity, gate="tags", erosion=parser.get_parsed_content("erosion"), amp=False)
    VolumeEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CaseDataset([case], parser.get_parsed_content("preprocessing")), batch_size=1),
        network=nn.Identity(),
        inferer=inferer,
        prepare_batch=VolumeBatch(),
        postprocessing=parser.get_parsed_content("postprocessing"),
    ).run()
    mask, saliency = (nib.load(folder / "out" / "scan" / f"scan_{kind}.nii.gz") for kind in ("mask", "saliency"))
    return SimpleNamespace(image=image, ball=np.asarray(ball.dataobj) > 0, mask=mask, saliency=saliency, axis=axis)


def check_geometry(found: SimpleNamespace) -> None:
    for result in (found.mask, found.saliency):
        assert result.shape == found.image.shape
        np.testing.assert_allclose(result.affine, found.image.affine, atol=1e-4)
        assert nib.aff2axcodes(result.affine) == nib.aff2axcodes(found.image.affine)
    assert found.mask.get_data_dtype() == np.uint8 and found.saliency.get_data_dtype() == np.float32


def dice(found: SimpleNamespace) -> float:
    mask = np.asarray(found.mask.dataobj)
    return 2 * (mask & found.ball).sum() / (mask.sum() + found.ball.sum())


GEOMETRIES = [
    {"codes": "LPS"},
    {"codes": "RAS"},
    {"codes": "SPL"},
    {"codes": "ARI"},
    {"codes": "PIR"},
    {"spacing": (0.6, 1.4, 7.0)},
    {"codes": "RSA", "spacing": (0.6, 1.4, 7.0), "turn": 0.3},
    {"depth": slice(4, 5)},
    {"codes": "SPL", "depth": slice(4, 5)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_mask_and_saliency_come_back_to_the_input(tmp_path, geometry):
    found = segment(tmp_path, **geometry)
    check_geometry(found)
    # 48 pixels for 40 voxels: only the rim of the ball, one voxel of a radius of six, is uncertain; a flipped or
    # permuted mask misses a ball that lies off the centre altogether
    assert dice(found) > 0.9
    saliency, image = (np.asarray(volume.dataobj) for volume in (found.saliency, found.image))
    inside = ndimage.binary_erosion(found.ball, np.moveaxis(np.ones((5, 5, 1)), -1, found.axis))
    # identity: percentiles 0 and 99.5 are 0 and 250, mapped to [-1, 1]
    np.testing.assert_allclose(saliency[inside], 2 * BRIGHT / 250 - 1, atol=0.1)
    untagged = ~found.ball.any(axis=tuple({0, 1, 2} - {found.axis}), keepdims=True)
    assert not (saliency * untagged).any() and not saliency[image == 0].any()


@pytest.mark.parametrize("codes", ["SPL", "ARI"])
def test_the_storage_order_does_not_matter(tmp_path, codes):
    results = []
    for stored in ("LPS", codes):
        (tmp_path / stored).mkdir()
        found = segment(tmp_path / stored, codes=stored)
        back = ornt_transform(axcodes2ornt(stored), axcodes2ornt("LPS"))
        results.append([np.asarray(v.as_reoriented(back).dataobj) for v in (found.mask, found.saliency)])
    (mask, saliency), (other_mask, other_saliency) = results
    assert np.array_equal(mask, other_mask)
    np.testing.assert_allclose(other_saliency, saliency, atol=1e-5)


@pytest.mark.parametrize("knobs", [{"threshold": "average_otsu"}, {"threshold": 0.4, "num_components": 0}], ids=str)
def test_other_thresholds_find_the_ball_too(tmp_path, knobs):
    found = segment(tmp_path, codes="ARI", **knobs)
    check_geometry(found)
    assert dice(found) > 0.9
