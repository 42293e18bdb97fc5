"""Volumes of a few voxels, the inferer with a method that copies and records what it is given, and what it returns."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor
from torch import nn

from custom_modules.inference.inferer import SaliencyInferer

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # voxels of 1 mm
SIZE, DEPTH = 16, 5


def ball(depth: int = DEPTH, seed: int = 0) -> torch.Tensor:
    """Makes a volume (1, 1, 16, 16, depth) in [-1, 1]: a disc of random tissue in every slice, air (-1) around it."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = ((y - 7.5) ** 2 + (x - 7.5) ** 2 < 36)[..., None]
    tissue = 0.2 + 0.8 * torch.rand(SIZE, SIZE, depth, generator=generator)
    return torch.where(disc, tissue, -1.0)[None, None]


def tag_volume(tags: list[int]) -> torch.Tensor:
    """Makes of tags what `TagVolumed` does, (1, 1, 16, 16, len(tags)) uint8."""
    return torch.tensor(tags, dtype=torch.uint8).expand(1, 1, SIZE, SIZE, len(tags)).contiguous()


class Copy:
    """A method whose map is the slice itself; remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.networks: list = []

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: list[int]) -> torch.Tensor:
        assert x_0.ndim == 4 and x_0.shape[:2] == (len(slices), 1) and type(x_0) is torch.Tensor
        self.batches.append(list(slices))
        self.networks.append(network)
        return x_0.clone()

    @property
    def slices(self) -> list[int]:
        return sum(self.batches, [])


class BrightIsPositive(nn.Module):
    """Classifier whose logit of y1 is 10 x (mean of the slice's disc - 0.6): p > 0.5 where it is brighter than 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[int] = []

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        self.timesteps += timesteps.tolist()
        mean = x[:, 0, 5:11, 5:11].mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(mean), 10 * (mean - 0.6)], dim=1)


def inferer(method=None, **settings) -> SaliencyInferer:
    return SaliencyInferer(method or Copy(), **{"gate": "all", "amp": False, **settings})


def answer(*maps: np.ndarray, region: np.ndarray | None = None, affine: np.ndarray = LPS) -> MetaTensor:
    """Stacks the maps of a volume and their region (by default all of it), (C + 1, H, W, D), on the native grid."""
    region = np.ones_like(maps[0]) if region is None else region
    return MetaTensor(torch.as_tensor(np.stack([*maps, region]), dtype=torch.float32), affine=affine)


def two_blobs() -> np.ndarray:
    """(6, 6, 4): 1 in a blob of 2 x 2 x 3 = 12 voxels, 3 in one of 4, -1 somewhere."""
    saliency = np.zeros((6, 6, 4), np.float32)
    saliency[:2, :2, :3], saliency[4:, 4:, 1], saliency[0, 5] = 1, 3, -1
    return saliency
