"""Tags travel with the volume: whatever moves the voxels moves them, too."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd

from custom_modules.data.tag_volume import TagVolumed, tags_of_volume

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


@pytest.mark.parametrize("tag", [0.7, 2, -1, "1", None])
def test_a_tag_is_0_or_1(tag):
    case = {"image": MetaTensor(torch.zeros(1, 4, 3, 5)), "case": "p7", "slice_labels": [0, 1.0, tag, 0, 0]}
    with pytest.raises(ValueError, match=f"case 'p7': slice_labels must be 0 or 1; got {tag}. Correct the datalist"):
        TagVolumed()(case)


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
