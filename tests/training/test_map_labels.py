"""Labels from maps, by hand: blocks of tissue with bright targets, whose label is known pixel by pixel."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, SpatialCropd
from scipy import ndimage
from skimage.filters import threshold_otsu

from custom_modules.data.tag_volume import TagVolumed
from custom_modules.training.map_labels import FLOOR, LoadMapd, sign_of_maps
from custom_modules.training.segmentation import UNKNOWN
from tests.helpers.bundles import LPS, save_nifti

SIZE = (24, 20, 4)
TISSUE, DIM, BRIGHT = 0.5, 0.75, 1.0  # intensities in [0, 1]; cubed 0.125, 0.42, 1
BODY = np.zeros(SIZE, bool)
BODY[2:22, 2:18] = True
TARGET, OTHER, MAP = (slice(8, 14), slice(6, 12)), (slice(16, 20), slice(12, 16)), (slice(6, 16), slice(4, 14))
LABEL_TAGS = [0, 1, 1, 1]
SETTINGS = {"intensity_power": 3.0, "erosion": 2, "scale": 1.0, "num_components": 1, "sign": 1}


def volumes() -> tuple[np.ndarray, np.ndarray]:
    """Intensities and map of four slices (24, 20): a block of tissue with two bright ones, the map around the first.

    Slice 0, tagged y0, looks like slice 1, map and all; slice 2 has a pit in the target; the map of slice 3 is empty.
    """
    intensity, saliency = np.where(BODY, TISSUE, 0.0), np.zeros(SIZE)
    for k in range(3):
        intensity[(*TARGET, k)] = intensity[(*OTHER, k)] = BRIGHT
        saliency[(*MAP, k)] = 1
    intensity[10, 8, 2] = 0.3
    intensity[(*TARGET, 3)] = BRIGHT
    return intensity, saliency


def stored(array: np.ndarray, codes: str = "LPS") -> nib.Nifti1Image:
    turn = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(order) for order in ("LPS", codes)))
    return nib.Nifti1Image(array.astype(np.float32), LPS).as_reoriented(turn)


def labelled(folder, intensity, saliency, codes="LPS", crop=None, tags=LABEL_TAGS, **settings) -> np.ndarray:
    """The label (H, W, D) of volumes given in LPS and stored as `codes`, whose image is prepared in LPS."""
    for name, array in (("image", intensity * 2 - 1), ("map", saliency)):
        nib.save(stored(array, codes), folder / f"{name}.nii.gz")
    axis = next(i for i, code in enumerate(codes) if code in "SI")
    along = nib.io_orientation(stored(intensity, codes).affine)[axis, 1]  # of the stored slices: + towards S
    case = {"image": str(folder / "image.nii.gz"), "map_file": str(folder / "map.nii.gz")}
    prepare = Compose([
        LoadImaged(keys="image"),
        EnsureChannelFirstd(keys="image"),
        TagVolumed(slice_axis=axis),
        Orientationd(keys=["image", "slice_labels"], axcodes="LPS", labels=None),
        *([SpatialCropd(keys=["image", "slice_labels"], **crop)] if crop else []),
        LoadMapd(**(SETTINGS | settings)),
    ])  # fmt: skip
    out = prepare(case | {"slice_labels": tags if along > 0 else tags[::-1]})
    assert out["label"].dtype == torch.uint8 and out["label"].shape == out["image"].shape
    assert torch.equal(out["label"].affine, out["image"].affine)
    return out["label"][0].numpy()


def expected() -> np.ndarray:
    """By hand: where the map and the bright target agree it is 1, the pit too; around it the body is known, but for a
    rim of two pixels; nothing is known of the slice whose map is empty; and without the tag there is no target."""
    label = np.zeros(SIZE, np.uint8)
    cross = ndimage.generate_binary_structure(2, 1)
    for k in (1, 2):
        rim = BODY[..., k] & ~ndimage.binary_erosion(body_of(k), cross, iterations=2)
        label[rim & body_of(k), k] = UNKNOWN
        label[(*TARGET, k)] = 1
    label[body_of(3), 3] = UNKNOWN
    return label


def body_of(k: int) -> np.ndarray:
    """The block without its four corner pixels, which an opening by a cross takes."""
    return ndimage.binary_opening(BODY[..., k], ndimage.generate_binary_structure(2, 1))


def test_the_label_is_where_map_and_image_agree(tmp_path):
    label = labelled(tmp_path, *volumes())
    assert np.array_equal(label, expected())
    assert sorted(np.unique(label)) == [0, 1, UNKNOWN] and (label[BODY] == 0).sum() > 300


def test_a_slice_tagged_y0_has_no_target_whatever_its_map(tmp_path):
    intensity, saliency = volumes()
    assert saliency[..., 0].any()
    assert not labelled(tmp_path, intensity, saliency)[..., 0].any()
    tagged = labelled(tmp_path, intensity, saliency, tags=[1, 1, 1, 1])
    assert np.array_equal(tagged[..., 0], expected()[..., 1]) and np.array_equal(tagged[..., 1:], expected()[..., 1:])


@pytest.mark.parametrize("codes", ["RAI", "PIR", "SLP"])
@pytest.mark.parametrize("crop", [None, {"roi_start": [1, 1, 0], "roi_end": [23, 20, 4]}], ids=["whole", "cropped"])
def test_the_map_follows_its_image(tmp_path, codes, crop):
    label = labelled(tmp_path, *volumes(), codes, crop)  # no axis is symmetric
    box = tuple(map(slice, crop["roi_start"], crop["roi_end"])) if crop else ()
    assert np.array_equal(label, expected()[box])


def test_a_map_of_another_grid_is_brought_to_that_of_the_image(tmp_path):
    """A map of half the resolution, in pixels of twice the size, has the same label."""
    intensity, saliency = volumes()
    affine = LPS @ np.diag([2.0, 2.0, 1.0, 1.0])
    affine[:2, 3] = -0.5, -0.5  # a pixel's middle lies between those of the four that it covers
    fine = labelled(tmp_path, intensity, saliency)
    save_nifti(saliency[::2, ::2].astype(np.float32), tmp_path / "coarse.nii.gz", affine)
    image = MetaTensor(torch.as_tensor(intensity[None] * 2 - 1, dtype=torch.float32), affine=torch.as_tensor(LPS))
    case = {"image": image, "map_file": str(tmp_path / "coarse.nii.gz"), "slice_labels": LABEL_TAGS}
    coarse = LoadMapd(**SETTINGS)(TagVolumed()(case))["label"][0].numpy()
    assert np.array_equal(coarse, fine)


def test_what_is_just_below_otsus_threshold_is_the_scales(tmp_path):
    """A second block's product 0.42 is nearer to the tissue's than to 1: the highest of the lower class, so the bin of
    the threshold."""
    intensity, saliency = volumes()
    intensity[(*OTHER, slice(1, 3))], saliency[(*OTHER, slice(1, 3))] = DIM, 1
    plain, scaled = (labelled(tmp_path, intensity, saliency, scale=scale, num_components=2) for scale in (1.0, 0.8))
    assert np.array_equal(plain, expected())
    assert (scaled[(*OTHER, slice(1, 3))] == 1).all() and (scaled[(*TARGET, slice(1, 3))] == 1).all()


def test_a_label_goes_to_the_edges_of_its_image(tmp_path):
    """A map of a few pixels within the target, or of a block around it, gives the target: its edge is at (1 + 0) / 2 of
    [-1, 1], between its median and that of the tissue."""
    intensity, saliency = volumes()
    around = labelled(tmp_path, intensity, saliency, intensity_power=0.0)
    saliency[:] = 0
    saliency[10:12, 8:11, :3] = 1
    within = labelled(tmp_path, intensity, saliency)
    assert np.array_equal(around, expected()) and np.array_equal(within, expected())


def test_a_dark_target_is_a_bright_one_in_the_negative(tmp_path):
    intensity, saliency = volumes()
    dark = np.where(BODY, 1 - intensity, 0.0)  # the tissue stays at 0.5, the target is as dark as air
    dark[OTHER] = TISSUE  # or the body would end there
    assert np.array_equal(labelled(tmp_path, dark, -saliency, sign=-1), expected())
    assert not (labelled(tmp_path, dark, -saliency)[TARGET] == 1).any()


def test_the_heavier_tail_of_the_maps_is_the_targets(tmp_path, caplog):
    """Of 100 voxels 2 at -1 and 98 at 0.1: m = (98 * 0.001 - 2) / (98 * 0.001 + 2) < 0, though the mean is above 0."""
    caplog.set_level("INFO")
    dark = np.full((10, 10, 1), 0.1, np.float32)
    dark[:2, 0] = -1
    cases = []
    for name, array in {"a": dark, "b": dark, "c": -dark, "empty": 0 * dark}.items():
        save_nifti(array, tmp_path / f"{name}.nii.gz")
        cases.append({"map_file": str(tmp_path / f"{name}.nii.gz")})
    assert sign_of_maps(cases[:2]) == -1 and "WARNING" not in caplog.text
    assert sign_of_maps(cases[:3]) == -1 and "darker than its surroundings in 2 of 3 maps; they do not" in caplog.text
    assert sign_of_maps(cases[1:]) == sign_of_maps([]) == 1, "0 on the median, or no map"
    assert [sign_of_maps(cases, given) for given in (1, -1)] == [1, -1]
    with pytest.raises(ValueError, match="label_sign must be 1 .bright target., -1 .dark. or null .*; got 0"):
        sign_of_maps(cases, 0)


@pytest.mark.parametrize("num_components", [1, 2])
def test_the_largest_components_are_kept(tmp_path, num_components):
    intensity, saliency = volumes()
    saliency[(*OTHER, slice(0, 3))] = 1  # 4 x 4 pixels, the target has 6 x 6
    label = labelled(tmp_path, intensity, saliency, num_components=num_components)
    assert np.array_equal(label[(*TARGET, slice(0, 4))], expected()[(*TARGET, slice(0, 4))])
    assert (label[(*OTHER, slice(1, 3))] == 1).all() == (num_components == 2)
    assert (label[(*OTHER, slice(1, 3))] == 1).any() == (num_components == 2)


@pytest.mark.parametrize(("rows", "found"), [(slice(14, 17), True), (slice(17, 20), False)])
def test_what_lies_beyond_the_targets_end_is_not_taken_for_it(tmp_path, rows, found):
    """In slice 3 something else is bright. It counts within 2 pixels of the target in slice 2, whose last row is 13."""
    intensity, saliency = volumes()
    intensity[(*TARGET, 3)] = TISSUE
    intensity[rows, 8:11, 3], saliency[rows, 8:11, 3] = BRIGHT, 1
    label = labelled(tmp_path, intensity, saliency, num_components=2)
    assert (label[..., 3] == 1).any() == found
    assert np.array_equal(label[..., 3] == UNKNOWN, expected()[..., 3] == UNKNOWN) != found


def test_a_middle_slice_without_a_seed_ends_no_target(tmp_path):
    """Of the tagged slices 1, 2, 3 the middle one has no map: the nearest slice that has one is the start."""
    intensity, saliency = volumes()
    saliency[..., 2] = 0
    label = labelled(tmp_path, intensity, saliency)
    assert np.array_equal(label[..., 1], expected()[..., 1]) and not (label[..., 2:] == 1).any()


@pytest.mark.parametrize(("strength", "found"), [(0.6, True), (0.4, False)])
def test_a_weak_map_of_one_slice_is_no_target(tmp_path, strength, found):
    """Otsu's threshold of slices 1 and 2 is the tissue's product 0.125, or the bin above: half of their median is near
    0.07 to 0.5. The map of slice 3 is the strength times as strong."""
    intensity, saliency = volumes()
    intensity[10, 8, 2] = BRIGHT  # no pit
    saliency[(*TARGET, 3)] = strength
    product = np.where(saliency > 0, saliency * intensity**3, 0)
    half = FLOOR * np.median([threshold_otsu(product[2:22, 2:18, k]) for k in (1, 2, 3)])
    saliency[(*TARGET, 3)] = 2 * half * strength
    label = labelled(tmp_path, intensity, saliency)
    assert (label[..., 3] == 1).any() == found


def test_a_cavity_belongs_to_its_target_and_a_slit_is_closed(tmp_path):
    intensity, saliency = volumes()
    intensity[9:13, 7:11, 1] = 0.3  # in a wall of one pixel
    intensity[10:14, 9, 2] = 0.3  # down from the pit's row to the border
    label = labelled(tmp_path, intensity, saliency)
    target = expected() == 1
    target[13, 9, 2] = False  # the slit's mouth: two steps below it are three away from the target
    assert np.array_equal(label == 1, target)
