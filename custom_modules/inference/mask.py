"""From the saliency to the mask: thresholds on the native grid, largest components."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.transforms.utils import get_largest_connected_component_mask
from scipy import ndimage
from skimage.filters import threshold_otsu

from custom_modules.uncertainty import expected_dice, voxel_entropy


class SaliencyToMaskd(MapTransform):
    """Thresholds the saliency on the native grid: positive part, Otsu inside the region, largest components.

    `keys` hold what `SaliencyInferer` returns, brought back to the input's grid: (C + 1, H, W, D), C maps of the signed
    saliency and the region. They become the binary mask (1, H, W, D) uint8 of the maps' mean; that mean, 0 outside the
    region, is kept under `saliency`, (1, H, W, D) float32. Negative values mean that the target would darken the voxel;
    they count as 0.

    With `uncertainty`, two entries are added (see `custom_modules.uncertainty`): `uncertainty`, the entropy
    of each voxel, (1, H, W, D) float32 in bits, and `expected_dice`, a number or None. They come from the masks of the
    C maps, or where C is 1 from the map's values, which must then be probabilities (segmenter, supervised).

    Args:
        threshold: `otsu` (a threshold per slice), `average_otsu` (the mean of the slices' thresholds, for the volume),
            or a number.
        num_components: largest 3D components kept; 0 keeps all.
        orientation: axis codes of preprocessing; the slices run along the axis of its last letter.
        uncertainty: whether to add the two entries.

    Raises:
        ValueError: `threshold` is none of these, or a number is below 0.
    """

    def __init__(
        self,
        keys="pred",
        threshold: str | float = "otsu",
        num_components: int = 1,
        orientation: str = "LPS",
        uncertainty: bool = False,
    ) -> None:
        super().__init__(keys)
        if isinstance(threshold, str) and threshold not in ("otsu", "average_otsu"):
            raise ValueError(f"threshold must be 'otsu', 'average_otsu' or a number; got {threshold!r}.")
        if not isinstance(threshold, str) and not threshold >= 0:
            raise ValueError(f"threshold must be >= 0: only what the target brightens counts; got {threshold}.")
        if num_components < 0:
            raise ValueError(f"num_components must be >= 0; got {num_components}.")
        self.threshold, self.num_components = threshold, num_components
        self.orientation, self.uncertainty = orientation, uncertainty

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        for key in self.key_iterator(out):
            pred = out[key].cpu()  # where masks are made
            region = pred[-1:].as_tensor() > 0.5
            maps = torch.where(region, pred[:-1].float(), 0.0)
            saliency = maps.mean(dim=0, keepdim=True) if len(maps) > 1 else maps
            mask = self._mask(saliency, region)
            if "stem" in out:  # what SaveImaged names the files by
                saliency.meta["filename_or_obj"] = f"{out['stem']}.nii.gz"
            if self.uncertainty:
                votes = [self._mask(one[None], region) for one in maps] if len(maps) > 1 else [saliency.clamp(0, 1)]
                out["uncertainty"] = MetaTensor(voxel_entropy(votes), meta=saliency.meta)
                out["expected_dice"] = expected_dice(votes, mask)
            out["saliency"] = saliency
            out[key] = MetaTensor(mask, meta=saliency.meta)
        return out

    def _mask(self, saliency: MetaTensor, region: torch.Tensor) -> torch.Tensor:
        """Makes the mask uint8 of one `saliency` in `region`, all (1, H, W, D)."""
        axis = slice_axis_of(np.asarray(saliency.affine.cpu()), self.orientation)
        saliency, region = saliency[0].cpu().numpy(), region[0].cpu().numpy()
        out = np.zeros(region.shape, np.uint8)
        for box in _box(region):
            slices = (np.moveaxis(volume[box], axis, 0) for volume in (saliency, region))
            mask = np.moveaxis(threshold_slices(*slices, self.threshold), 0, axis)
            for found in ndimage.find_objects(mask.astype(np.uint8)) if self.num_components else ():
                mask[found] = get_largest_connected_component_mask(mask[found], num_components=self.num_components)
            out[box] = mask
        return torch.as_tensor(out)[None]


def _box(region: np.ndarray) -> list[tuple[slice, slice]]:
    """Finds the box of `region` (H, W, D) bool along H and W, beyond which nothing counts; none where it is empty."""
    return ndimage.find_objects(region.any(axis=2).astype(np.uint8))


def threshold_slices(
    saliency: np.ndarray, region: np.ndarray, threshold: str | float, scale: float = 1.0
) -> np.ndarray:
    """Thresholds the positive part of each slice of `saliency` (D, H, W) inside `region` (D, H, W) bool, to (D, H, W)
    bool. `threshold` is that of `SaliencyToMaskd`; Otsu's thresholds are multiplied by `scale`."""
    if not isinstance(threshold, str):
        return region & (saliency > max(threshold, 0))
    positive = np.maximum(saliency, 0)
    thresholds = np.full(len(saliency), np.nan)
    for k in np.flatnonzero(region.any(axis=(1, 2))):
        values = positive[k][region[k]]
        if values.min() < values.max():
            thresholds[k] = threshold_otsu(values)
    if threshold == "average_otsu" and np.isfinite(thresholds).any():
        thresholds = np.where(np.isnan(thresholds), np.nan, np.nanmean(thresholds))
    return region & (positive > scale * np.nan_to_num(thresholds, nan=np.inf)[:, None, None])


def otsu_of_volume(image: np.ndarray) -> float:
    """Finds Otsu's threshold of an `image` of millions of voxels, float32: scikit-image's, by torch's histogram, which
    takes half as long as NumPy's."""
    low, high = float(image.min()), float(image.max())
    if low == high:  # as scikit-image's, of an image; of its histogram there is none
        return low
    counts = torch.histc(torch.as_tensor(image), 256, low, high).numpy().astype(float)
    return float(threshold_otsu(hist=(counts, low + (high - low) / 256 * (np.arange(256) + 0.5))))


def slice_axis_of(affine: np.ndarray, orientation: str) -> int:
    """Returns the axis of an array with `affine` (4, 4) that runs along the last letter of `orientation` (S in LPS)."""
    pairs = ({"L", "R"}, {"A", "P"}, {"S", "I"})
    wanted = next(i for i, pair in enumerate(pairs) if orientation[-1] in pair)
    return int(np.flatnonzero(nib.io_orientation(affine)[:, 0] == wanted)[0])
