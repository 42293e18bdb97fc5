"""The classifier p(y | x_t) of noised slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import get_down_block, get_mid_block, get_timestep_embedding
from torch import nn

from custom_modules.networks.denoiser import NUM_CLASSES


class NoisyImageClassifier(nn.Module):
    """Classifies slices x_t: the encoder of the diffusion U-Net, mean pooling and a linear head, for any resolution.

    The encoder follows Dhariwal & Nichol 2021 (arXiv 2105.05233). The arguments are those of `ConditionalUNet`.

    Forward: `x` (B, C, H, W) float, `timesteps` (B,) int; returns logits (B, 2). At t = 0 it judges clean slices.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        attention_levels: Sequence[bool],
        num_res_blocks: int,
        num_head_channels: int,
        norm_num_groups: int = 32,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size, self.time_channels = patch_size, channels[0]
        width = 4 * channels[0]  # of the time embedding
        self.time_embed = nn.Sequential(nn.Linear(channels[0], width), nn.SiLU(), nn.Linear(width, width))
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels[0], kernel_size=3, padding=1)
        common = dict(spatial_dims=2, temb_channels=width, norm_num_groups=norm_num_groups, norm_eps=1e-6)
        common |= dict(num_head_channels=num_head_channels, transformer_num_layers=1, cross_attention_dim=None)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                in_channels=channels[max(level - 1, 0)],
                out_channels=channels[level],
                num_res_blocks=num_res_blocks,
                add_downsample=level < len(channels) - 1,
                resblock_updown=False,
                with_attn=attention_levels[level],
                with_cross_attn=False,
                **common,
            )
            for level in range(len(channels))
        )
        self.middle_block = get_mid_block(in_channels=channels[-1], with_conditioning=False, **common)
        self.norm = nn.GroupNorm(norm_num_groups, channels[-1])
        self.activation = nn.SiLU()  # a module, so that class activation maps can name it
        self.head = nn.Linear(channels[-1], NUM_CLASSES)

    def features(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the last features before pooling, (B, channels[-1], H / d, W / d); d = patch_size 2^(levels - 1)."""
        emb = self.time_embed(get_timestep_embedding(timesteps, self.time_channels).to(x.dtype))
        h = self.conv_in(nn.functional.pixel_unshuffle(x, self.patch_size))
        for block in self.down_blocks:
            h, _ = block(hidden_states=h, temb=emb)
        return self.activation(self.norm(self.middle_block(hidden_states=h, temb=emb)))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x, timesteps).mean(dim=(2, 3)))
