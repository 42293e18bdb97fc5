"""Slices to masks in one forward pass: by the student, which learned from maps, or by the upper bound, from masks.

Both are the same U-Net (`networks.segmenter.Segmenter`), trained by the same loss on the same slices. Only the labels
differ: the student's are made from saliency maps and slice tags (`distill.yaml`), those of the upper bound are masks
(`train_supervised.yaml`). Both see each slice straight and mirrored, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from custom_modules.networks.precision import autocast
from custom_modules.networks.weak_diffusion import WeakDiffusionNetwork
from custom_modules.networks.weights import load_weights


def logits(network: nn.Module, x_0: torch.Tensor, amp: bool) -> torch.Tensor:
    """Returns logits of the target (B, 1, H, W) float32 for `x_0` (B, 1, H, W) float32 in [-1, 1]; `amp`: by bf16."""
    with autocast(x_0.device, amp):
        return network(x_0).float()


class SegmentationStep(nn.Module):
    """Runs `network` under mixed precision in training: MONAI's engines open it on CUDA only.

    Forward: `x_0` (B, 1, H, W) float32 in [-1, 1]; returns logits of the target (B, 1, H, W) float32.
    """

    def __init__(self, network: nn.Module, amp: bool = True) -> None:
        super().__init__()
        self.network, self.amp = network.to(memory_format=torch.channels_last), amp

    def forward(self, x_0: torch.Tensor) -> torch.Tensor:
        return logits(self.network, x_0, self.amp)


class Student:
    """Maps by the label-only segmenter, which learned from maps and tags; it is part of the network.

    Args:
        amp: bf16 where the hardware has it.
    """

    def __init__(self, amp: bool = True) -> None:
        self.amp = amp

    def __call__(self, x_0: torch.Tensor, network: WeakDiffusionNetwork, slices: Sequence[int]) -> torch.Tensor:
        """Returns the `probability` of the target for `x_0`; `slices` is ignored.

        Raises:
            ValueError: if the segmenter was not trained.
        """
        check_distilled(network)
        return probability(network.segmenter, x_0, self.amp)


class UpperBound:
    """Maps by a U-Net that was TRAINED ON MASKS: the upper bound.

    Args:
        network: the U-Net, one channel in and one out.
        path: its weights, as `train_supervised.yaml` writes them.
        amp: bf16 where the hardware has it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds other weights.
    """

    def __init__(self, network: nn.Module, path: str | Path, amp: bool = True) -> None:
        remedy = "train it with masks (configs/train_supervised.yaml over train.yaml)"
        load_weights(network, path, knob="supervised_ckpt_path", remedy=remedy)
        self.network, self.amp = network.to(memory_format=torch.channels_last).eval(), amp

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns the `probability` of the target for `x_0`; the label-only `network` and `slices` are ignored."""
        return probability(self.network.to(x_0.device), x_0, self.amp)


@torch.no_grad()
def probability(network: nn.Module, x_0: torch.Tensor, amp: bool) -> torch.Tensor:
    """Averages the probability of the target over slices and their mirror images along H (left and right).

    Returns (B, 1, H, W) float32 in [0, 1] for `x_0` (B, 1, H, W) float32 in [-1, 1]; `amp` as in `logits`.
    """
    straight, mirrored = logits(network, torch.cat([x_0, x_0.flip(2)]), amp).sigmoid().chunk(2)
    return (straight + mirrored.flip(2)) / 2


def check_distilled(network: WeakDiffusionNetwork) -> None:
    """Checks that the segmenter of `network` was trained.

    Raises:
        ValueError: if it has only its random start.
    """
    if network.segmenter is None or not network.distilled:
        raise ValueError(
            "these weights (ckpt_path) have no trained segmenter: run distill (configs/distill.yaml over train.yaml), "
            "or choose another --method, such as cdm."
        )
