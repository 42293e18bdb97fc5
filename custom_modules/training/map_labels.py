"""Labels of tagged slices, made from their maps, their images and their tags.

In each slice tagged y1, with the map brought to the image's grid and intensities in [0, 1],

    label = map * intensity^p > scale * (Otsu's threshold of that product inside the region),

whose largest components are kept, closed and filled (a cavity belongs to its tumour).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, ResampleToMatch, Transform
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage

from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.inference.body import CROSS, body_mask
from custom_modules.inference.mask import threshold_slices
from custom_modules.training.segmentation import UNKNOWN

IN_PLANE = CROSS[:, :, None]  # in each slice of a volume (H, W, D)


class LoadMapd(Transform):
    """Makes the label of a prepared case from its map, its image and its tags.

    Slices tagged y0 are 0. In slices tagged y1, `UNKNOWN` marks the body's rim, where the map does not count, and the
    whole body if no target is left, since the tag says that there is one.

    Expects `image` (1, H, W, D) MetaTensor in [-1, 1], the tag volume `slice_labels` and `map_file`; adds `label`, the
    same shape, uint8: 0, 1 or `UNKNOWN`.

    Args:
        intensity_power: p.
        erosion: width of the rim, in pixels.
        scale: factor on Otsu's threshold; below 1, because map times intensity falls off before the target's border.
        num_components: number of largest 3D components to keep.

    Raises:
        ValueError: the tags run along another axis than the slices.
    """

    def __init__(self, intensity_power: float, erosion: int, scale: float, num_components: int) -> None:
        self.intensity_power, self.erosion, self.scale = intensity_power, erosion, scale
        self.num_components = num_components
        self.load = LoadImage(image_only=True, ensure_channel_first=True)
        self.onto_image = ResampleToMatch(mode="bilinear", padding_mode="zeros")

    def __call__(self, data: Mapping) -> dict:
        image, tags = data["image"], np.asarray(tags_of_volume(data["slice_labels"].as_tensor()).bool())
        x = np.asarray(image[0])
        body, region = (body_mask(x, rim) & tags for rim in (0, self.erosion))
        saliency = np.asarray(self.onto_image(self.load(data["map_file"]), image)[0])
        target = self._target(saliency * ((x + 1) / 2).clip(min=0) ** self.intensity_power, region) & body
        unknown = body & ~(region & target.any(axis=(0, 1)))
        label = np.where(target, 1, np.where(unknown, UNKNOWN, 0)).astype(np.uint8)
        return {**data, "label": MetaTensor(torch.as_tensor(label[None]), meta=image.meta)}

    def _target(self, product: np.ndarray, region: np.ndarray) -> np.ndarray:
        """Thresholds `product` (H, W, D) inside `region` and cleans what is above; bool, the same shape."""
        slices = [np.moveaxis(volume, -1, 0) for volume in (product, region)]
        target = np.moveaxis(threshold_slices(*slices, "otsu", self.scale), 0, -1)
        target = get_largest_connected_component_mask(target, num_components=self.num_components)
        closed = ndimage.binary_closing(target, IN_PLANE, iterations=2)
        return ndimage.binary_fill_holes(closed | target, IN_PLANE)
