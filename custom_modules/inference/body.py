"""The body (head, abdomen) in a volume: all that is brighter than the background, without holes."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage
from skimage.filters import threshold_otsu

CROSS = ndimage.generate_binary_structure(2, 1)  # a pixel and its four neighbours
IN_PLANE = CROSS[:, :, None]  # the same in each slice of a volume (H, W, D)


def body_mask(image: np.ndarray, erosion: int = 0) -> np.ndarray:
    """Finds the body in a volume and fills its holes (ventricles, air, dark organs) slice by slice.

    Half of Otsu's threshold separates tissue from air in MR, whether or not the skull was stripped; noise is left out
    by keeping the largest 3D component only.

    Args:
        image: (H, W, D), real; the slices run along the last axis.
        erosion: pixels taken off the rim in every slice.

    Returns:
        (H, W, D) bool.
    """
    mask = ndimage.binary_fill_holes(_tissue(image), IN_PLANE)
    return ndimage.binary_erosion(mask, IN_PLANE, iterations=erosion) if erosion else mask  # 0 would mean: until empty


def _tissue(image: np.ndarray) -> np.ndarray:
    """Finds the body with its holes, (H, W, D) bool."""
    mask = image - image.min() > 0.5 * (threshold_otsu(image.ravel()) - image.min())
    return get_largest_connected_component_mask(ndimage.binary_opening(mask, IN_PLANE), connectivity=1)


def body_box(image: torch.Tensor) -> torch.Tensor:
    """Marks the body's in-plane bounding box over all slices, (1, H, W, D) bool like `image`; for `CropForegroundd`."""
    mask = _tissue(np.asarray(image[0])).any(axis=2)  # holes do not change the box
    return torch.as_tensor(mask)[None, :, :, None].expand(image.shape)
