"""Transforms: checks, tags that travel with the volume, the body."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
)
from scipy import ndimage

from custom_modules.data.tag_volume import TagVolumed, tags_of_volume
from custom_modules.inference.body import body_box, body_mask
from custom_modules.inference.checks import CheckVolumed


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- the check


def check(array, **case):
    return CheckVolumed(keys="image")({"image": MetaTensor(torch.as_tensor(array)), "case": "p7", **case})["image"]


def with_value(array, value):
    array[0, 0, 0, 1] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (noise(1, 4, 4), "one 3D volume; got 2 dimensions"),
        (noise(3, 4, 4, 2), "4D with 3 channels or time points; split it .*\"channel\": 0"),
        (with_value(noise(1, 4, 4, 2), np.nan), "holds 1 NaN or infinite voxels"),
        (with_value(noise(1, 4, 4, 2), np.inf), "holds 1 NaN or infinite voxels"),
        (np.full((1, 4, 4, 2), 7.5), r"constant \(7.5 everywhere\)"),
    ],
)  # fmt: skip
def test_volumes_no_method_can_work_on(array, message):
    with pytest.raises(ValueError, match=f"case 'p7': the image .*{message}"):
        check(array)


def test_a_channel_is_chosen_by_the_case():
    array = noise(3, 4, 5, 2)
    kept = check(array, channel=1)
    assert kept.shape == (1, 4, 5, 2) and torch.equal(kept[0].as_tensor(), torch.as_tensor(array[1]))
    assert check(array[:1]).shape == (1, 4, 5, 2)
    with pytest.raises(ValueError, match="has 3 channels, but the datalist names channel 3"):
        check(array, channel=3)


# ---- tags


ORDERS = {  # stored order of a volume that is (9, 7, 5) in LPS, and the stored axis along which its slices run
    "LPS": 2,
    "RAS": 2,
    "LPI": 2,
    "SLP": 0,
    "PIR": 1,
}


def stored_as(codes, lps):
    """The NIfTI image of a volume given in LPS, stored in the order `codes`."""
    orders = [nib.orientations.axcodes2ornt(order) for order in ("LPS", codes)]
    return nib.Nifti1Image(lps, np.diag([-1.0, -1.0, 3.0, 1.0])).as_reoriented(nib.orientations.ornt_transform(*orders))


@pytest.mark.parametrize("codes", ORDERS)
@pytest.mark.parametrize("target", ["LPS", "RAI"])
def test_tags_follow_the_volume(tmp_path, codes, target):
    """A voxel marks every tagged slice; wherever reorientation takes the voxels, the tags must point at them."""
    marked = np.zeros((9, 7, 5), np.float32)
    marked[2, 3, 1] = marked[6, 1, 2] = 1  # slices 1 and 2 of 5: not symmetric
    stored = stored_as(codes, marked)
    nib.save(stored, tmp_path / "image.nii.gz")
    axis = ORDERS[codes]
    others = tuple(a for a in range(3) if a != axis)
    tags = stored.get_fdata().any(axis=others).astype(int).tolist()  # by hand: which stored slices hold a marker
    assert sum(tags) == 2 and len(tags) == 5

    walked = Compose(
        [
            LoadImaged(keys="image"),
            EnsureChannelFirstd(keys="image"),
            TagVolumed(slice_axis=axis),
            Orientationd(keys=["image", "slice_labels"], axcodes=target, labels=None),
        ]
    )({"image": tmp_path / "image.nii.gz", "slice_labels": tags})
    assert walked["image"].shape == walked["slice_labels"].shape == (1, 9, 7, 5)
    found = tags_of_volume(walked["slice_labels"])
    assert found.tolist() == walked["image"][0].numpy().any(axis=(0, 1)).astype(int).tolist()
    assert found.tolist() == ([0, 1, 1, 0, 0] if target == "LPS" else [0, 0, 1, 1, 0])
    assert found.dtype == torch.uint8


def test_a_wrong_number_of_tags_is_an_error():
    case = {"image": MetaTensor(torch.zeros(1, 4, 3, 5)), "case": "p7", "slice_labels": [0, 1, 0, 0]}
    with pytest.raises(ValueError, match=r"case 'p7': slice_labels has 4 tags but .* 5 slices along slice_axis=2"):
        TagVolumed()(case)
    assert TagVolumed(slice_axis=0)(case)["slice_labels"][0, :, 0, 0].tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="slice_axis must be 0, 1 or 2"):
        TagVolumed(slice_axis=3)


def test_a_case_without_tags_passes():
    case = {"image": MetaTensor(torch.zeros(1, 4, 3, 5))}
    assert set(TagVolumed()(case)) == {"image"}


def test_tags_along_another_axis_are_an_error():
    image = MetaTensor(torch.zeros(1, 4, 3, 5))
    volume = TagVolumed(slice_axis=0)({"image": image, "slice_labels": [0, 1, 1, 0]})["slice_labels"]
    with pytest.raises(ValueError, match="slice_labels run along another axis .* set slice_axis"):
        tags_of_volume(volume)


# ---- the body


def disc(radius=12, size=40, slices=3):
    x, y = np.mgrid[:size, :size] - size // 2
    return np.repeat((np.hypot(x, y) <= radius)[..., None], slices, axis=2)


def noisy_disc():
    """Tissue of 50 to 150 in noise of up to 12: half of Otsu's threshold lies between."""
    random = np.random.default_rng(0)
    return np.abs(noise(40, 40, 3)) * 3 + random.uniform(50, 150, (40, 40, 3)) * disc()


def test_body_is_the_filled_disc_without_the_speck():
    body = disc()
    image = noisy_disc()
    image[17:22, 18:21, 1] = 0  # a ventricle, an air bubble
    image[2:5, 2:5, :] = 150  # a bright speck outside, large enough to survive the opening
    found = body_mask(image)
    opened = ndimage.binary_opening(body[..., 0], ndimage.generate_binary_structure(2, 1))
    assert (found == opened[..., None]).all()
    assert opened.sum() >= 0.98 * body[..., 0].sum()  # the opening takes single pixels off the rim only

    eroded = body_mask(image, erosion=3)
    expected = ndimage.binary_erosion(opened, ndimage.generate_binary_structure(2, 1), iterations=3)
    assert (eroded == expected[..., None]).all()


def test_body_does_not_depend_on_the_intensity_scale():
    image = noisy_disc()
    assert (body_mask(image) == body_mask(image / 500 - 1)).all()


def test_body_box_spans_all_slices_in_plane():
    image = np.zeros((40, 40, 2), np.float32)
    image[5:15, 20:30, 0] = image[10:25, 20:35, 1] = 1
    box = body_box(torch.as_tensor(image)[None])
    assert box.shape == (1, 40, 40, 2) and torch.equal(box[..., 0], box[..., 1])
    rows, columns = np.nonzero(box[0, ..., 0].numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 24, 20, 34)
