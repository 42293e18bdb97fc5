"""Batch and loss of the segmenter and of the upper bound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from monai.engines.utils import PrepareBatch
from monai.losses import DiceCELoss

UNKNOWN = 2  # in labels: 0 is background, 1 the target, and of these pixels nobody knows


class LabelBatch(PrepareBatch):
    """Batch of `SliceDataset` with labels -> x_0 and label, each (B, 1, H, W) float32, on the engine's device."""

    def __call__(self, batchdata: Mapping, device=None, non_blocking: bool = False, **kwargs):
        return tuple(
            batchdata[key].to(device=device, non_blocking=non_blocking, dtype=torch.float32)
            for key in ("image", "label")
        )


class SegmentationLoss(DiceCELoss):
    """Dice, over the batch since a slice without target has none, and cross entropy; `UNKNOWN` pixels are right."""

    def __init__(self) -> None:
        super().__init__(sigmoid=True, batch=True)

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of `logits` and `label` (B, 1, H, W), whose values are 0, 1 and `UNKNOWN`."""
        unknown = label == UNKNOWN
        return super().forward(logits.masked_fill(unknown, -30.0), label.masked_fill(unknown, 0))
