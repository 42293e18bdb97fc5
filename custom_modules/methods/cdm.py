"""CDM and CG-CDM: the target is where one denoising step depends on the condition.

A slice x_0 tagged y1 is noised to t = Q (Eq. 2). From there R DDIM steps are taken twice, with the noise prediction
f(x_t, y1) and with the condition moved a little towards y0, f(x'_t, tau y1 + (1 - tau) y0). The finite difference

    a = sum over t of (x_{t-1} - x'_{t-1}) / (1 - tau)

approximates the derivative of the denoised image with respect to the condition, taken from y0 to y1: it is positive
where "shows the target" brightens the image. CG-CDM adds the gradient of the noisy-image classifier to each
prediction, towards y1 and towards y0, with scale s (s = 0 is CDM).

Reference: Hu, Chen, Ho, Shi: Conditional Diffusion Models for Weakly Supervised Medical Image Segmentation, MICCAI
2023, arXiv 2306.03878, Algorithm 1. Its `beta_t` noise term is a slip; noising is Eq. (2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from custom_modules.diffusion import Diffusion
from custom_modules.methods.forward_mode import Dual
from custom_modules.methods.guidance import classifier_gradient
from custom_modules.networks.precision import autocast

DERIVATIVES = ("finite_difference", "exact")
MAX_TAU_BF16 = 0.5


def slice_noise(like: torch.Tensor, seed: int, draw: int, slices: Sequence[int]) -> torch.Tensor:
    """Standard normal noise like `like` (B, C, H, W), for which slice `slices[i]` always gets the same draw.

    A generator a slice makes the map independent of the batch size and of the order in which slices are visited. Draws
    come in antithetic pairs, eps and -eps: most of a map's error is odd in eps and cancels within a pair.
    """
    generator = torch.Generator()
    seeds = [((seed * 1_000_003 + draw // 2) * 65_537 + index) % 2**63 for index in slices]  # what a generator takes
    eps = torch.stack([torch.randn(like.shape[1:], generator=generator.manual_seed(s)) for s in seeds]).to(like)
    return -eps if draw % 2 else eps


class DiffusionSaliency:
    """Algorithm 1 on a batch of slices, averaged over noise levels and noise draws.

    Args:
        diffusion: the schedule.
        noise_level: Q, or several whose maps are averaged.
        num_steps: R, unit steps t -> t - 1 from t = Q.
        num_draws: noise draws averaged at each level, in antithetic pairs.
        tau: share of y1 in the second condition, in [0, 1).
        guidance_scale: s; 0 leaves the classifier out (CDM).
        derivative: `finite_difference` as in the paper; `exact` is its limit for tau -> 1, by forward-mode
            differentiation along y1 - y0. There the weight of the guidance is kept at s / (1 - tau), so that on the
            trajectory of y1 itself, where it is s, it vanishes in the limit.
        seed: of the noise.
        amp: bf16 where the hardware has it and the map keeps its digits: a finite difference divides the rounding error
            by 1 - tau, so above `MAX_TAU_BF16` it stays in float32 (on a GPU with torch's setting of TF32). The exact
            derivative does not cancel digits.
        keep_draws: the maps of the pairs of draws (a last one alone counts as one) are not averaged: their spread tells
            how much of a map the noise makes.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        noise_level: int | Sequence[int] = 400,
        num_steps: int = 10,
        num_draws: int = 1,
        tau: float = 0.95,
        guidance_scale: float = 0.0,
        derivative: str = "finite_difference",
        seed: int = 0,
        amp: bool = True,
        keep_draws: bool = False,
    ) -> None:
        levels = list(noise_level) if isinstance(noise_level, Sequence) else [noise_level]
        last = diffusion.num_train_timesteps - 1
        if not levels or not all(isinstance(q, int) and 1 <= q <= last for q in levels):
            raise ValueError(f"noise_level (Q) must be an integer in 1..{last}, or a list of them; got {noise_level}.")
        if not isinstance(num_steps, int) or not 1 <= num_steps <= min(levels):
            raise ValueError(
                f"num_steps (R) must be an integer >= 1 and <= noise_level (Q); got R={num_steps}, Q={noise_level}."
            )
        if not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"num_draws must be an integer >= 1; got {num_draws}.")
        if not 0 <= tau < 1:
            raise ValueError(f"tau must be in [0, 1): at 1 the two conditions are the same; got {tau}.")
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale (s) must be >= 0; got {guidance_scale}.")
        if derivative not in DERIVATIVES:
            raise ValueError(f"derivative must be one of {list(DERIVATIVES)}; got {derivative!r}.")
        self.diffusion, self.levels, self.num_steps, self.num_draws = diffusion, levels, num_steps, num_draws
        self.tau, self.guidance_scale, self.seed = tau, guidance_scale, seed
        self.exact = derivative == "exact"
        if keep_draws and num_draws < 3:
            raise ValueError(f"uncertainty needs two pairs of draws or more, num_draws >= 3; got {num_draws}.")
        self.keep_draws = keep_draws
        self.bf16 = amp and (self.exact or tau <= MAX_TAU_BF16)

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Saliency (B, 1, H, W) float32, signed, of `x_0` (B, 1, H, W) in [-1, 1]; `slices` seed the noise. With
        `keep_draws` (B, pairs, H, W)."""
        x_0 = x_0.float()
        one_map = self._exact if self.exact else self._finite_difference
        maps = []
        with torch.no_grad(), autocast(x_0.device, self.bf16):
            for draw in range(self.num_draws):
                eps = slice_noise(x_0, self.seed, draw, slices)
                for noise_level in self.levels:
                    t = torch.full((len(x_0),), noise_level, device=x_0.device)
                    maps.append(one_map(self.diffusion.add_noise(x_0, eps, t), t, network))  # Eq. (2), t = Q
        maps = torch.cat(maps, dim=1)
        parts = maps.split(2 * len(self.levels) if self.keep_draws else maps.shape[1], dim=1)
        return torch.cat([part.mean(dim=1, keepdim=True) for part in parts], dim=1)

    def _finite_difference(self, x_t: torch.Tensor, t: torch.Tensor, network: nn.Module) -> torch.Tensor:
        batch, a = len(x_t), torch.zeros_like(x_t)
        y = torch.tensor([[0.0, 1.0], [1 - self.tau, self.tau]], device=x_t.device).repeat_interleave(batch, 0)
        x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])  # the trajectory of y1, and x'_t of the mixture, as one batch
        for step in range(self.num_steps):  # t = Q, Q - 1, ..., Q - R + 1
            eps_hat = network(x_t, t, y).float()
            if self.guidance_scale:
                distinct = x_t[:batch] if step == 0 else x_t  # x'_Q = x_Q
                to_y0, to_y1 = classifier_gradient(network, distinct, t[: len(distinct)])
                scale = self.guidance_scale * (1 - self.diffusion.alpha_bar(t, x_t)).sqrt()
                eps_hat = eps_hat - scale * torch.cat([to_y1[:batch], to_y0[-batch:]])
            x_t = self.diffusion.ddim_step(x_t, eps_hat, t)  # Eq. (5)
            a += (x_t[:batch] - x_t[batch:]) / (1 - self.tau)
            t = t - 1
        return a

    def _exact(self, x_t: torch.Tensor, t: torch.Tensor, network: nn.Module) -> torch.Tensor:
        dx, a = torch.zeros_like(x_t), torch.zeros_like(x_t)  # dx_t: how x_t changes with the condition, 0 at t = Q
        y, dy = (torch.tensor([v], device=x_t.device).expand(len(x_t), 2) for v in ([0.0, 1.0], [-1.0, 1.0]))
        for step in range(self.num_steps):
            eps_hat = network(x_t if step == 0 else Dual(x_t, dx), t, Dual(y, dy))
            eps_hat, d_eps = eps_hat.primal.float(), eps_hat.tangent.float()
            if self.guidance_scale:  # x'_t -> x_t, where the two guidances still differ
                to_y0, to_y1 = classifier_gradient(network, x_t, t)
                scale = self.guidance_scale / (1 - self.tau) * (1 - self.diffusion.alpha_bar(t, x_t)).sqrt()
                d_eps = d_eps - scale * (to_y1 - to_y0)
            # Eq. (5) is linear in x_t and eps_hat, so it is its own derivative.
            x_t, dx = self.diffusion.ddim_step(x_t, eps_hat, t), self.diffusion.ddim_step(dx, d_eps, t)
            a += dx
            t = t - 1
        return a
