"""The body (head, abdomen) in a volume, and a scale of its intensities that no single artefact can move.

A percentile of the whole volume and Otsu's threshold of raw intensities follow whatever is brightest or darkest: an
artefact, one cold voxel, a padding of -1024, an offset. The statistics used here are medians:

    y      median of each block of 3 x 3 pixels: single odd voxels vanish
    low    background: the median over the slices of their 2nd percentile of y
    body   y within [low, the slices' median 98th percentile], above half of Otsu's threshold (less if that is hollow),
           opened; its largest component
    level  bright tissue: the median over the slices of the body's 90th percentile of y
    x'     r (1 + r^8)^(-1/8) with r = max(x - low, 0) / (1.4 (level - low)): linear, then saturating at 1

A constant that surrounds the image without being its background (padding, zeros around z-scored tissue) is replaced by
a background intensity first, and a slice that is far brighter or darker than its neighbours is brought to their level.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.transforms.utils import get_largest_connected_component_mask
from monai.utils import convert_to_dst_type, convert_to_tensor
from scipy import ndimage

from custom_modules.inference.mask import otsu_of_volume

logger = logging.getLogger(__name__)
CROSS = ndimage.generate_binary_structure(2, 1)  # a pixel and its four neighbours
IN_PLANE = CROSS[:, :, None]  # the same in each slice of a volume (H, W, D)
BLOCK = 3  # pixels
HOLLOW = 0.3  # share of its box that a body fills at least: heads and trunks of three sources 0.33 to 0.6
UPPER = 1.4  # times the body's level: about the 99.5th percentile of a volume (LGG, BraTS, CHAOS: 1.4 to 1.6)
BRIGHT, DARK, DEAD = 1.75, 0.5, 0.15  # times the neighbours' level; in 110 volumes of three sources, none strays
BOX = "body_box"  # key of the meta data under which the box travels from the scale to the crop
# Compare and exchange these pairs of nine values, and the fifth is their median (Paeth, Graphics Gems, 1990)
MEDIAN_OF_9 = "12 45 78 01 34 67 12 45 78 03 58 47 36 14 25 47 42 64 42"


class Body(NamedTuple):
    """The body in a volume (H, W, D), as `find_body` returns it.

    Attributes:
        low: intensity of the background.
        level: intensity of bright tissue.
        mask: (H / 3, W / 3, D) bool, a value a block of pixels; (H, W, D) where an image is smaller than a block.
        filling: the constant that surrounds the image without being its background, and what replaces it; or None.
    """

    low: float
    level: float
    mask: np.ndarray
    filling: tuple[float, float] | None


def find_body(image: np.ndarray) -> Body:
    """Finds the body in a volume (H, W, D), real, and the intensities of its background and bright tissue."""
    return _find_body(_block_medians(np.asarray(image, np.float32)))


def _find_body(y: np.ndarray) -> Body:
    """Finds the body in the medians `y` of a volume's blocks."""
    body, y = _outline(y)
    area = body.mask.sum(axis=(0, 1))  # slices at the ends show too little of the body to count
    levels = [np.percentile(y[..., k][body.mask[..., k]], 90) for k in np.flatnonzero(area > area.max() / 4)]
    return body._replace(level=float(np.median(levels))) if levels else body


def _outline(y: np.ndarray) -> tuple[Body, np.ndarray]:
    """Finds the body, its level that of the slices' 98th percentiles; returns `y` with its filling replaced, too."""
    filling = _filling(y)
    if filling:
        y = np.where(y == filling[0], filling[1], y)
    bottom, top = np.percentile(y.reshape(-1, y.shape[2]), [2, 98], axis=0)  # of each slice
    low = float(np.median(bottom))
    level = float(np.median(top[top > low])) if (top > low).any() else low + 1.0
    return Body(low, level, _largest_bright(np.clip(y, low, level) - low), filling), y


def _block_medians(image: np.ndarray) -> np.ndarray:
    """Takes the medians of blocks of 3 x 3 pixels; returns an image smaller than a block as it is."""
    height, width = (n // BLOCK for n in image.shape[:2])
    if not height or not width:
        return image
    rows, columns = height * BLOCK, width * BLOCK
    y = [np.ascontiguousarray(image[i:rows:BLOCK, j:columns:BLOCK]) for i in range(BLOCK) for j in range(BLOCK)]
    for i, j in (map(int, pair) for pair in MEDIAN_OF_9.split()):
        y[i], y[j] = np.minimum(y[i], y[j]), np.maximum(y[i], y[j])
    return y[4]


def _filling(y: np.ndarray) -> tuple[float, float] | None:
    """Finds a constant that surrounds the image but is no background: amid its tissue, or far below it and either
    negative while the image is not, or around a whole block (the zeros around a stripped head are its background)."""
    constant = y[0, 0, 0]
    void = y == constant
    if not 0.02 < void.mean() < 1:
        return None
    low, middle = np.percentile(y[~void], [1, 50])
    if constant > low + 0.25 * (middle - low):
        return float(constant), float(low - 0.5 * (middle - low))
    block = void[ndimage.find_objects((~void).astype(np.uint8))[0]]
    if constant < low - (middle - low) and (constant < 0 <= low or block.mean() < 0.01):
        return float(constant), float(low)
    return None


def _largest_bright(image: np.ndarray) -> np.ndarray:
    """Finds the largest component above half of Otsu's threshold, (H, W, D) bool, in `image` (H, W, D) >= 0.

    Half of Otsu's threshold separates tissue from air in MR, whether or not the skull was stripped. The opening and the
    largest component leave noise out. Where fat is far brighter than all else, only its ring lies above, which leaves
    its box empty; then Otsu's threshold of what lies below separates the rest from air.
    """
    threshold = 0.5 * otsu_of_volume(image)
    for _ in range(4):
        mask = image > threshold
        for combine in (np.logical_and, np.logical_or):  # erosion, dilation: an opening, ten times as fast as SciPy's
            rim = np.pad(mask, [(1, 1), (1, 1), (0, 0)])  # what is outside is background
            mask = functools.reduce(combine, [rim[:-2, 1:-1], rim[2:, 1:-1], rim[1:-1, :-2], rim[1:-1, 2:]], mask)
        mask = get_largest_connected_component_mask(mask, connectivity=1)
        if not mask.any() or mask[ndimage.find_objects(mask.astype(np.uint8))[0]].mean() > HOLLOW:
            break
        threshold = otsu_of_volume(image[image < threshold])
    return mask


def level_slices(image: torch.Tensor, y: np.ndarray) -> tuple[torch.Tensor, np.ndarray, list[int]]:
    """Brings slices whose level strays from their neighbours' to the neighbours' level, and fills dead ones from them.

    The level of a slice is its median, above the background, where most slices show tissue: a lesion is smaller than
    that. That of its neighbours is the median of up to three slices on either side. The slices at the ends may be dark.

    Returns:
        `image` (H, W, D) float32 and the medians of its blocks `y` (H / 3, W / 3, D), mended (or themselves), and the
        indices of the slices that strayed.
    """
    low = np.median(np.percentile(y.reshape(-1, y.shape[2]), 2, axis=0))
    usual_slice = np.median(y, axis=2) - low
    tissue = usual_slice > 0.25 * np.percentile(usual_slice, 98)
    if not tissue.any():
        return image, y, []
    level = np.maximum(np.median(y[tissue], axis=0) - low, 0)
    sides = [(level[max(k - 3, 0) : k], level[k + 1 : k + 4]) for k in range(len(level))]
    near = [[float(np.median(side)) for side in pair if side.size] for pair in sides]
    usual = np.percentile(level, 75)
    dark = [len(n) == 2 and own < DARK * min(n) for own, n in zip(level, near)]
    stray = [d or (bool(n) and own > BRIGHT * max(n) > 0.2 * usual) for own, n, d in zip(level, near, dark)]
    if not any(stray):
        return image, y, []
    image, y = image.clone(), y.copy()
    sound = [k for k, d in enumerate(dark) if not (d and level[k] < DEAD * min(near[k]))]
    for volume in (image, y):
        for k in np.flatnonzero(stray):
            if k in sound:
                volume[..., k] = (volume[..., k] - low) * float(np.mean(near[k]) / level[k]) + low
        for k in np.setdiff1d(np.flatnonzero(stray), sound):
            closest = [max(n for n in sound if n < k), min(n for n in sound if n > k)]
            volume[..., k] = volume[..., closest].mean(-1)
    return image, y, np.flatnonzero(stray).tolist()


class ScaleToBodyd(MapTransform):
    """Scales a volume (1, H, W, D) to [0, 1], float32: background 0, bright tissue near 0.7, 1 at saturation.

    Belongs before crop and resize: what those pad with is 0, the background. See the top of this file. The box for
    `body_box` is found on the way and travels in the meta data of a MetaTensor.

    Raises:
        ValueError: the volume shows no body; the error names the case.
    """

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            scaled, box = self._scale(out[key][0], out.get("case", "volume"))
            out[key] = convert_to_dst_type(scaled[None], out[key], dtype=scaled.dtype)[0]  # with meta data and history
            if isinstance(out[key], MetaTensor):
                out[key].meta[BOX] = box
        return out

    def _scale(self, image: torch.Tensor, case: str) -> tuple[torch.Tensor, list[int]]:
        x = convert_to_tensor(image, dtype=torch.float32)
        x, y, stray = level_slices(x, _block_medians(x.cpu().numpy()))
        if stray:
            logger.warning(
                "case %s: slices %s are far brighter or darker than their neighbours and were brought to their level; "
                "check the masks there.", case, stray,
            )  # fmt: skip
        body = _find_body(y)
        if not body.mask.any():
            raise ValueError(
                f"case {case!r}: the image shows no body, no bright region of {3 * BLOCK} pixels or more. Is it an MR "
                "volume, neither a mask nor noise, with its slices along the right axis? Otherwise leave the case out."
            )
        scaled = torch.cat([_saturate(rows, body) for rows in x.split(4)])  # as much as stays in the cache
        # a scale keeps the order of intensities, so medians of the scaled image are scaled medians; a filling does not
        y = _block_medians(scaled.cpu().numpy()) if body.filling else _saturate(torch.as_tensor(y), body).numpy()
        return scaled, _box(_outline(y)[0].mask, x.shape)


def _saturate(x: torch.Tensor, body: Body) -> torch.Tensor:
    """Scales `x` float32 to [0, 1]: see the top of this file."""
    if body.filling:
        x = x.masked_fill(x == body.filling[0], body.filling[1])
    r = (x - body.low).div_(UPPER * max(body.level - body.low, 1e-12)).clamp_(0, 4)
    return r.square().square_().square_().add_(1).sqrt_().sqrt_().rsqrt_().mul_(r)  # pow(8), pow(-1/8) are slow


def body_mask(image: np.ndarray, erosion: int = 0) -> np.ndarray:
    """Finds the body in a scaled volume and fills its holes (ventricles, air, dark organs) slice by slice.

    Args:
        image: (H, W, D), real, scaled by `ScaleToBodyd`; the slices run along the last axis.
        erosion: pixels taken off the rim in every slice.

    Returns:
        (H, W, D) bool.
    """
    slices = _largest_bright(image - image.min()).transpose(2, 0, 1)
    outside = np.pad(~slices, [(0, 0), (1, 1), (1, 1)], constant_values=True)
    labels, _ = ndimage.label(outside.reshape(-1, outside.shape[2]), CROSS)  # their rims join: one component
    filled = (labels != labels[0, 0]).reshape(outside.shape)  # tissue, and holes: what no rim reaches
    mask = filled[:, 1:-1, 1:-1].transpose(1, 2, 0)
    return ndimage.binary_erosion(mask, IN_PLANE, iterations=erosion) if erosion else mask  # 0 would mean: until empty


def body_box(image: torch.Tensor) -> np.ndarray:
    """Marks the body's in-plane bounding box over all slices, (1, H, W, D) bool like `image`, which `ScaleToBodyd`
    has scaled; for `CropForegroundd`, which looks through an array five times as fast as through a tensor."""
    box = image.meta.get(BOX) if isinstance(image, MetaTensor) else None
    top, bottom, left, right = box or _box(find_body(np.asarray(image[0])).mask, image.shape[1:])
    mask = np.zeros(image.shape[1:3], bool)
    mask[top:bottom, left:right] = True
    return np.broadcast_to(mask[None, :, :, None], image.shape)


def _box(mask: np.ndarray, shape: Sequence[int]) -> list[int]:
    """Finds first row, end, first column and end of a body's `mask` (`Body.mask`) in an image of `shape` (H, W, D)."""
    block = 1 if mask.shape == tuple(shape) else BLOCK
    if not mask.any():
        return [0, shape[0], 0, shape[1]]
    rows, columns, _ = ndimage.find_objects(mask.astype(np.uint8))[0]
    return [int(edge) * block for edge in (rows.start, rows.stop, columns.start, columns.stop)]
