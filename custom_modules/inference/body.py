"""The body (head, abdomen) in a volume."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu

CROSS = ndimage.generate_binary_structure(2, 1)


def body_mask(image: np.ndarray, erosion: int = 0) -> np.ndarray:
    """The body (head, abdomen) in a volume, (H, W, D) bool: all brighter than the background, filled slice by slice.

    Half of Otsu's threshold separates tissue from air in MR, whether or not the skull was stripped; the largest 3D
    component leaves out noise, and holes (ventricles, air, dark organs) are filled in every slice along the last axis.

    Args:
        image: (H, W, D), real.
        erosion: pixels taken off the rim in every slice.
    """
    mask = _tissue(image)
    for k in range(mask.shape[2]):
        mask[..., k] = ndimage.binary_fill_holes(mask[..., k])
        if erosion:
            mask[..., k] = ndimage.binary_erosion(mask[..., k], CROSS, iterations=erosion)
    return mask


def _tissue(image: np.ndarray) -> np.ndarray:
    """`body_mask` with its holes."""
    mask = image - image.min() > 0.5 * (threshold_otsu(image.ravel()) - image.min())
    mask = ndimage.binary_opening(mask, CROSS[:, :, None])
    labels, count = ndimage.label(mask)
    if count > 1:
        mask = labels == np.argmax(np.bincount(labels[mask]))
    return mask


def body_box(image: torch.Tensor) -> torch.Tensor:
    """`select_fn` of `CropForegroundd`: the body's in-plane bounding box over all slices, as a mask like `image`."""
    mask = _tissue(np.asarray(image[0])).any(axis=2)  # holes do not change the box
    return torch.as_tensor(mask)[None, :, :, None].expand(image.shape)
