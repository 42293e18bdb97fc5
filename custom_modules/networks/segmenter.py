"""The segmenter: a 2D U-Net that learns from saliency maps or, as the upper bound, from masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import BasicUNet
from monai.networks.nets.basic_unet import UpCat
from torch import nn

from custom_modules.networks.normalisation import choose_layout


class Segmenter(nn.Module):
    """Runs MONAI's U-Net on patches of p x p pixels (space to depth): p times the resolution at the same cost.

    Args:
        patch_size: p.
        features: widths of `BasicUNet`.
        norm_num_groups: groups of its normalisation.

    Forward: slices `x` (B, 1, H, W) float in [-1, 1]; returns logits of the target (B, 1, H, W). H and W must be
    divisible by 16 p.
    """

    def __init__(self, patch_size: int, features: Sequence[int], norm_num_groups: int = 8) -> None:
        super().__init__()
        norm = ("group", {"num_groups": norm_num_groups})
        self.unet = BasicUNet(2, patch_size**2, patch_size**2, features, norm=norm)
        for module in self.unet.modules():
            if isinstance(module, UpCat):
                module.is_pad = False  # sizes are divisible; to pad by nothing copies: a quarter of the time
        choose_layout(self)
        self.patch_size, self.size_divisor = patch_size, 16 * patch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(size % self.size_divisor for size in x.shape[2:]):
            raise ValueError(
                f"segmenter_size must be divisible by {self.size_divisor} for this segmenter; got a slice of "
                f"{tuple(x.shape[2:])}."
            )
        patches = nn.functional.pixel_unshuffle(x, self.patch_size)
        return nn.functional.pixel_shuffle(self.unet(patches).contiguous(), self.patch_size)

    def first_layers(self) -> tuple[nn.Module, nn.Module]:
        """Returns the layers that `appearance` uses, in order."""
        return self.unet.conv_0, self.unet.down_1

    def appearance(self, x: torch.Tensor) -> torch.Tensor:
        """Returns mean and standard deviation over each slice of the first layers' features, (B, F) float32."""
        h, statistics = nn.functional.pixel_unshuffle(x, self.patch_size), []
        for layer in self.first_layers():
            h = layer(h)
            mean, n = h.mean(dim=(2, 3), keepdim=True), h[0, 0].numel()
            spread = torch.linalg.vector_norm(h - mean, dim=(2, 3)) / (n - 1) ** 0.5  # h.std takes four times as long
            statistics += [mean[..., 0, 0], spread]
        return torch.cat(statistics, dim=1)
