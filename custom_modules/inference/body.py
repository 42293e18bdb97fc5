"""The body (head, abdomen) in a volume, and a scale of its intensities that nothing single can move.

A percentile of the whole volume and Otsu's threshold of raw intensities are decided by whatever is brightest: one
artefact, one cold voxel, a padding of -1024, an offset. Here all statistics are medians:

    y      median of each block of 3 x 3 pixels: a few odd voxels do not show
    low    background: the median over the slices of their 2nd percentile
    body   Otsu's threshold of y within [low, the slices' median 98th percentile], opened; its largest component
    level  the median over the slices of the body's 90th percentile
    x'     r (1 + r^8)^(-1/8) with r = (x - low) / (1.4 (level - low)), at least 0: linear, then saturating at 1

Of a constant around what was measured (padding, zeros around z-scored tissue) only its place is kept: it becomes `low`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage
from skimage.filters import threshold_otsu

CROSS = ndimage.generate_binary_structure(2, 1)  # a pixel and its four neighbours
IN_PLANE = CROSS[:, :, None]  # the same in each slice of a volume (H, W, D)
BLOCK = 3  # pixels
UPPER = 1.4  # times the body's level: about the 99.5th percentile of a volume (LGG, BraTS, CHAOS: 1.4 to 1.6)


class Body(NamedTuple):
    """What `find_body` finds: `low` and `level`, intensities of background and bright tissue; `mask` (H / 3, W / 3, D)
    bool; `filling`, the constant that is no background although it surrounds the image, and what it becomes, or None."""

    low: float
    level: float
    mask: np.ndarray
    filling: tuple[float, float] | None


def find_body(image: np.ndarray) -> Body:
    """Finds the body and the intensities of its background and tissue in a volume (H, W, D), real."""
    blocks = _block_medians(image)
    filling = _filling(blocks)
    y = blocks if filling is None else np.where(blocks == filling[0], filling[1], blocks)
    bottom, top = np.percentile(y.reshape(-1, y.shape[2]), [2, 98], axis=0)  # of each slice
    low = float(np.median(bottom))
    tissue = top[top > low]
    level = float(np.median(tissue)) if tissue.size else low + 1.0
    mask = _largest(np.clip(y, low, level) - low)
    area = mask.sum(axis=(0, 1))
    if area.any():  # slices at the ends, with little body, say little of its level
        slices = np.flatnonzero(area > area.max() / 4)
        level = float(np.median([np.percentile(y[..., k][mask[..., k]], 90) for k in slices]))
    return Body(low, level, mask, filling)


def _block_medians(image: np.ndarray) -> np.ndarray:
    height, width = (n // BLOCK for n in image.shape[:2])
    if not height or not width:
        return image
    blocks = image[: height * BLOCK, : width * BLOCK].reshape(height, BLOCK, width, BLOCK, -1)
    return np.median(blocks, axis=(1, 3))


def _filling(y: np.ndarray) -> tuple[float, float] | None:
    """Finds a constant that surrounds the image and is no background: far below it, or amid the tissue's values."""
    constant = y[0, 0, 0]
    void = y == constant
    if not 0.02 < void.mean() < 1:
        return None
    low, middle = np.percentile(y[~void], [1, 50])
    if low - (middle - low) <= constant <= low + 0.25 * (middle - low):
        return None
    return float(constant), float(low if constant < low else low - 0.5 * (middle - low))


def _largest(image: np.ndarray) -> np.ndarray:
    """Finds the largest component above half of Otsu's threshold, (H, W, D) bool, for `image` (H, W, D) >= 0."""
    mask = ndimage.binary_opening(image > 0.5 * threshold_otsu(image.ravel()), IN_PLANE)
    return get_largest_connected_component_mask(mask, connectivity=1)


class ScaleToBodyd(MapTransform):
    """Scales a volume (1, H, W, D) to [0, 1]: 0 is the background, bright tissue is near 0.7, and 1 is saturation.

    Comes before the crop and before resizing, which pads with 0. See the top of this file.
    """

    def __call__(self, data):
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key]
            body, x = find_body(np.asarray(image[0])), image.as_tensor()
            if body.filling is not None:
                x = torch.where(x == body.filling[0], body.filling[1], x)
            r = ((x - body.low) / (UPPER * max(body.level - body.low, 1e-12))).clamp(0, 4)
            scaled = r * (1 + r**8) ** (-1 / 8)
            out[key] = MetaTensor(scaled, meta=image.meta, applied_operations=image.applied_operations)
        return out


def body_mask(image: np.ndarray, erosion: int = 0) -> np.ndarray:
    """Finds the body in a prepared volume and fills its holes (ventricles, air, dark organs) slice by slice.

    Args:
        image: (H, W, D), real, scaled (`ScaleToBodyd`); the slices run along the last axis.
        erosion: pixels taken off the rim in every slice.

    Returns:
        (H, W, D) bool.
    """
    mask = ndimage.binary_fill_holes(_largest(image - image.min()), IN_PLANE)
    return ndimage.binary_erosion(mask, IN_PLANE, iterations=erosion) if erosion else mask  # 0 would mean: until empty


def body_box(image: torch.Tensor) -> torch.Tensor:
    """Marks the body's in-plane bounding box over all slices, (1, H, W, D) bool like `image`; for `CropForegroundd`."""
    mask = find_body(np.asarray(image[0])).mask.any(axis=2)
    height, width = image.shape[1:3]
    if mask.shape != (height, width):
        mask = np.kron(mask, np.ones((BLOCK, BLOCK), bool))
        mask = np.pad(mask, [(0, height - mask.shape[0]), (0, width - mask.shape[1])])
    return torch.as_tensor(mask)[None, :, :, None].expand(image.shape)
