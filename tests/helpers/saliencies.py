"""Saliencies of a few voxels, as `SaliencyInferer` returns them."""

import numpy as np
import torch
from monai.data import MetaTensor

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # voxels of 1 mm


def answer(*maps: np.ndarray, region: np.ndarray | None = None, affine: np.ndarray = LPS) -> MetaTensor:
    """Stacks the maps of a volume and their region (by default all of it), (C + 1, H, W, D), on the native grid."""
    region = np.ones_like(maps[0]) if region is None else region
    return MetaTensor(torch.as_tensor(np.stack([*maps, region]), dtype=torch.float32), affine=affine)


def two_blobs() -> np.ndarray:
    """(6, 6, 4): 1 in a blob of 2 x 2 x 3 = 12 voxels, 3 in one of 4, -1 somewhere."""
    saliency = np.zeros((6, 6, 4), np.float32)
    saliency[:2, :2, :3], saliency[4:, 4:, 1], saliency[0, 5] = 1, 3, -1
    return saliency
