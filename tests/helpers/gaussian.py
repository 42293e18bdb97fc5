"""Pixelwise Gaussian data, on which denoiser, classifier and maps are known in closed form.

The data: x_0 | y ~ N(mu_y, SIGMA^2) in every pixel, both classes equally likely. Then x_t | y is Gaussian with mean
sqrt(abar) mu_y and variance V = abar SIGMA^2 + 1 - abar, and

    E[eps | x_t, y]     = sqrt(1 - abar) (x_t - sqrt(abar) mu_y) / V
    grad log p(y | x_t) = (1 - p(y | x_t)) sqrt(abar) (mu_y - mu_other) / V

A soft label takes the mixture of the means; the prediction is linear in it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import CDM, PairsOfDraws
from custom_modules.methods.exact import build_cdm

SIZE, SIGMA = 8, 0.3
SLICES = [5, 0, 17]
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # linear beta, in float64 and apart from MONAI's table


def blob(height: float) -> torch.Tensor:
    """A 2 x 3 blob, (1, 1, 8, 8)."""
    mean = torch.zeros(1, 1, SIZE, SIZE)
    mean[..., 2:4, 3:6] = height
    return mean


MU_0 = torch.linspace(-0.5, 0.5, SIZE).expand(1, 1, SIZE, SIZE)
MU_1 = MU_0 + blob(0.4) - 0.1 * blob(1).flip(-2)  # y1 brightens one region and darkens another


class Gaussian(nn.Module):
    """E[eps | x_t, y] and p(y | x_t) of the data, for the means `mu_0` and `mu_1`, each (1, 1, H, W).

    It remembers how it was called: `inputs`, `calls` (timesteps, labels, dtype, autocast) and `classified` (timesteps).
    """

    def __init__(self, mu_0: torch.Tensor = MU_0, mu_1: torch.Tensor = MU_1) -> None:
        super().__init__()
        self.mu = torch.cat([mu_0, mu_1]).double()  # (2, 1, H, W)
        self.inputs: list[torch.Tensor] = []
        self.calls: list[tuple] = []
        self.classified: list[list[int]] = []

    def moments(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        abar = torch.from_numpy(ABAR)[t].view(-1, 1, 1, 1)
        return abar.to(like), (abar * SIGMA**2 + 1 - abar).to(like)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        self.calls.append((timesteps.tolist(), class_labels.tolist(), x.dtype, torch.is_autocast_enabled("cpu")))
        abar, variance = self.moments(timesteps, x)
        weights = class_labels.double() if class_labels.is_floating_point() else torch.eye(2).double()[class_labels]
        mean = torch.einsum("bk,kchw->bchw", weights, self.mu).to(x)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / variance

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        self.classified.append(timesteps.tolist())
        abar, variance = self.moments(timesteps, x)
        square = (x[:, None] - abar[:, None].sqrt() * self.mu.to(x)) ** 2 / (2 * variance[:, None])
        return -square.sum(dim=(2, 3, 4))

    def log_p_gradient(self, x: torch.Tensor, t: torch.Tensor, y: int) -> torch.Tensor:
        """Returns grad log p(y | x_t) (B, 1, H, W) for `t` (B,) by its formula, without autograd."""
        abar, variance = self.moments(t, x)
        p = self.classify(x, t).softmax(dim=1)[:, y].view(-1, 1, 1, 1)
        return (1 - p) * abar.sqrt() * (self.mu[y] - self.mu[1 - y]) / variance


def pictures(mean: torch.Tensor = MU_1) -> torch.Tensor:
    """Draws a noisy picture around `mean` (1, 1, 8, 8) for each of `SLICES`, (3, 1, 8, 8) float32."""
    noise = torch.randn(len(SLICES), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return mean.float() + SIGMA * noise


def cdm(**settings) -> CDM | PairsOfDraws:
    """Builds CDM at the paper's Q and R, or with `settings`."""
    return build_cdm(Diffusion(), **{"noise_level": 400, "num_steps": 10, **settings})
