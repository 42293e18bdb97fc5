"""Transforms this product adds to MONAI's: volume checks, tags that travel with the volume, the body region, masks.

A volume passes (1, H, W, D); after `Orientationd` the slices run along the last axis, whatever the order on disk.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import KeepLargestConnectedComponent, MapTransform
from skimage.filters import threshold_otsu


class SaliencyToMaskd(MapTransform):
    """Thresholds the saliency on the native grid: positive part, Otsu inside the region, largest components.

    `keys` hold what `SaliencyInferer` returns, brought back to the input's grid: (C + 1, H, W, D), C maps of the signed
    saliency and the region. They become the binary mask (1, H, W, D) uint8 of the maps' mean, which is kept inside the
    region under `saliency_key`, (1, H, W, D) float32. Negative values mean that the target would darken the voxel; they
    count as 0.

    With `uncertainty`, each voxel has a probability p: how many of the C maps' own masks hold it, or of a single map
    its value, which then must be one (segmenter, supervised). `uncertainty_key` is its binary entropy in bits, 0 (sure)
    to 1, (1, H, W, D) float32. `expected_dice`, a number, is the Dice that the mask would have if p were true: the mean
    of those with the C masks, or 2 sum(p mask) / (sum(p) + sum(mask)); None where both are empty.

    Args:
        threshold: `otsu` (a threshold a slice), `average_otsu` (the mean of the slices' thresholds, for the volume),
            or a number.
        num_components: largest 3D components kept; 0 keeps all.
        orientation: axis codes of preprocessing; the slices run along its last letter.
        uncertainty: whether to say how sure the mask is.

    Raises:
        ValueError: if `threshold` is something else.
    """

    def __init__(
        self,
        keys="pred",
        threshold: str | float = "otsu",
        num_components: int = 1,
        orientation: str = "LPS",
        saliency_key: str = "saliency",
        uncertainty: bool = False,
        uncertainty_key: str = "uncertainty",
    ) -> None:
        super().__init__(keys)
        if isinstance(threshold, str) and threshold not in ("otsu", "average_otsu"):
            raise ValueError(f"threshold must be 'otsu', 'average_otsu' or a number; got {threshold!r}.")
        if not isinstance(threshold, str) and not threshold >= 0:
            raise ValueError(f"threshold must be >= 0: only what the target brightens counts; got {threshold}.")
        if num_components < 0:
            raise ValueError(f"num_components must be >= 0; got {num_components}.")
        self.threshold, self.num_components = threshold, num_components
        self.keep_largest = KeepLargestConnectedComponent(is_onehot=False, num_components=num_components)
        self.orientation, self.saliency_key = orientation, saliency_key
        self.uncertainty, self.uncertainty_key = uncertainty, uncertainty_key

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            pred = out[key].cpu()  # where masks are made
            region = pred[-1:].as_tensor() > 0.5
            maps = (pred[:-1] * region).to(torch.float32)
            saliency = maps.mean(dim=0, keepdim=True)
            mask = self._mask(saliency, region)
            if "stem" in out:  # what SaveImaged names the files by
                saliency.meta["filename_or_obj"] = f"{out['stem']}.nii.gz"
            if self.uncertainty:
                several = [self._mask(one[None], region) for one in maps] if len(maps) > 1 else [saliency.clamp(0, 1)]
                p = torch.stack([torch.as_tensor(one).float() for one in several]).mean(dim=0)
                entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / np.log(2)
                out[self.uncertainty_key] = MetaTensor(entropy, meta=saliency.meta)
                out["expected_dice"] = _expected_dice(several, mask)
            out[self.saliency_key] = saliency
            out[key] = MetaTensor(mask, meta=saliency.meta)
        return out

    def _mask(self, saliency: MetaTensor, region: torch.Tensor) -> torch.Tensor:
        """The mask uint8 of one `saliency` in `region`, all (1, H, W, D)."""
        axis = slice_axis_of(np.asarray(saliency.affine.cpu()), self.orientation)
        slices = [np.moveaxis(np.asarray(v[0].cpu()), axis, 0) for v in (saliency, region)]
        mask = threshold_slices(*slices, self.threshold)
        mask = torch.as_tensor(np.moveaxis(mask, 0, axis).astype(np.uint8))[None]
        return self.keep_largest(mask) if self.num_components else mask


def _expected_dice(several: Sequence[torch.Tensor], mask: torch.Tensor) -> float | None:
    """The mean Dice of `mask` with `several` masks, or probabilities, of its shape; None where all are empty."""
    sums = [(float((one * mask).sum()), float(one.sum() + mask.sum())) for one in several]
    dice = [2 * both / total for both, total in sums if total]
    return sum(dice) / len(dice) if dice else None


def threshold_slices(
    saliency: np.ndarray, region: np.ndarray, threshold: str | float, scale: float = 1.0
) -> np.ndarray:
    """Binary slices (D, H, W) of `saliency` (D, H, W) inside `region` (D, H, W) bool; see `SaliencyToMaskd`. Otsu's
    thresholds count `scale` times."""
    positive = np.maximum(saliency, 0)
    if not isinstance(threshold, str):
        return region & (positive > threshold)
    thresholds = np.full(len(saliency), np.nan)
    for k in np.flatnonzero(region.any(axis=(1, 2))):
        values = positive[k][region[k]]
        if values.min() < values.max():
            thresholds[k] = threshold_otsu(values)
    if threshold == "average_otsu" and np.isfinite(thresholds).any():
        thresholds = np.where(np.isnan(thresholds), np.nan, np.nanmean(thresholds))
    return region & (positive > scale * np.nan_to_num(thresholds, nan=np.inf)[:, None, None])


def slice_axis_of(affine: np.ndarray, orientation: str) -> int:
    """Which axis of an array with `affine` (4, 4) runs along the last letter of `orientation`, such as S in LPS."""
    pairs = ({"L", "R"}, {"A", "P"}, {"S", "I"})
    wanted = next(i for i, pair in enumerate(pairs) if orientation[-1] in pair)
    return int(np.flatnonzero(nib.io_orientation(affine)[:, 0] == wanted)[0])
