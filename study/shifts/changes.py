"""What another scanner, protocol or export may do to a volume: the kinds of change of the shift study, each seeded.

A change takes the image (1, H, W, D) float32, its slices along the last axis, a strength and a random state, and
returns the changed image. Strengths are relative to the volume: `bright` is its 99th percentile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import AdjustContrast, GaussianSmooth, RandBiasField, RandRicianNoise, Rotate
from numpy.random import RandomState
from torch import Tensor

Change = Callable[[Tensor, float, RandomState], Tensor]


@dataclass(frozen=True)
class Shift:
    """A kind of change.

    Args:
        strengths: a mild and a strong one.
        change: of the image.
        label: of the label, where it moves with the image.
        group: panel of the figure.
    """

    strengths: tuple[float, float]
    change: Change
    label: Change | None = None
    group: str = "scale"

    def apply(self, image: Tensor, truth: Tensor, strength: float, seed: str) -> tuple[Tensor, Tensor]:
        """Changes `image` and, if it moves, `truth`, both (1, H, W, D) float32; `seed` is hashed."""
        state = crc32(seed.encode())
        moved = truth if self.label is None else self.label(truth, strength, RandomState(state))
        return self.change(image, strength, RandomState(state)).as_subclass(torch.Tensor).float(), moved


def bright(x: Tensor) -> float:
    return float(np.percentile(x.numpy(), 99))


def _cold_voxel(x: Tensor, strength: float, random: RandomState) -> Tensor:
    changed = x.clone()
    changed[0, 0, 0, 0] = -strength * bright(x)
    return changed


def _pad(value: float) -> Change:
    def change(x: Tensor, share: float, random: RandomState) -> Tensor:
        rows, columns = (int(share * n) for n in x.shape[1:3])
        return F.pad(x, [0, 0, columns, columns, rows, rows], value=value)

    return change


def _z_score(x: Tensor, strength: float, random: RandomState) -> Tensor:
    tissue = x > x.min() + 0.1 * (bright(x) - x.min())
    return torch.where(tissue, strength * (x - x[tissue].mean()) / x[tissue].std(), 0.0)


def _artefact(x: Tensor, strength: float, random: RandomState) -> Tensor:
    """A box of an eighth of the sides in 5 slices, within the middle of the volume."""
    sides = [max(n // 8, 1) for n in x.shape[1:3]] + [min(5, x.shape[3])]
    corner = [random.randint(n // 3, max(2 * n // 3 - side, n // 3) + 1) for n, side in zip(x.shape[1:3], sides)]
    corner.append((x.shape[3] - sides[2]) // 2)
    changed = x.clone()
    changed[(0, *(slice(first, first + side) for first, side in zip(corner, sides)))] = strength * float(x.max())
    return changed


def _middle_slice(x: Tensor, factor: float, random: RandomState) -> Tensor:
    changed = x.clone()
    changed[..., x.shape[3] // 2] *= factor
    return changed


def _salt(x: Tensor, share: float, random: RandomState) -> Tensor:
    return torch.where(torch.as_tensor(random.rand(*x.shape)) < share, 2 * x.max(), x)


def _noise(x: Tensor, strength: float, random: RandomState) -> Tensor:
    return RandRicianNoise(1.0, std=strength * bright(x), sample_std=False).set_random_state(state=random)(x)


def _bias(x: Tensor, strength: float, random: RandomState) -> Tensor:
    return RandBiasField(coeff_range=(-strength, strength), prob=1.0).set_random_state(state=random)(x)


def _rotate(mode: str) -> Change:
    return lambda x, degrees, _: Rotate((0, 0, np.deg2rad(degrees)), mode=mode, padding_mode="zeros")(x)


def _thin(x: Tensor, step: float, random: RandomState) -> Tensor:
    return x[..., :: int(step)]


def _gamma(x: Tensor, gamma: float, random: RandomState) -> Tensor:
    return AdjustContrast(gamma)(x)


SHIFTS = {  # strength in parentheses
    "offset (of bright)": Shift((1, 100), lambda x, s, _: x + s * bright(x)),
    "factor": Shift((0.01, 100), lambda x, s, _: x * s),
    "cold voxel (of bright)": Shift((1, 20), _cold_voxel),
    "padding of -1024 (of the sides)": Shift((0.1, 0.3), _pad(-1024.0), _pad(0.0)),
    "z-scored tissue (factor)": Shift((1, 1000), _z_score),
    "bright artefact (of the maximum)": Shift((2, 4), _artefact, group="artefacts"),
    "bright slice (factor)": Shift((2, 4), _middle_slice, group="artefacts"),
    "dark slice (factor)": Shift((0.5, 0.1), _middle_slice, group="artefacts"),
    "salt (of the voxels)": Shift((0.01, 0.03), _salt, group="artefacts"),
    "Rician noise (of bright)": Shift((0.05, 0.1), _noise, group="artefacts"),
    "gamma below 1": Shift((0.8, 0.6), _gamma, group="protocol"),
    "gamma above 1": Shift((1.25, 1.6), _gamma, group="protocol"),
    "bias field (coefficients)": Shift((0.15, 0.3), _bias, group="protocol"),
    "blur (pixels)": Shift((1, 2), lambda x, s, _: GaussianSmooth([s, s, 0.0])(x), group="protocol"),
    "rotation (degrees)": Shift((10, 20), _rotate("bilinear"), _rotate("nearest"), group="protocol"),
    "every n-th slice": Shift((2, 3), _thin, _thin, group="protocol"),
}
