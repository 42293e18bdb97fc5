"""Regions of a volume in torch operations alone, for TorchScript: what SciPy and scikit-image do in `custom_modules`.

Volumes pass as slices first, (D, H, W). No `from __future__ import annotations`: TorchScript reads the annotations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dilate(x: Tensor, dims: list[int], box: bool) -> Tensor:
    """Takes the maximum over each element's neighbours along `dims`, in a box or only a cross, of `x` (D, H, W)."""
    out = x
    for dim in dims:
        source, n = out if box else x, x.shape[dim]
        wider = out.clone()
        for first, other in ((0, 1), (1, 0)):
            part = wider.narrow(dim, first, n - 1)
            part.copy_(torch.maximum(part, source.narrow(dim, other, n - 1)))
        out = wider
    return out


def erode(mask: Tensor, iterations: int) -> Tensor:
    """Takes pixels off the rim of each slice of `mask` (D, H, W) bool; outside of the image counts as background."""
    for _ in range(iterations):
        background = F.pad(mask.logical_not(), [1, 1, 1, 1], value=True)
        mask = dilate(background, [1, 2], False)[:, 1:-1, 1:-1].logical_not()
    return mask


def components(mask: Tensor, dims: list[int], box: bool) -> Tensor:
    """Labels the connected components of `mask` (D, H, W) bool: int32, 0 outside; neighbours as in `dilate`.

    Each voxel starts as its own label. Then each label joins the highest that touches it, and chains of joined labels
    are shortened by pointer jumping, so that the rounds grow with the logarithm of a component's extent.
    """
    parent = torch.arange(mask.numel() + 1, dtype=torch.int32, device=mask.device)
    labels = parent[1:].view_as(mask) * mask
    done = False
    while not done:
        highest = dilate(labels, dims, box) * mask
        rises = highest > labels
        done = not bool(rises.any())
        if not done:
            parent = parent.scatter_reduce(0, labels[rises].long(), highest[rises], "amax")
            grandparent = parent[parent]
            while not torch.equal(parent, grandparent):
                parent, grandparent = grandparent, grandparent[grandparent]
            labels = parent[labels]
    return labels


def bounds(present: Tensor, margin: int) -> tuple[int, int]:
    """Returns first index and end of the True part of `present` (N,) bool, widened by `margin` within the image."""
    where = present.nonzero().flatten()
    return max(int(where[0]) - margin, 0), min(int(where[-1]) + margin + 1, present.numel())


def part(volume: Tensor, mask: Tensor) -> Tensor:
    """Returns the view of `volume` (D, H, W) in the box of `mask` (D, H, W) bool, which has to hold something."""
    plane = mask.any(dim=0)
    front, back = bounds(mask.flatten(1).any(dim=1), 0)
    top, bottom = bounds(plane.any(dim=1), 0)
    left, right = bounds(plane.any(dim=0), 0)
    return volume[front:back, top:bottom, left:right]


def largest(mask: Tensor, count: int, box: bool) -> Tensor:
    """Keeps the `count` largest components of `mask` (D, H, W) bool; `box`: voxels touch by corners too."""
    if not bool(mask.any()):
        return mask
    labels = components(part(mask, mask), [0, 1, 2], box)
    sizes = torch.bincount(labels.flatten())
    sizes[0] = 0  # the background
    keep = torch.zeros_like(sizes, dtype=torch.bool)
    keep[sizes.topk(min(count, sizes.numel())).indices] = True
    out = torch.zeros_like(mask)
    part(out, mask).copy_((keep & (sizes > 0))[labels])
    return out


def fill_holes(mask: Tensor) -> Tensor:
    """Fills what the background cannot reach from the border of its slice; `mask` (D, H, W) bool."""
    labels = components(F.pad(mask.logical_not(), [1, 1, 1, 1], value=True), [1, 2], False)
    return (labels != labels[:, :1, :1])[:, 1:-1, 1:-1]


def otsu(values: Tensor) -> Tensor:
    """Finds Otsu's threshold, 0-d, of `values` (N,) float32 in 256 bins, as scikit-image has it."""
    low, high = values.min(), values.max()
    if bool(low == high):
        return low
    edges = low + torch.arange(257, dtype=values.dtype, device=values.device) * ((high - low) / 256)
    edges[256] = high
    bins = (torch.bucketize(values.contiguous(), edges, right=True) - 1).clamp(0, 255)
    counts = torch.bincount(bins, minlength=256).double()
    centres = (edges[:-1] + edges[1:]) / 2
    moments = counts * centres.double()
    below, above = counts.cumsum(0)[:-1], counts.flip(0).cumsum(0).flip(0)[1:]
    mean_below, mean_above = moments.cumsum(0)[:-1] / below, moments.flip(0).cumsum(0).flip(0)[1:] / above
    return centres[(below * above * (mean_below - mean_above) ** 2).argmax()]


def above_half_otsu(volume: Tensor) -> Tensor:
    """Finds the body (D, H, W) bool of `volume` float32, 0 or more, as `inference.body._largest_bright` does."""
    threshold = 0.5 * otsu(volume.flatten())
    mask = volume > threshold
    for _ in range(4):
        mask = largest(dilate(erode(volume > threshold, 1), [1, 2], False), 1, False)
        if not bool(mask.any()) or float(part(mask, mask).double().mean()) > 0.3:
            break
        threshold = otsu(volume[volume < threshold])
    return mask
