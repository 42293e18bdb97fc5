"""The floor that every method has to beat: the intensities themselves, without a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class IntensityFloor:
    """Takes the intensities of a slice for its saliency."""

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns x_0 + 1, (B, 1, H, W) float32 in [0, 2], for `x_0` (B, 1, H, W) in [-1, 1]; ignores the rest."""
        return x_0.float() + 1
