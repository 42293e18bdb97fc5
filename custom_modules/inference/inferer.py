"""From a volume to slices, through any saliency method, and back to a volume.

The inferer knows no method: a method is a callable `(x_0 (B, 1, H, W), network, slices) -> (B, C, H, W)`, chosen by the
config; C is 1, or the number of maps whose spread shows how sure the method is. The inferer decides which slices are
processed (the gate), batches them, and returns a volume with the input's meta data, so that MONAI's `Invertd` can bring
it back to the input's grid.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import ignite.distributed as idist
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.networks.layers import GaussianFilter
from scipy.ndimage import gaussian_filter1d
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.inference.body import body_mask
from custom_modules.networks.precision import autocast

logger = logging.getLogger(__name__)
GATES = ("classifier", "tags", "all")
FACTS = "inference"  # key of the meta data under which the inferer's facts travel


class SaliencyInferer(Inferer):
    """Runs a saliency method on the positive slices of volumes.

    Called with `inputs` (B, 1, H, W, D) float32 in [-1, 1], slices along the last axis, the `network`, and for
    `gate="tags"` the tag volume `slice_labels` (B, 1, H, W, D). Returns a MetaTensor (B, C + 1, H, W, D) float32: the
    saliency maps (0 in slices that are not processed), and last the region in which they count (1 in the eroded body of
    processed slices, else 0). The region is a channel because some hosts (MONAI Label, MONAI Deploy) hand nothing but
    `pred` to the postprocessing; it is not multiplied in, because interpolating the product would smear its rim.

    `meta["inference"]` of the result holds the facts of each volume: "n_slices" (B,), processed, "seconds_per_slice"
    (B,), the method's own time, where the classifier is the gate "gate_probability" (B, D), of y1, and what
    `appearance` says. `Invertd` replaces the meta data, so `VolumeEvaluator` takes the facts out before.

    Here the method finds what is bright, and the classifier calls a slice positive for its brightest pixel:

    >>> class BrightestPixel(nn.Module):
    ...     def classify(self, x, timesteps):  # (B, 1, H, W) -> logits of y0 and y1 (B, 2)
    ...         brightest = x.amax(dim=(1, 2, 3))
    ...         return torch.stack([torch.zeros_like(brightest), 10 * brightest - 5], dim=1)
    >>> volume = torch.full((1, 1, 8, 8, 3), -1.0)  # air
    >>> volume[:, :, 2:6, 2:6] = 0.0  # 16 pixels of tissue in all three slices; the body is without their four corners
    >>> volume[:, :, 3, 3, 1] = 1.0  # a bright pixel in the second
    >>> inferer = SaliencyInferer(lambda x_0, network, slices: x_0.clamp(min=0), gate="classifier", gate_threshold=0.5)
    >>> output = inferer(volume, BrightestPixel())
    >>> saliency, region = output[0].as_tensor()
    >>> saliency.nonzero().tolist(), region.sum(dim=(0, 1)).tolist()
    ([[3, 3, 1]], [0.0, 12.0, 0.0])
    >>> output.meta["inference"]["n_slices"].tolist()
    [1]
    >>> [round(p, 3) for p in output.meta["inference"]["gate_probability"][0].tolist()]
    [0.007, 0.993, 0.007]

    Args:
        method: `(x_0 (B, 1, H, W) float32 in [-1, 1], network, slices) -> (B, C, H, W)`.
        gate: which slices are processed: `classifier` (probability at t = 0 above `gate_threshold`), `tags` (those that
            the case's `slice_labels` call positive) or `all`. Slices without body are never processed.
        gate_threshold: probability in [0, 1].
        gate_smoothing: standard deviation, in slices, of a Gaussian over the classifier's logits: a slice whose
            neighbours show the target probably shows it, too. 0 for none.
        gate_size: side in pixels of the slices that the classifier was trained on; it gets slices resized to that.
            None: it gets them as they are.
        batch_size: slices per batch.
        blur: standard deviation, in pixels, of a Gaussian over each slice's map; 0 for none (the paper).
        intensity_power: the map is multiplied by the slice's intensity in [0, 1] to this power: the map knows where a
            bright target is, the image knows its border; 0 for the map alone (the paper).
        erosion: pixels taken off the rim of the body; beyond them the map does not count (the scalp competes).
        smoothing: standard deviation, in slices, of a Gaussian over the processed slices; 0 for none.
        amp: bf16 for the gate where the hardware has it.
        appearance: `(inputs, network) -> facts of each volume`, which compares them with those of training; None: they
            are not compared.

    Raises:
        ValueError: a setting is out of its range, or tags are asked for and the case has none.
    """

    def __init__(
        self,
        method: Callable[[torch.Tensor, nn.Module, Sequence[int]], torch.Tensor],
        gate: str = "classifier",
        gate_threshold: float = 0.5,
        gate_smoothing: float = 0.0,
        gate_size: int | None = None,
        batch_size: int = 16,
        blur: float = 0.0,
        intensity_power: float = 0.0,
        erosion: int = 0,
        smoothing: float = 0.0,
        amp: bool = True,
        appearance: Callable[[torch.Tensor, nn.Module], Sequence[dict[str, float]]] | None = None,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"gate must be one of {list(GATES)}; got {gate!r}.")
        if not 0 <= gate_threshold <= 1:
            raise ValueError(f"gate_threshold is a probability and must be in [0, 1]; got {gate_threshold}.")
        values = {"batch_size": batch_size, "gate_smoothing": gate_smoothing, "blur": blur}
        values |= {"intensity_power": intensity_power, "erosion": erosion, "smoothing": smoothing}
        for name, value in values.items():
            if not value >= (least := int(name == "batch_size")):
                raise ValueError(f"{name} must be >= {least}; got {value}.")
        self.method, self.gate, self.gate_threshold = method, gate, gate_threshold
        self.gate_smoothing, self.gate_size = gate_smoothing, gate_size
        self.batch_size, self.blur, self.intensity_power = batch_size, blur, intensity_power
        self.erosion, self.smoothing, self.amp = erosion, smoothing, amp
        self.appearance = appearance

    def __call__(
        self, inputs: torch.Tensor, network: nn.Module, slice_labels: torch.Tensor | None = None
    ) -> MetaTensor:
        tags = [None] * len(inputs) if slice_labels is None else slice_labels
        volumes, facts = zip(*(self._process(volume, network, t) for volume, t in zip(inputs, tags, strict=True)))
        output = MetaTensor(torch.stack(volumes))
        if isinstance(inputs, MetaTensor):
            output.copy_meta_from(inputs)
        if self.appearance is not None:
            for fact, found in zip(facts, self.appearance(inputs, network), strict=True):
                fact |= found
        output.meta[FACTS] = default_collate(facts)
        return output

    def _process(
        self, volume: torch.Tensor, network: nn.Module, tags: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        """Processes a volume (1, H, W, D): its maps and region (C + 1, H, W, D), and its facts."""
        volume = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
        slices = volume.movedim(-1, 0)  # (D, 1, H, W)
        body = torch.as_tensor(body_mask(volume[0].cpu().numpy(), self.erosion)).movedim(-1, 0)
        score = self._gate(slices, network, tags)
        chosen = (score > (self.gate_threshold if self.gate == "classifier" else 0)) & body.flatten(1).any(dim=1)
        indices = chosen.nonzero().flatten().tolist()
        saliency, warm = self._maps(slices, indices, network)
        saliency = smooth_along(saliency, chosen, self.smoothing)
        region = (body & chosen[:, None, None])[:, None].to(saliency)
        facts = {"seconds_per_slice": sum(warm) / max(len(warm), 1), "n_slices": len(indices)}
        if self.gate == "classifier":
            facts["gate_probability"] = score
        return torch.cat([saliency, region], dim=1).movedim(0, -1), facts

    def _maps(
        self, slices: torch.Tensor, indices: Sequence[int], network: nn.Module
    ) -> tuple[torch.Tensor, list[float]]:
        """Runs the method on slices `indices` of `slices` (D, 1, H, W), in smaller batches where memory is short.

        Returns the weighed maps (D, C, H, W), 0 elsewhere, and the seconds of each slice after the first batch.
        """
        saliency, seconds, first, size = slices.new_zeros(slices.shape), [], 0, self.batch_size
        hidden = idist.get_rank() > 0 or None  # None: where the output is no terminal
        bar = tqdm(total=len(indices), desc="slices", unit="slice", leave=False, disable=hidden)
        with bar, autocast(slices.device, False):  # what is around a method's own autocast keeps its copies of weights
            while batch := list(indices[first : first + size]):
                x_0, start = slices[batch].contiguous(), _clock(slices.device)
                try:
                    a = self.method(x_0, network, batch)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    size = len(batch) // 2
                    logger.warning("out of memory with batch_size %d; going on with %d.", len(batch), size)
                    continue
                seconds += [(_clock(slices.device) - start) / len(batch)] * len(batch)
                if first == 0:
                    saliency = slices.new_zeros(len(slices), *a.shape[1:])
                saliency[batch] = self._weigh(a, x_0)
                first += len(batch)
                bar.update(len(batch))
        return saliency, seconds[size:] or seconds  # the first batch warms up

    def _weigh(self, a: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """Blurs the maps `a` (B, C, H, W) and multiplies them by the intensities of `x_0` (B, 1, H, W) in [-1, 1]."""
        if self.blur:
            a = GaussianFilter(2, self.blur).to(a.device)(a)  # each channel by itself
        return a * ((x_0 + 1) / 2).clamp(min=0) ** self.intensity_power if self.intensity_power else a

    def _gate(self, slices: torch.Tensor, network: nn.Module, tags: torch.Tensor | None) -> torch.Tensor:
        """Scores each of the slices (D, 1, H, W): the classifier's probability of y1, or 0 and 1; (D,) float."""
        if self.gate == "all":
            return torch.ones(len(slices))
        if self.gate == "tags":
            if tags is None:
                raise ValueError(
                    "gate is 'tags' but the case has no slice_labels; give a datalist with tags, or --gate classifier."
                )
            return tags_of_volume(tags.as_tensor() if isinstance(tags, MetaTensor) else tags).float().cpu()
        size = (self.gate_size, self.gate_size)
        if self.gate_size is not None and slices.shape[-2:] != size:
            slices = nn.functional.interpolate(slices, size, mode="bilinear", antialias=True)
        with torch.no_grad(), autocast(slices.device, self.amp):
            batches = slices.split(4 * self.batch_size)
            logits = [network.classify(b.contiguous(), b.new_zeros(len(b), dtype=torch.long)) for b in batches]
        logit = torch.cat(logits).float().diff(dim=1).cpu()[..., None, None]  # of p(y1), (D, 1, 1, 1)
        everywhere = torch.ones(len(logit), dtype=torch.bool)
        return smooth_along(logit, everywhere, self.gate_smoothing).sigmoid().flatten()


def _clock(device: torch.device) -> float:
    """Returns the time in seconds once the work queued on `device` is done: calls return before a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def smooth_along(saliency: torch.Tensor, chosen: torch.Tensor, sigma: float) -> torch.Tensor:
    """Smooths `saliency` (D, C, H, W) by a Gaussian along its processed slices, `chosen` (D,) bool; sigma in slices.

    It is normalised by the weight of the processed slices, so that the others do not count as 0.
    """
    if not sigma or not chosen.any():
        return saliency
    weight = torch.as_tensor(gaussian_filter1d(chosen.double().numpy(), sigma, mode="constant"))
    smooth = torch.as_tensor(gaussian_filter1d(saliency.cpu().numpy(), sigma, axis=0, mode="constant"))
    smooth = smooth / weight.clamp(min=1e-6)[:, None, None, None]
    return (smooth * chosen[:, None, None, None]).to(saliency)
