"""Labels of tagged slices from their maps, images and tags."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import KeepLargestConnectedComponent, LoadImage, MapTransform, ResampleToMatch
from scipy import ndimage

from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.inference.body import CROSS, body_mask
from custom_modules.inference.mask import threshold_slices
from custom_modules.training.segmentation import UNKNOWN


class LoadMapd(MapTransform):
    """Makes the label of a prepared case from its map, its image and its tags.

    The map is brought to the image's grid and multiplied by the intensities; then, in each slice tagged y1,

        label = map * intensity^p > scale * (Otsu's threshold of that inside the region),

    of which the largest components are kept, closed and filled (a cavity belongs to its tumour). `UNKNOWN` in these
    slices are the body's rim, where the map does not count, and the whole body where nothing is left of the target,
    since the tag says that it is there. Slices tagged y0 are 0.

    Expects `image` (1, H, W, D) MetaTensor in [-1, 1], the tag volume `slice_labels` and `map_file`; adds `label`, the
    same shape, uint8: 0, 1 or `UNKNOWN`.

    Args:
        intensity_power: p.
        erosion: width of the rim, in pixels.
        scale: of Otsu's threshold; below 1, because map times intensity falls off before the target's border.
        num_components: largest 3D components kept.

    Raises:
        ValueError: if the tags run along another axis than the slices.
    """

    def __init__(
        self,
        keys: str = "label",
        intensity_power: float = 2.0,
        erosion: int = 4,
        scale: float = 0.8,
        num_components: int = 1,
    ) -> None:
        super().__init__(keys)
        self.intensity_power, self.erosion, self.scale = intensity_power, erosion, scale
        self.keep_largest = KeepLargestConnectedComponent(is_onehot=False, num_components=num_components)
        self.load = LoadImage(image_only=True, ensure_channel_first=True)
        self.onto_image = ResampleToMatch(mode="bilinear", padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        image, tags = out["image"], tags_of_volume(out["slice_labels"].as_tensor())
        x = np.asarray(image[0])
        body, region = (body_mask(x, rim) & np.asarray(tags.bool()) for rim in (0, self.erosion))
        saliency = np.asarray(self.onto_image(self.load(out["map_file"]), image)[0])
        saliency = saliency * ((x + 1) / 2).clip(min=0) ** self.intensity_power
        slices = [np.moveaxis(volume, -1, 0) for volume in (saliency, region)]
        target = np.moveaxis(threshold_slices(*slices, "otsu", self.scale), 0, -1)
        target = np.asarray(self.keep_largest(torch.as_tensor(target[None], dtype=torch.uint8))[0]) > 0
        for k in np.flatnonzero(target.any(axis=(0, 1))):
            closed = ndimage.binary_closing(target[..., k], CROSS, iterations=2)
            target[..., k] = ndimage.binary_fill_holes(closed | target[..., k]) & body[..., k]
        unknown = body & ~(region & target.any(axis=(0, 1)))
        label = np.where(target, 1, np.where(unknown, UNKNOWN, 0)).astype(np.uint8)
        for key in self.keys:
            out[key] = MetaTensor(torch.as_tensor(label[None]), meta=image.meta)
        return out
