"""The default method, `segmenter`, as one TorchScript program: raw volume in, mask out, without Python.

It repeats in torch operations what `inference.yaml` puts together from MONAI, SciPy and scikit-image: scale, body box,
resize, the segmenter on each slice and its mirror image, the way back to the native grid, the threshold and the largest
components. Nothing in it is random. It does not compare the volume with those of training.

Inside, a volume passes as slices first, (D, H, W) or (D, 1, H, W). No `from __future__ import annotations` here:
TorchScript reads the annotations.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packing.body import body_box, scale_to_body
from packing.regions import above_half_otsu, erode, fill_holes, largest

DOES = {"method": "segmenter", "gate": "all", "uncertainty": False, "blur": 0, "intensity_power": 0, "smoothing": 0}
SETTINGS = (*DOES, "threshold", "erosion", "num_components", "segmenter_size")  # the knobs that the program reads


def blur(slices: Tensor, sigma: list[float]) -> Tensor:
    """Applies MONAI's `GaussianFilter` to slices (B, 1, H, W): `sigma` in pixels along H and W, zeros outside."""
    for dim, s in enumerate(sigma):
        if s > 0:
            tail = int(max(4 * s, 0.5) + 0.5)
            x = torch.arange(-tail, tail + 1, dtype=slices.dtype, device=slices.device) * 0.70710678 / s
            half = 0.5 * 0.70710678 / s
            kernel = (0.5 * ((x + half).erf() - (x - half).erf())).clamp(min=0)
            if dim == 0:
                slices = F.conv2d(slices, kernel.view(1, 1, -1, 1), padding=[tail, 0])
            else:
                slices = F.conv2d(slices, kernel.view(1, 1, 1, -1), padding=[0, tail])
    return slices


def shrink(slices: Tensor, size: int) -> Tensor:
    """Resizes with anti-aliasing, as `ResizeSlicesd`, slices (D, 1, H, W) to (D, 1, size, size)."""
    sigma = [max(0.0, (n / size - 1) / 2) for n in slices.shape[2:]]
    return F.interpolate(blur(slices, sigma), [size, size], mode="bilinear", align_corners=False)


class TracedNetwork(nn.Module):
    """`WeakDiffusionNetwork` with its optional inputs, around a trace that takes all of them.

    Args:
        traced: has `forward(x, timesteps, class_labels (B, 2) float)` and `classify(x, timesteps)`.
    """

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, x: Tensor, timesteps: Tensor | None = None, class_labels: Tensor | None = None) -> Tensor:
        """Predicts noise, like `x` (B, 1, H, W[, D]); `timesteps` (B,) int, default 0; labels default to y1."""
        t = timesteps if timesteps is not None else torch.zeros([x.shape[0]], dtype=torch.long, device=x.device)
        y = class_labels if class_labels is not None else torch.ones_like(t)
        if not y.is_floating_point():
            y = F.one_hot(y, 2).to(x.dtype)
        if x.dim() == 4:
            return self.traced(x, t, y)
        depth = x.shape[-1]
        slices = x.movedim(-1, 1).flatten(0, 1)
        eps = self.traced(slices, t.repeat_interleave(depth, 0), y.repeat_interleave(depth, 0))
        return eps.unflatten(0, [-1, depth]).movedim(1, -1)

    @torch.jit.export
    def classify(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Returns logits (B, 2) of the classifier for slices (B, 1, H, W) at `timesteps` (B,)."""
        return self.traced.classify(x, timesteps)


class SegmentProgram(nn.Module):
    """Mask and probability of a volume by the segmenter; to be compiled by `torch.jit.script`.

    Args:
        segmenter: a traced `Segmenter`.
        settings: `SETTINGS` of `inference.yaml`.
        margin: voxels around the body's box in a slice.
        batch_size: slices a batch.

    Call: `volume` (1, H, W, D) float32, raw intensities in the config's orientation (LPS: the slices run along the last
    axis). Returns the mask uint8 and the saliency float32 in [0, 1], both shaped as `volume`.

    Raises:
        ValueError: for settings that the program does not do.
    """

    margin: list[int]

    def __init__(self, segmenter: nn.Module, settings: Mapping, margin: Sequence[int], batch_size: int = 16) -> None:
        super().__init__()
        for knob, value in DOES.items():
            if settings[knob] != value:
                raise ValueError(f"the TorchScript program is written for {knob} {value!r}; got {settings[knob]!r}.")
        if isinstance(settings["threshold"], str):
            raise ValueError(f"the TorchScript program needs a number as threshold; got {settings['threshold']!r}.")
        self.segmenter = segmenter
        self.level, self.erosion = float(settings["threshold"]), int(settings["erosion"])
        self.num_components, self.size = int(settings["num_components"]), int(settings["segmenter_size"])
        self.margin, self.batch_size = list(margin), int(batch_size)

    def forward(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.segment(volume)

    def segment(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        if volume.dim() != 4 or volume.shape[0] != 1:
            raise ValueError("volume must be (1, H, W, D); got " + str(volume.shape))
        if not bool(volume.isfinite().all()) or bool((volume == volume.flatten()[0]).all()):
            raise ValueError("the volume is constant, or holds NaN or infinite voxels")
        native = volume[0].float().movedim(-1, 0)
        scaled = scale_to_body(native)
        top, bottom, left, right = body_box(scaled, self.margin)
        slices = (shrink(scaled[:, None, top:bottom, left:right], self.size) * 2 - 1).clamp(-1, 1)
        maps = self.saliency(slices)
        maps = F.interpolate(maps, [bottom - top, right - left], mode="bilinear", align_corners=False)
        maps = F.pad(maps, [left, native.shape[2] - right, top, native.shape[1] - bottom])
        region = maps[:, 1] > 0.5
        saliency = maps[:, 0] * region
        mask = region & (saliency > self.level)
        if self.num_components > 0:
            mask = largest(mask, self.num_components, True)
        return mask.movedim(0, -1)[None].to(torch.uint8), saliency.movedim(0, -1)[None]

    def saliency(self, slices: Tensor) -> Tensor:
        """Maps `slices` (D, 1, H, W) in [-1, 1] to probability and region (D, 2, H, W), as `SaliencyInferer`."""
        body = erode(fill_holes(above_half_otsu(slices[:, 0] - slices.min())), self.erosion)
        maps = torch.zeros_like(slices)
        for batch in body.flatten(1).any(dim=1).nonzero().flatten().split(self.batch_size):
            straight, mirrored = self.segmenter(torch.cat([slices[batch], slices[batch].flip(2)])).sigmoid().chunk(2)
            maps[batch] = (straight + mirrored.flip(2)) / 2
        return torch.cat([maps, body[:, None].to(maps.dtype)], dim=1)
