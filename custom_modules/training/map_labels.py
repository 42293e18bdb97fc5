"""Labels of tagged slices, made from their maps, their images and their tags.

A map says where the target is, an image where it ends. In each slice tagged y1, with the map brought to the image's
grid and intensities in [0, 1],

    seed = map * intensity^p > scale * (Otsu's threshold of that product inside the region).

A target darker than its surroundings is a bright one in the negative: map and image change sign (`sign_of_maps`).

1. A tag says that something is there, not that it is large: a slice's threshold is at least half the volume's median.
2. From the middle of each run of tagged slices outwards, a pixel counts only near the target in the slice before. So
   the organ that lies beyond a target's end is not taken for it.
3. A component grows or shrinks to its edge: the intensity halfway between its median and that of its surroundings.

The largest components are kept, closed and filled (a cavity belongs to its tumour).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, ResampleToMatch, Transform
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage
from skimage.filters import threshold_otsu

from custom_modules.data.reader import VolumeReader
from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.inference.body import CROSS, body_mask
from custom_modules.training.segmentation import UNKNOWN

logger = logging.getLogger(__name__)
TINY = np.finfo(np.float64).tiny  # of an empty map
IN_PLANE = CROSS[:, :, None]  # in each slice of a volume (H, W, D)
FLOOR = 0.5  # least threshold of a slice, of the volume's median
REACH = 2  # pixels from one slice to the next
STEPS, STEP = 3, 2  # how often, and by how many pixels, a component may grow
MIN_PIXELS = 6  # of a component
AGREEMENT = 0.75  # share of the maps, below which their sign is a warning


def sign_of_maps(cases: Sequence[Mapping], given: int | None = None) -> int:
    """Says whether the target is brighter (1) or darker (-1) than its surroundings, by the maps of the tagged slices.

    A map is signed: positive where the condition y1 brightens, negative where it darkens. The target stands out, so the
    tail of its side is the heavier one: m = sum a^3 / sum |a|^3 of a map a, in [-1, 1]; the median of m decides.

    Args:
        cases: with `map_file` each (`mapped_cases`).
        given: the knob `label_sign`, which wins.

    Raises:
        ValueError: `given` is neither 1 nor -1.
    """
    if given is not None:
        if given not in (1, -1):
            raise ValueError(f"label_sign must be 1 (bright target), -1 (dark) or null (by the maps); got {given}.")
        return given
    cubes = (np.asarray(nib.load(case["map_file"]).dataobj, np.float64) ** 3 for case in cases)
    tails = [cube.sum() / max(np.abs(cube).sum(), TINY) for cube in cubes]
    sign = -1 if tails and np.median(tails) < 0 else 1
    agree = sum(tail * sign > 0 for tail in tails)
    alike = agree >= AGREEMENT * len(tails)
    logger.log(logging.INFO if alike else logging.WARNING,
               "the target is %s than its surroundings in %d of %d maps; %s--label_sign sets it",
               "brighter" if sign > 0 else "darker", agree, len(tails),
               "" if alike else "they do not agree, so look at the volumes: ")  # fmt: skip
    return sign


class LoadMapd(Transform):
    """Makes the label of a prepared case from its map, its image and its tags.

    Slices tagged y0 are 0. In slices tagged y1, `UNKNOWN` marks the body's rim, where the map does not count, and the
    whole body if no target is left, since the tag says that there is one.

    Expects `image` (1, H, W, D) MetaTensor in [-1, 1], the tag volume `slice_labels` and `map_file`; adds `label`, the
    same shape, uint8: 0, 1 or `UNKNOWN`.

    Args:
        intensity_power: p.
        erosion: width of the rim, in pixels.
        scale: factor on Otsu's threshold; below 1, because map times intensity falls off before the target's border.
        num_components: number of largest 3D components to keep.
        sign: 1 for a bright target, -1 for a dark one.

    Raises:
        ValueError: the tags run along another axis than the slices.
    """

    def __init__(self, intensity_power: float, erosion: int, scale: float, num_components: int, sign: int) -> None:
        self.intensity_power, self.erosion, self.scale = intensity_power, erosion, scale
        self.num_components, self.sign = num_components, sign
        self.load = LoadImage(VolumeReader, image_only=True, ensure_channel_first=True)
        self.onto_image = ResampleToMatch(mode="bilinear", padding_mode="zeros")

    def __call__(self, data: Mapping) -> dict:
        image, tags = data["image"], np.asarray(tags_of_volume(data["slice_labels"].as_tensor()).bool())
        x = np.asarray(image[0])
        body, region = (body_mask(x, rim) & tags for rim in (0, self.erosion))
        x, saliency = self.sign * x, self.sign * np.asarray(self.onto_image(self.load(data["map_file"]), image)[0])
        product = saliency.clip(min=0) * ((x + 1) / 2).clip(min=0) ** self.intensity_power
        target = self._target(product, region, body, x)
        unknown = body & ~(region & target.any(axis=(0, 1)))
        label = np.where(target, 1, np.where(unknown, UNKNOWN, 0)).astype(np.uint8)
        return {**data, "label": MetaTensor(torch.as_tensor(label[None]), meta=image.meta)}

    def _target(self, product: np.ndarray, region: np.ndarray, body: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Finds the target (H, W, D) bool from `product`, the `region` where it counts, the body and the image `x`."""
        seed = region & (product > self.scale * _thresholds(product, region))
        target = _contiguous(seed, region.any(axis=(0, 1)))
        for _ in range(STEPS):
            target = np.stack([_to_edges(*(a[..., k] for a in (target, body, x))) for k in range(x.shape[2])], axis=2)
        target = get_largest_connected_component_mask(target, num_components=self.num_components)
        closed = ndimage.binary_closing(target, IN_PLANE, iterations=2)
        return ndimage.binary_fill_holes(closed | target, IN_PLANE) & body


def _thresholds(product: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Computes Otsu's threshold of each slice of `product` (H, W, D) inside `region`, and bounds it from below."""
    thresholds = np.full(product.shape[2], np.nan)
    for k in np.flatnonzero(region.any(axis=(0, 1))):
        values = product[..., k][region[..., k]]
        if values.min() < values.max():
            thresholds[k] = threshold_otsu(values)
    if not np.isfinite(thresholds).any():
        return np.full_like(thresholds, np.inf)
    return np.nan_to_num(np.fmax(thresholds, FLOOR * np.nanmedian(thresholds)), nan=np.inf)


def _contiguous(seed: np.ndarray, tagged: np.ndarray) -> np.ndarray:
    """Keeps of `seed` (H, W, D) what lies near the target in the slice before, from the middle of each run outwards."""
    target, (runs, number) = seed.copy(), ndimage.label(tagged)
    for run in (np.flatnonzero(runs == i) for i in range(1, number + 1)):
        seeded = [i for i, k in enumerate(run) if seed[..., k].any()] or [0]
        middle = min(seeded, key=lambda i: abs(i - len(run) // 2))
        upwards, downwards = run[middle:], run[: middle + 1][::-1]
        for before, k in [*zip(upwards, upwards[1:]), *zip(downwards, downwards[1:])]:
            target[..., k] &= ndimage.binary_dilation(target[..., before], CROSS, iterations=REACH)
    return target


def _to_edges(target: np.ndarray, body: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Moves the rim of each component of `target` (H, W), by `STEP` at most, to the edge in the slice `x` (H, W)."""
    x, out = ndimage.gaussian_filter(x, 0.5), np.zeros_like(target)
    labels, number = ndimage.label(target)
    for component in (labels == i for i in range(1, number + 1)):
        if component.sum() < MIN_PIXELS:
            continue
        near, far, rim = (ndimage.binary_dilation(component, CROSS, iterations=n) for n in (STEP, STEP + 2, 1))
        surroundings = far & ~rim & ~target & body
        if not surroundings.any():
            out |= component
            continue
        edge = (np.median(x[component]) + np.median(x[surroundings])) / 2
        inside, _ = ndimage.label(near & body & (x > edge))
        out |= np.isin(inside, np.setdiff1d(inside[component], 0))
    return out
