"""The diffusion process: noise schedule, noising (Eq. 2) and the deterministic DDIM step (Eq. 5).

    x_t     = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                     Eq. (2)
    x_{t-1} = sqrt(abar_{t-1}) x0_hat + sqrt(1 - abar_{t-1}) eps_hat                      Eq. (5), eta = 0
    x0_hat  = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t)

With another index in place of t - 1, Eq. (5) takes several timesteps at once, and with a higher one it encodes: it
leads from the image to its noise (Song et al. 2021, section 4.3).

The tables are those of MONAI's `DDIMScheduler`; a step on whole batches, differentiable and between any two indices,
is written out here because the scheduler's own step divides the range into `num_inference_steps` and clips x0_hat by
default. The tests check one against the other.

Symbols: t in 0..T-1 (T = 1000), abar_t = prod_{s <= t} (1 - beta_s), abar_{-1} = 1, beta linear in 1e-4..0.02.
References: Song et al. 2021 (DDIM, arXiv 2010.02502); Hu et al. 2023 (arXiv 2306.03878).
"""

from __future__ import annotations

import torch
from monai.networks.schedulers import DDIMScheduler
from torch import nn

NUM_TRAIN_TIMESTEPS = 1000  # T
SCHEDULE = {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 0.02}  # of MONAI


class Diffusion(nn.Module):
    """Schedule, noising and DDIM step of the diffusion process; no learned parameter."""

    def __init__(self) -> None:
        super().__init__()
        scheduler = DDIMScheduler(NUM_TRAIN_TIMESTEPS, clip_sample=False, **SCHEDULE)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float().clone(), persistent=False)

    def alpha_bar(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Gives abar_t for indices `t` (B,), shaped (B, 1, 1, ...) to multiply with `like` (B, ...); abar_{-1} = 1."""
        values = torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])
        return values.view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Computes x_t of Eq. (2) for images `x_0` and noise `eps` (B, C, H, W), float32, at `t` (B,) int."""
        alpha_bar = self.alpha_bar(t, x_0)
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps

    def ddim_step(
        self, x_t: torch.Tensor, eps_hat: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gives x_{t-1} of Eq. (5), eta = 0 and no clipping, for `x_t` and `eps_hat` (B, C, H, W) at `t` (B,) int.

        Given `t_next` (B,) int, the step leads to x_{t_next} instead, on either side of t; -1 is the clean image.
        """
        t_next = t - 1 if t_next is None else t_next
        alpha_bar, alpha_bar_next = self.alpha_bar(t, x_t), self.alpha_bar(t_next, x_t)
        x_0_hat = (x_t - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()
        return alpha_bar_next.sqrt() * x_0_hat + (1 - alpha_bar_next).sqrt() * eps_hat
