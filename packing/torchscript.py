"""The method `cdm` as one TorchScript program: raw volume in, mask out, without Python.

It repeats in torch operations what `inference.yaml` puts together from MONAI, SciPy and scikit-image: scale, body box,
resize, gate, CDM (Algorithm 1 and Eqs. 2 and 5 of Hu et al., MICCAI 2023), weighting, smoothing, the way back to the
native grid, Otsu's threshold and the largest components. Given the same seed it draws the command line's noise, so the
two masks can be compared voxel by voxel.

Inside, a volume passes as slices first, (D, H, W) or (D, 1, H, W). No `from __future__ import annotations` here:
TorchScript reads the annotations.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packing.body import body_box, scale_to_body
from packing.regions import above_half_otsu, erode, fill_holes, largest, otsu

DOES = {"method": "cdm", "derivative": "finite_difference", "gate": "classifier", "threshold": "otsu"}
DOES |= {"uncertainty": False}
SETTINGS = (  # the knobs of inference.yaml that the program reads
    *(*DOES, "noise_level", "num_steps", "num_draws", "tau", "gate_threshold", "gate_smoothing", "blur"),
    *("intensity_power", "erosion", "smoothing", "num_components", "image_size"),
)


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


def smooth_along(saliency: Tensor, chosen: Tensor, sigma: float) -> Tensor:
    """Applies a Gaussian over the `chosen` (D,) bool slices of `saliency` (D, 1, H, W): as in `inference.inferer`."""
    tail = int(4 * sigma + 0.5)
    kernel = torch.arange(-tail, tail + 1, dtype=torch.float64, device=saliency.device)
    kernel = (-0.5 * (kernel / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    columns = saliency.double().flatten(1).t().unsqueeze(1)  # (H W, 1, D)
    smooth = F.conv1d(columns, kernel, padding=tail).squeeze(1).t().view_as(saliency)
    weight = F.conv1d(chosen.double().view(1, 1, -1), kernel, padding=tail).flatten().clamp(min=1e-6)
    return (smooth / weight.view(-1, 1, 1, 1) * chosen.view(-1, 1, 1, 1)).to(saliency.dtype)


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
    """Mask and saliency of a volume by CDM; to be compiled by `torch.jit.script`.

    Args:
        network: a scripted `TracedNetwork`.
        alpha_bar: abar_t (T,) float32.
        settings: `SETTINGS` of `inference.yaml`.
        margin: voxels around the body's box in a slice.
        batch_size: slices a batch.

    Call: `volume` (1, H, W, D) float32, raw intensities in the config's orientation (LPS: the slices run along the last
    axis); `seed` of the noise, 0 to 10^8. Returns the mask uint8 and the saliency float32, both shaped as `volume`.

    Raises:
        ValueError: for settings that the program does not do.
    """

    margin: list[int]
    levels: list[int]

    def __init__(
        self,
        network: nn.Module,
        alpha_bar: Tensor,
        settings: Mapping,
        margin: Sequence[int],
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        for knob, value in DOES.items():
            if settings[knob] != value:
                raise ValueError(f"the TorchScript program is written for {knob} {value!r}; got {settings[knob]!r}.")
        self.network = network
        self.register_buffer("alpha_bar", alpha_bar.clone())
        q = settings["noise_level"]
        self.levels = [int(level) for level in q] if isinstance(q, Sequence) else [int(q)]
        self.num_steps, self.num_draws = int(settings["num_steps"]), int(settings["num_draws"])
        self.tau, self.gate_threshold = float(settings["tau"]), float(settings["gate_threshold"])
        self.gate_smoothing = float(settings["gate_smoothing"])
        self.blur, self.intensity_power = float(settings["blur"]), float(settings["intensity_power"])
        self.erosion, self.smoothing = int(settings["erosion"]), float(settings["smoothing"])
        self.num_components, self.image_size = int(settings["num_components"]), int(settings["image_size"])
        self.margin, self.batch_size = list(margin), int(batch_size)

    def forward(self, volume: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.segment(volume, seed)

    def segment(self, volume: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        if volume.dim() != 4 or volume.shape[0] != 1:
            raise ValueError("volume must be (1, H, W, D); got " + str(volume.shape))
        if not bool(volume.isfinite().all()) or bool((volume == volume.flatten()[0]).all()):
            raise ValueError("the volume is constant, or holds NaN or infinite voxels")
        if seed < 0 or seed > 100_000_000:
            raise ValueError("seed must be in 0..100000000; got " + str(seed))
        native = volume[0].float().movedim(-1, 0)
        scaled = scale_to_body(native)
        top, bottom, left, right = body_box(scaled, self.margin)
        slices = (shrink(scaled[:, None, top:bottom, left:right], self.image_size) * 2 - 1).clamp(-1, 1)
        maps = self.saliency(slices, seed)
        maps = F.interpolate(maps, [bottom - top, right - left], mode="bilinear", align_corners=False)
        maps = F.pad(maps, [left, native.shape[2] - right, top, native.shape[1] - bottom])
        region = maps[:, 1] > 0.5
        saliency = maps[:, 0] * region
        mask = self.threshold(saliency.clamp(min=0), region)
        if self.num_components > 0:
            mask = largest(mask, self.num_components, True)
        return mask.movedim(0, -1)[None].to(torch.uint8), saliency.movedim(0, -1)[None]

    def saliency(self, slices: Tensor, seed: int) -> Tensor:
        """Maps `slices` (D, 1, H, W) in [-1, 1] to saliency and region (D, 2, H, W), as `SaliencyInferer`."""
        body = erode(fill_holes(above_half_otsu(slices[:, 0] - slices.min())), self.erosion)
        score = torch.cat([self.network.classify(b, self.at(0, b)) for b in slices.split(4 * self.batch_size)])
        logit = (score[:, 1] - score[:, 0])[:, None, None, None]
        if self.gate_smoothing > 0:
            logit = smooth_along(logit, torch.ones_like(body[:, 0, 0]), self.gate_smoothing)
        chosen = (logit.sigmoid().flatten() > self.gate_threshold) & body.flatten(1).any(dim=1)
        maps = torch.zeros_like(slices)
        for batch in chosen.nonzero().flatten().split(self.batch_size):
            x_0 = slices[batch]
            a = blur(self.cdm(x_0, batch, seed), [self.blur, self.blur])
            maps[batch] = a * ((x_0 + 1) / 2).clamp(min=0) ** self.intensity_power
        if self.smoothing > 0 and bool(chosen.any()):
            maps = smooth_along(maps, chosen, self.smoothing)
        return torch.cat([maps, (body & chosen[:, None, None])[:, None].to(maps.dtype)], dim=1)

    def cdm(self, x_0: Tensor, index: Tensor, seed: int) -> Tensor:
        """Runs Algorithm 1 on slices `x_0` (B, 1, H, W) at positions `index` (B,): the signed map, like `x_0`."""
        n, a = x_0.shape[0], torch.zeros_like(x_0)
        y = torch.tensor([[0.0, 1.0], [1 - self.tau, self.tau]], device=x_0.device).repeat_interleave(n, 0)
        for draw in range(self.num_draws):
            eps = self.noise(x_0, index, seed, draw)
            for level in self.levels:
                x_t = self.alpha_bar[level].sqrt() * x_0 + (1 - self.alpha_bar[level]).sqrt() * eps  # Eq. (2)
                x_t = torch.cat([x_t, x_t])
                for t in range(level, level - self.num_steps, -1):
                    eps_hat = self.network(x_t, self.at(t, x_t), y)
                    now, then = self.alpha_bar[t], self.alpha_bar[t - 1]
                    x_0_hat = (x_t - (1 - now).sqrt() * eps_hat) / now.sqrt()
                    x_t = then.sqrt() * x_0_hat + (1 - then).sqrt() * eps_hat  # Eq. (5)
                    a += (x_t[:n] - x_t[n:]) / (1 - self.tau)
        return a / (self.num_draws * len(self.levels))

    def noise(self, like: Tensor, index: Tensor, seed: int, draw: int) -> Tensor:
        """Draws the noise of `methods.cdm.slice_noise`: a generator for each slice, draws in pairs eps, -eps."""
        generator, eps = torch.Generator(), torch.empty(like.shape)
        positions: list[int] = index.tolist()
        for i, position in enumerate(positions):
            generator.manual_seed((seed * 1_000_003 + draw // 2) * 65_537 + position)
            eps[i] = torch.randn(like.shape[1:], generator=generator)
        return (-eps if draw % 2 else eps).to(like)

    def at(self, t: int, x: Tensor) -> Tensor:
        return torch.full([x.shape[0]], t, dtype=torch.long, device=x.device)

    def threshold(self, positive: Tensor, region: Tensor) -> Tensor:
        """Applies Otsu's threshold in the region of each slice: `positive` (D, H, W), `region` and result bool."""
        mask = torch.zeros_like(region)
        for k in region.flatten(1).any(dim=1).nonzero().flatten():
            values = positive[k][region[k]]
            if bool(values.min() < values.max()):
                mask[k] = region[k] & (positive[k] > otsu(values))
        return mask
