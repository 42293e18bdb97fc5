"""Slice tags as a volume, which every transform moves together with the image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from monai.data import MetaTensor
from monai.transforms import Transform


class TagVolumed(Transform):
    """Turns the tags of a case's slices into a volume, so that every later transform moves them with the image.

    `slice_labels` (list of 0 and 1, by the index of the stored array along `slice_axis`) becomes a uint8 MetaTensor
    (1, H, W, D) with the affine of `image`, each slice filled with its tag. `tags_of_volume` reads it back. It comes
    before all spatial transforms. A case without tags passes unchanged.

    Raises:
        ValueError: `slice_axis` is not an axis, a tag is neither 0 nor 1, or there is not one for each slice.
    """

    def __init__(self, slice_axis: int = 2) -> None:
        if slice_axis not in (0, 1, 2):
            raise ValueError(f"slice_axis must be 0, 1 or 2, an axis of the stored array; got {slice_axis}.")
        self.slice_axis = slice_axis

    def __call__(self, data: Mapping) -> dict:
        out = dict(data)
        if "slice_labels" not in out:
            return out
        image, tags = out["image"], out["slice_labels"]
        if wrong := [tag for tag in tags if tag not in (0, 1)]:
            raise ValueError(
                f"case {out.get('case')!r}: slice_labels must be 0 or 1; got {wrong[0]}. Correct the datalist."
            )
        tags = torch.as_tensor(tags, dtype=torch.uint8).flatten()
        slices = image.shape[1 + self.slice_axis]
        if len(tags) != slices:
            raise ValueError(
                f"case {out.get('case')!r}: slice_labels has {len(tags)} tags but the volume has {slices} slices along "
                f"slice_axis={self.slice_axis}, shape {tuple(image.shape[1:])}; rebuild the datalist."
            )
        shape = [1, 1, 1, 1]
        shape[1 + self.slice_axis] = slices
        volume = tags.view(shape).expand(image.shape).contiguous()
        out["slice_labels"] = MetaTensor(volume, affine=image.affine)
        return out


def tags_of_volume(tag_volume: torch.Tensor) -> torch.Tensor:
    """Read the tags (D,) uint8 of a tag volume (1, H, W, D) along its last axis.

    Raises:
        ValueError: the tags run along another axis, so the tagged slices are not those that a method processes.
    """
    low, high = tag_volume.flatten(0, 2).aminmax(dim=0)
    if not torch.equal(low, high):
        raise ValueError(
            "slice_labels run along another axis than the slices after reorientation; set slice_axis to the stored "
            "axis that they index, or orientation so that its last letter is their direction."
        )
    return high
