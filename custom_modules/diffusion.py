"""The diffusion process: noise schedule, noising (Eq. 2) and the deterministic DDIM step (Eq. 5).

    x_t     = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                     Eq. (2)
    x_{t-1} = sqrt(abar_{t-1}) x0_hat + sqrt(1 - abar_{t-1}) eps_hat                      Eq. (5), eta = 0
    x0_hat  = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t)

With another index in place of t - 1, Eq. (5) takes several timesteps at once. With a higher index it encodes: it leads
from the image to its noise (Song et al. 2021, section 4.3).

The table is that of MONAI's `DDIMScheduler`. The step is written out because the scheduler's own step divides the range
into `num_inference_steps`, clips x0_hat by default, and takes one index for the whole batch. A test compares the two.

Symbols: t in 0..T-1 (T = 1000), abar_t = prod_{s <= t} (1 - beta_s), abar_{-1} = 1, beta linear in 1e-4..0.02.
References: Song et al. 2021 (DDIM, arXiv 2010.02502); Hu et al. 2023 (arXiv 2306.03878).
"""

from __future__ import annotations

import torch
from monai.networks.schedulers import DDIMScheduler
from torch import nn

NUM_TRAIN_TIMESTEPS = 1000  # T
SCHEDULE = {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 0.02}  # of MONAI's schedulers


class Diffusion(nn.Module):
    """Holds schedule, noising and DDIM step of the paper's diffusion process; no learned parameter."""

    def __init__(self) -> None:
        super().__init__()
        scheduler = DDIMScheduler(NUM_TRAIN_TIMESTEPS, **SCHEDULE)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float().clone(), persistent=False)

    def alpha_bar(self, t: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns abar_t for `t`, an int or (B,) int, shaped (1 or B, 1, 1, ...) to multiply with `like` (B, ...)."""
        t = torch.full((1,), t, device=like.device) if isinstance(t, int) else t
        table = self.alphas_cumprod.to(t.device)  # a server may choose another device for each request
        values = torch.where(t < 0, 1.0, table[t.clamp(min=0)])  # abar_{-1} = 1
        return values.view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """Returns x_t of Eq. (2) for images `x_0` and noise `eps`, (B, C, H, W) float32, at `t`, an int or (B,) int."""
        alpha_bar = self.alpha_bar(t, x_0)
        return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps

    def ddim_step(
        self,
        x_t: torch.Tensor,
        eps_hat: torch.Tensor,
        t: int | torch.Tensor,
        t_next: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Takes the step of Eq. (5), eta = 0 and no clipping, from `x_t` and `eps_hat` (B, C, H, W) float32 at `t`.

        It leads to x_{t_next}, on either side of t: -1 is the clean image, None is t - 1. Both are an int or (B,) int.
        """
        t_next = t - 1 if t_next is None else t_next
        alpha_bar, alpha_bar_next = self.alpha_bar(t, x_t), self.alpha_bar(t_next, x_t)
        x_0_hat = (x_t - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()
        return alpha_bar_next.sqrt() * x_0_hat + (1 - alpha_bar_next).sqrt() * eps_hat
