"""The body in a volume and the scale of its intensities in torch operations alone, for TorchScript.

The same as `custom_modules.inference.body`, which says what is computed and why. Volumes pass as slices first,
(D, H, W). No `from __future__ import annotations`: TorchScript reads the annotations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from packing.regions import above_half_otsu, bounds, part


def percentile(values: Tensor, q: float) -> Tensor:
    """Finds the percentile `q` along the last axis, (...,) for `values` (..., N), with linear interpolation.

    `torch.quantile` refuses more than 16 million values, and `torch.median` takes the lower of the two in the middle.
    """
    ordered, last = values.sort(dim=-1).values, values.shape[-1] - 1
    rank = q / 100 * last
    return torch.lerp(ordered[..., int(rank)], ordered[..., min(int(rank) + 1, last)], rank - int(rank))


def block_medians(volume: Tensor) -> Tensor:
    """Takes the medians of blocks of 3 x 3 pixels, (D, H / 3, W / 3); of less than a block, `volume` itself."""
    height, width = volume.shape[1] // 3, volume.shape[2] // 3
    if height == 0 or width == 0:
        return volume
    blocks = volume[:, : height * 3, : width * 3].reshape(-1, height, 3, width, 3)
    return blocks.transpose(2, 3).flatten(3).median(dim=3).values


def find_filling(y: Tensor) -> tuple[bool, float, float]:
    """Says whether a constant surrounds the image that is no background, which one, and what it becomes."""
    constant = float(y[0, 0, 0])
    void = y == y[0, 0, 0]
    share = float(void.double().mean())
    if share <= 0.02 or share == 1.0:
        return False, 0.0, 0.0
    rest = y[~void]
    low, middle = float(percentile(rest, 1.0)), float(percentile(rest, 50.0))
    if constant > low + 0.25 * (middle - low):
        return True, constant, low - 0.5 * (middle - low)
    whole = float(part(void, ~void).double().mean()) < 0.01
    return constant < low - (middle - low) and ((constant < 0.0 and low >= 0.0) or whole), constant, low


def level_slices(volume: Tensor) -> Tensor:
    """Brings slices of `volume` (D, H, W) far from their neighbours' level to it, and fills dead ones from them."""
    y = block_medians(volume).flatten(1)
    low = percentile(percentile(y, 2.0), 50.0)
    usual_slice = percentile(y.T, 50.0) - low
    tissue = usual_slice > 0.25 * percentile(usual_slice, 98.0)
    if not bool(tissue.any()):
        return volume
    level = (percentile(y[:, tissue], 50.0) - low).clamp(min=0)
    usual, depth = percentile(level, 75.0), len(level)
    gains, dead = torch.ones_like(level), torch.zeros_like(level, dtype=torch.bool)
    for k in range(depth):
        near: list[Tensor] = []
        if k > 0:
            near.append(percentile(level[max(k - 3, 0) : k], 50.0))
        if k < depth - 1:
            near.append(percentile(level[k + 1 : k + 4], 50.0))
        if len(near) == 0:
            continue
        sides = torch.stack(near)
        dark = len(near) == 2 and bool(level[k] < 0.5 * sides.min())
        bright = bool(level[k] > 1.75 * sides.max()) and bool(1.75 * sides.max() > 0.2 * usual)
        if dark and bool(level[k] < 0.15 * sides.min()):
            dead[k] = True
        elif dark or bright:
            gains[k] = sides.mean() / level[k]
    volume = torch.where((gains == 1)[:, None, None], volume, (volume - low) * gains[:, None, None] + low)
    sound = (~dead).nonzero().flatten()
    for k in dead.nonzero().flatten():
        volume[k] = (volume[sound[sound < k][-1]] + volume[sound[sound > k][0]]) / 2
    return volume


def find_body(volume: Tensor) -> tuple[float, float, Tensor, Tensor]:
    """Finds the body in `volume` (D, H, W) float32: `low`, `level`, the mask (D, H / 3, W / 3) bool, and the volume in
    which a filling has become background."""
    y = block_medians(volume)
    filled, constant, becomes = find_filling(y)
    if filled:
        y = y.masked_fill(y == constant, becomes)
        volume = volume.masked_fill(volume == constant, becomes)
    low = float(percentile(percentile(y.flatten(1), 2.0), 50.0))
    top = percentile(y.flatten(1), 98.0)
    top = top[top > low]
    level = float(percentile(top, 50.0)) if top.numel() > 0 else low + 1.0
    mask = above_half_otsu(y.clamp(low, level) - low)
    area = mask.flatten(1).sum(dim=1)
    if bool(area.any()):
        levels = [percentile(y[k][mask[k]], 90.0) for k in (area > area.max() / 4).nonzero().flatten()]
        level = float(percentile(torch.stack(levels), 50.0))
    return low, level, mask, volume


def scale_to_body(volume: Tensor) -> Tensor:
    """Scales `volume` (D, H, W) float32 to [0, 1], as `ScaleToBodyd`.

    Raises:
        ValueError: the volume shows no body.
    """
    low, level, mask, filled = find_body(level_slices(volume))
    if not bool(mask.any()):
        raise ValueError("the volume shows no body: nothing is left of its bright voxels after opening")
    r = ((filled - low) / (1.4 * max(level - low, 1e-12))).clamp(0, 4)
    return r * (1 + r**8) ** (-1 / 8)


def body_box(scaled: Tensor, margin: list[int]) -> tuple[int, int, int, int]:
    """Finds the body's box in a `scaled` volume (D, H, W), widened by `margin`: first row, end, first column, end."""
    height, width = scaled.shape[1], scaled.shape[2]
    mask = find_body(scaled)[2].any(dim=0)
    if mask.shape[0] != height or mask.shape[1] != width:
        mask = mask.repeat_interleave(3, 0).repeat_interleave(3, 1)
        mask = F.pad(mask, [0, width - mask.shape[1], 0, height - mask.shape[0]])
    top, bottom = bounds(mask.any(dim=1), margin[0])
    left, right = bounds(mask.any(dim=0), margin[1])
    return top, bottom, left, right
