"""Random changes of a batch of slices, all at once on the device: what volumes from elsewhere differ in.

MONAI's random transforms change one slice at a time, which takes longer than a training step of a small network.
The kinds of change are theirs (`RandAffine`, `Rand2DElastic`, `RandBiasField`, `RandAdjustContrast`,
`RandGaussianSmooth`, `RandRicianNoise`, `RandCoarseDropout`). Added are those of MR from other sites: a stripped skull,
a field of view that cuts the body, a slice of another brightness.

Numbers come from torch's global generator, which `EpochSeed` sets. Every process draws for the batches of all
processes and takes its share (`rank_share`).
"""

from __future__ import annotations

from collections.abc import Sequence

import ignite.distributed as idist
import torch
from torch import nn
from torch.nn import functional

from custom_modules.training.sampling import rank_share

TISSUE = 0.08  # of intensities in [0, 1]: above it lies the head, its skull included


class Augmentation(nn.Module):
    """Changes slices at random, and moves their labels along. Lengths are shares of the slice's width.

    Forward: `image` (B, 1, H, W) float32 in [-1, 1] and `label` (B, 1, H, W) float32 or None; returns both, changed.
    An argument without a suffix is the probability of a change, and 0 leaves it out.

    Args:
        flip: mirror along H (left and right).
        affine: rotate by up to `rotation` (radians), shift by up to `translation`, scale by 1 +- `zoom`; what comes in
            from outside is background.
        warp: smooth displacements of up to `warp_size`.
        strip: take the skull off, or what lies as deep under the surface of another body, `strip_depth` at most.
        cut: leave up to a quarter of the field of view empty, at one of its four sides.
        bias: multiply by exp(polynomial of degree 3), coefficients within +- `bias_range`.
        gamma: x^g, log-uniform in `gamma_range`.
        gain: multiply by 1 +- `gain_range`.
        odd_slice: multiply by a factor in [1/4, 2], saturating: the one slice that differs from its volume.
        blur: Gaussian, standard deviation up to `blur_size`.
        coarse: half the resolution.
        noise: Rician, standard deviation up to `noise_std`.
        bright, dark: a box of up to a quarter of the width, saturated or empty.

    Raises:
        ValueError: a probability is outside [0, 1].
    """

    def __init__(
        self,
        flip: float = 0.0,
        affine: float = 0.0,
        rotation: float = 0.4,
        translation: float = 0.125,
        zoom: float = 0.2,
        warp: float = 0.0,
        warp_size: float = 0.04,
        strip: float = 0.0,
        strip_depth: float = 0.12,
        cut: float = 0.0,
        bias: float = 0.0,
        bias_range: float = 0.3,
        gamma: float = 0.0,
        gamma_range: Sequence[float] = (0.55, 1.8),
        gain: float = 0.0,
        gain_range: float = 0.25,
        odd_slice: float = 0.0,
        blur: float = 0.0,
        blur_size: float = 0.01,
        coarse: float = 0.0,
        noise: float = 0.0,
        noise_std: float = 0.06,
        bright: float = 0.0,
        dark: float = 0.0,
    ) -> None:
        super().__init__()
        for name in ("flip", "affine", "warp", "strip", "cut", "bias", "gamma", "gain", "odd_slice", "blur", "coarse",
                     "noise", "bright", "dark"):  # fmt: skip
            if not 0 <= (prob := locals()[name]) <= 1:
                raise ValueError(f"augmentation: {name} is a probability and must be in [0, 1]; got {prob}.")
        self.flip, self.affine, self.warp, self.warp_size = flip, affine, warp, warp_size
        self.rotation, self.translation, self.zoom = rotation, translation, zoom
        self.strip, self.strip_depth, self.cut = strip, strip_depth, cut
        self.bias, self.bias_range, self.gain, self.gain_range = bias, bias_range, gain, gain_range
        self.gamma, self.gamma_range, self.odd_slice = gamma, gamma_range, odd_slice
        self.blur, self.blur_size, self.coarse = blur, blur_size, coarse
        self.noise, self.noise_std, self.bright, self.dark = noise, noise_std, bright, dark

    @torch.no_grad()
    def forward(
        self, image: torch.Tensor, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = self._grid(image)
        x = functional.grid_sample((image + 1) / 2, grid, padding_mode="zeros", align_corners=False)
        if label is not None:
            label = functional.grid_sample(label, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        if self.strip:
            x = self._without_skull(x)
        if self.cut:
            seen = self._field_of_view(x)
            x, label = x * seen, label if label is None else label * seen
        for change, prob in (
            (self._bias_field, self.bias),
            (self._contrast, self.gamma),
            (self._brightness, self.gain),
            (self._other_slice, self.odd_slice),
            (self._smooth, self.blur),
            (_halved, self.coarse),
            (self._rician, self.noise),
        ):
            if prob:
                x = torch.where(_happens(prob, x), change(x), x)
        if self.bright:
            x = x.masked_fill(_boxes(x) & _happens(self.bright, x), 1.0)
        if self.dark:
            x = x.masked_fill(_boxes(x) & _happens(self.dark, x), 0.0)
        return 2 * x.clamp(0, 1) - 1, label

    def _grid(self, x: torch.Tensor) -> torch.Tensor:
        """Draws where each pixel comes from, (B, H, W, 2) in [-1, 1], for `grid_sample` (W first)."""
        change = _happens(self.affine, x).view(-1)
        angle = _uniform(x, -self.rotation, self.rotation).view(-1) * change
        zoom = 1 / (1 + _uniform(x, -self.zoom, self.zoom).view(-1) * change)
        shift = 2 * _uniform(x, -self.translation, self.translation, 2).view(-1, 2) * change[:, None]
        mirror = torch.where(_happens(self.flip, x).view(-1), -1.0, 1.0)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        theta = torch.stack([cos, -sin * mirror, shift[:, 0], sin, cos * mirror, shift[:, 1]], dim=1).view(-1, 2, 3)
        grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
        if self.warp:
            coarse = _uniform(x, -2 * self.warp_size, 2 * self.warp_size, 2 * 5 * 5).view(-1, 2, 5, 5)
            rows, columns = (_bicubic(5, size, x.device) for size in x.shape[2:])
            grid = grid + (rows @ coarse @ columns.T * _happens(self.warp, x)).movedim(1, -1)
        return grid

    def _without_skull(self, x: torch.Tensor) -> torch.Tensor:
        """Empties all that lies less than a depth under the surface; the depth is one for the whole batch."""
        width = x.shape[-1]
        closing = width // 16  # fills ventricles and the dark skull
        depth = int(torch.rand(1) * self.strip_depth * width) + 1  # on the CPU: a number the device need not tell
        outside = 1 - _dilated((x > TISSUE).float(), closing, beyond=0.0)
        inside = 1 - _dilated(outside, closing + depth, beyond=1.0)  # a body may reach the slice's edge
        return torch.where(_happens(self.strip, x), x * inside, x)

    def _field_of_view(self, x: torch.Tensor) -> torch.Tensor:
        """Draws what is seen, (B, 1, H, W) float32: 0 in a band at one side."""
        rows, columns = _coordinates(x)
        along = torch.where(_uniform(x) < 0.5, rows, columns) * torch.where(_uniform(x) < 0.5, -1.0, 1.0)
        return ((along < 1 - _uniform(x, 0.0, 0.5)) | ~_happens(self.cut, x)).float()

    def _bias_field(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (axis[0, 0] for axis in _coordinates(x))
        terms = torch.stack([rows**i * columns**j for i in range(4) for j in range(4 - i)])
        coefficients = _uniform(x, -self.bias_range, self.bias_range, len(terms)).view(-1, len(terms))
        return x * torch.einsum("bn,nhw->bhw", coefficients, terms)[:, None].exp()

    def _contrast(self, x: torch.Tensor) -> torch.Tensor:
        low, high = torch.tensor(self.gamma_range).log().tolist()
        return x.clamp(min=1e-4) ** _uniform(x, low, high).exp()

    def _brightness(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + _uniform(x, -self.gain_range, self.gain_range))

    def _other_slice(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2 ** _uniform(x, -2.0, 1.0)
        return x * (1 + x**8) ** (-1 / 8)  # as `ScaleToBodyd` saturates

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        radius = max(1, round(2.5 * self.blur_size * x.shape[-1]))
        offsets = torch.arange(-radius, radius + 1, device=x.device)
        sigma = _uniform(x, 0.2, 1.0).view(-1, 1) * self.blur_size * x.shape[-1]
        kernel = (-0.5 * (offsets / sigma) ** 2).softmax(dim=1)[:, None]  # (B, 1, 2 radius + 1)
        kernel = kernel.repeat_interleave(x.shape[1], dim=0)
        rows = functional.conv2d(x.flatten(0, 1)[None], kernel[..., None], padding=(radius, 0), groups=len(kernel))
        return functional.conv2d(rows, kernel[:, :, None], padding=(0, radius), groups=len(kernel)).view_as(x)

    def _rician(self, x: torch.Tensor) -> torch.Tensor:
        real, imaginary = _normal(x, 2 * x.shape[1]).mul_(_uniform(x, 0.0, self.noise_std)).chunk(2, dim=1)
        return ((x + real).square() + imaginary.square()).sqrt()


def _uniform(x: torch.Tensor, low: float = 0.0, high: float = 1.0, count: int = 1) -> torch.Tensor:
    """Draws (B, count, 1, 1) float32 in [low, high] for the slices `x` (B, 1, H, W)."""
    return rank_share(torch.rand(len(x) * idist.get_world_size(), count, 1, 1, device=x.device)) * (high - low) + low


def _normal(x: torch.Tensor, count: int) -> torch.Tensor:
    """Draws (B, count, H, W) float32 for the slices `x` (B, 1, H, W)."""
    return rank_share(torch.randn(len(x) * idist.get_world_size(), count, *x.shape[2:], device=x.device))


def _happens(prob: float, x: torch.Tensor) -> torch.Tensor:
    """Draws (B, 1, 1, 1) bool: what happens with this probability."""
    return _uniform(x) < prob


def _coordinates(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the coordinates in [-1, 1] of the rows (1, 1, H, 1) and columns (1, 1, 1, W) of `x`."""
    rows, columns = (torch.linspace(-1, 1, size, device=x.device) for size in x.shape[2:])
    return rows.view(1, 1, -1, 1), columns.view(1, 1, 1, -1)


def _boxes(x: torch.Tensor) -> torch.Tensor:
    """Draws a box in each slice, (B, 1, H, W) bool; its sides are 1/20 to 1/4 of the slice's."""
    inside = torch.ones_like(x[:, :1], dtype=torch.bool)
    for axis in _coordinates(x):
        inside &= (axis - _uniform(x, -0.9, 0.9)).abs() < _uniform(x, 0.05, 0.25)
    return inside


def _bicubic(count: int, size: int, device: torch.device) -> torch.Tensor:
    """Gives the matrix (size, count) that interpolates `count` values; much faster than to interpolate every slice."""
    unit = torch.eye(count, device=device)[None, :, :, None]
    return functional.interpolate(unit, (size, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T


def _dilated(mask: torch.Tensor, radius: int, beyond: float) -> torch.Tensor:
    """Grows a mask (B, 1, H, W) float32 by `radius` pixels to all sides; outside the slice it is `beyond`."""
    for kernel, padding in (((2 * radius + 1, 1), (0, 0, radius, radius)), ((1, 2 * radius + 1), (radius, radius))):
        mask = functional.max_pool2d(functional.pad(mask, padding, value=beyond), kernel, stride=1)
    return mask


def _halved(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(functional.avg_pool2d(x, 2), x.shape[2:], mode="bilinear", align_corners=False)
