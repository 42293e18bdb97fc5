"""The class-conditional denoiser f(x_t, t, y), whose condition may be a mixture of the two classes."""

from __future__ import annotations

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

NUM_CLASSES = 2  # y0: the slice does not show the target; y1: it does


class SoftEmbedding(nn.Embedding):
    """Embeds a label or a mixture of labels.

    Forward: labels (B,) int, which are looked up, or weights (B, classes) float, which give `w @ weight`. A one-hot row
    equals the lookup, and the derivative with respect to the condition is the network's own. Returns (B, dim).
    """

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        if labels.is_floating_point():
            return labels.to(self.weight.dtype) @ self.weight
        return super().forward(labels)


class ConditionalUNet(DiffusionModelUNet):
    """Predicts the noise, f(x_t, t, y): MONAI's diffusion U-Net with two classes that may be mixed.

    With `patch_size` p the slice enters and leaves as p p sub-images of H / p x W / p (space to depth). At the noise
    levels that matter here the finest scale holds almost no signal, and the network becomes two to three times as fast
    (Hoogeboom et al. 2023, "simple diffusion", arXiv 2301.11093).

    Args:
        in_channels: channels of x.
        patch_size: p.
        kwargs: `channels`, `attention_levels`, `num_res_blocks`, ... of `DiffusionModelUNet`.

    Forward: `x` (B, C, H, W) float, `timesteps` (B,) int, `class_labels` (B,) int or (B, 2) float weights; returns
    the predicted noise, same shape as `x`. H and W must be divisible by p 2^(levels - 1).
    """

    def __init__(self, in_channels: int = 1, patch_size: int = 1, **kwargs) -> None:
        width = in_channels * patch_size**2
        super().__init__(2, width, width, num_class_embeds=NUM_CLASSES, **kwargs)
        self.class_embedding = SoftEmbedding(NUM_CLASSES, self.class_embedding.embedding_dim)
        self.patch_size = patch_size
        self.size_divisor = patch_size * 2 ** (len(self.block_out_channels) - 1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if any(size % self.size_divisor for size in x.shape[2:]):
            raise ValueError(
                f"image_size must be divisible by {self.size_divisor} for this network_def; got a slice of "
                f"{tuple(x.shape[2:])}."
            )
        patches = nn.functional.pixel_unshuffle(x, self.patch_size)
        return nn.functional.pixel_shuffle(super().forward(patches, timesteps, *args, **kwargs), self.patch_size)
