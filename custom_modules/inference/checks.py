"""Checks of a volume before any work is done on it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from monai.transforms import MapTransform


class CheckVolumed(MapTransform):
    """Refuses a volume that no method can work on; the error names the case, what is wrong and how to fix it.

    Expects (C, ...) after `EnsureChannelFirstd` and returns (1, H, W, D): the only channel, or the one that `channel`
    in the case names (multi-modal files such as MSD's).

    Raises:
        ValueError: the volume is not 3D, has several channels and none is chosen, holds NaN or infinity, or is
            constant.
    """

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = self._check(out[key], out.get("case", "volume"), out.get("channel"))
        return out

    def _check(self, image: torch.Tensor, case: str, channel: int | None) -> torch.Tensor:
        where = f"case {case!r}: the image"
        if channel is not None:
            if not 0 <= channel < len(image):
                raise ValueError(f"{where} has {len(image)} channels, but the datalist names channel {channel}.")
            image = image[channel][None]
        shape = tuple(image.shape)
        if image.ndim != 4:
            raise ValueError(f"{where} must be one 3D volume; got {len(shape) - 1} dimensions, {shape[1:]}.")
        if shape[0] != 1:
            raise ValueError(
                f"{where} is 4D with {shape[0]} channels or time points; split it into 3D files, or name one by "
                f'"channel": 0 in the datalist.'
            )
        low, high = map(float, image.aminmax())  # NaN where there is one
        if not math.isfinite(high - low):
            count = int((~torch.isfinite(image)).sum())
            raise ValueError(f"{where} holds {count} NaN or infinite voxels; replace them before use.")
        if low == high:
            raise ValueError(f"{where} is constant ({low:g} everywhere), empty or broken; export it again.")
        return image
