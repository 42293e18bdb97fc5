"""Batch and loss of the segmenter, whether its labels come from maps (distill.py) or from masks (supervised.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from monai.engines.utils import PrepareBatch
from monai.losses import DiceCELoss

from custom_modules.training.augmentation import Augmentation

UNKNOWN = 2  # in labels, beside 0 (background) and 1 (target): pixels that the loss ignores


class LabelBatch(PrepareBatch):
    """Makes x_0 and label, both (B, 1, H, W) float32 on the engine's device, from a batch of `SliceDataset`.

    Args:
        augmentation: changes the slices at random, and moves their labels along; None in validation.
    """

    def __init__(self, augmentation: Augmentation | None = None) -> None:
        self.augmentation = augmentation

    def __call__(self, batchdata: Mapping, device=None, non_blocking: bool = False, **kwargs):
        x_0, label = (
            batchdata[key].to(device=device, non_blocking=non_blocking, dtype=torch.float32)
            for key in ("image", "label")
        )
        return (x_0, label) if self.augmentation is None else self.augmentation(x_0, label)


class SegmentationLoss(DiceCELoss):
    """Adds Dice, over the whole batch since a slice without target has none, and cross entropy, without `UNKNOWN`."""

    def __init__(self) -> None:
        super().__init__(sigmoid=True, batch=True)

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Computes the loss, a scalar, of `logits` and `label` (B, 1, H, W) float32; labels are 0, 1 or `UNKNOWN`."""
        unknown = label == UNKNOWN  # made correct and certain: logits of background, labelled as such
        return super().forward(logits.masked_fill(unknown, -30.0), label.masked_fill(unknown, 0))
