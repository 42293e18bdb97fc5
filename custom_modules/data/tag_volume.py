"""Slice tags as a volume, so that every transform moves them together with the image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform


class TagVolumed(MapTransform):
    """Turns per-slice tags into a volume, so that every later transform moves them together with the image.

    `slice_labels` (list of 0/1, index i of the stored array along `slice_axis`) becomes a uint8 MetaTensor
    (1, H, W, D) with the image's affine, each slice filled with its tag. `tags_of_volume` reads it back. Apply before
    any spatial transform. A case without tags passes unchanged.

    Raises:
        ValueError: if the number of tags differs from the number of slices.
    """

    def __init__(self, keys="slice_labels", image_key: str = "image", slice_axis: int = 2) -> None:
        super().__init__(keys, allow_missing_keys=True)
        if slice_axis not in (0, 1, 2):
            raise ValueError(f"slice_axis must be 0, 1 or 2, an axis of the stored array; got {slice_axis}.")
        self.image_key, self.slice_axis = image_key, slice_axis

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        image = out[self.image_key]
        for key in self.key_iterator(out):
            tags = torch.as_tensor(out[key], dtype=torch.uint8).flatten()
            slices = image.shape[1 + self.slice_axis]
            if len(tags) != slices:
                raise ValueError(
                    f"case {out.get('case')!r}: {key} has {len(tags)} tags but the volume has {slices} slices along "
                    f"slice_axis={self.slice_axis}, shape {tuple(image.shape[1:])}; rebuild the datalist."
                )
            shape = [1, 1, 1, 1]
            shape[1 + self.slice_axis] = slices
            volume = tags.view(shape).expand(image.shape).contiguous()
            out[key] = MetaTensor(volume, affine=image.affine)
        return out


def tags_of_volume(tag_volume: torch.Tensor) -> torch.Tensor:
    """Tags (D,) uint8 of a tag volume (1, H, W, D), read along its last axis.

    Raises:
        ValueError: if the tags run along another axis, that is, the tagged slices are not the ones the method walks.
    """
    low, high = tag_volume.flatten(0, 2).aminmax(dim=0)
    if not torch.equal(low, high):
        raise ValueError(
            "slice_labels run along another axis than the slices the method walks after reorientation; set slice_axis "
            "to the stored axis that they index, or orientation so that its last letter is their direction."
        )
    return high
