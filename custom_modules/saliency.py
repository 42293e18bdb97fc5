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


def classifier_gradient(network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient of log p(y | x_t) with respect to x_t, (B, C, H, W), for `t` and `y` (B,) int; under `no_grad` too."""
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        log_p = nn.functional.log_softmax(network.classify(x_t, t), dim=1)
        return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x_t)[0]


def slice_noise(like: torch.Tensor, seed: int, draw: int, slices: Sequence[int]) -> torch.Tensor:
    """Standard normal noise like `like` (B, C, H, W), for which slice `slices[i]` always gets the same draw.

    A generator a slice makes the map independent of the batch size and of the order in which slices are visited.
    """
    generator = torch.Generator()
    seeds = [((seed * 1_000_003 + draw) * 65_537 + index) % 2**63 for index in slices]  # what a generator takes
    return torch.stack([torch.randn(like.shape[1:], generator=generator.manual_seed(s)) for s in seeds]).to(like)


class DiffusionSaliency:
    """Algorithm 1 on a batch of slices, averaged over noise levels and noise draws.

    Args:
        diffusion: the schedule.
        noise_level: Q, or several whose maps are averaged.
        num_steps: R, unit steps t -> t - 1 from t = Q.
        num_draws: noise draws averaged at each level.
        tau: share of y1 in the second condition, in [0, 1).
        guidance_scale: s; 0 leaves the classifier out (CDM).
        derivative: how the derivative is taken; `finite_difference` as in the paper.
        seed: of the noise.

    Runs in float32: in bf16 the finite difference at tau = 0.95 loses most of its digits.

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
        if derivative != "finite_difference":
            raise ValueError(f"derivative must be one of ['finite_difference']; got {derivative!r}.")
        self.diffusion, self.levels, self.num_steps, self.num_draws = diffusion, levels, num_steps, num_draws
        self.tau, self.guidance_scale, self.seed = tau, guidance_scale, seed

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Saliency (B, 1, H, W) float32, signed, of `x_0` (B, 1, H, W) in [-1, 1]; `slices` seed the noise."""
        x_0 = x_0.float()
        with torch.no_grad(), torch.autocast(x_0.device.type, enabled=False):
            maps = [
                self._one_map(x_0, network, noise_level, slice_noise(x_0, self.seed, draw, slices))
                for noise_level in self.levels
                for draw in range(self.num_draws)
            ]
            return torch.stack(maps).mean(dim=0)

    def _one_map(self, x_0: torch.Tensor, network: nn.Module, noise_level: int, eps: torch.Tensor) -> torch.Tensor:
        batch = len(x_0)
        y = torch.tensor([[0.0, 1.0], [1 - self.tau, self.tau]], device=x_0.device).repeat_interleave(batch, 0)
        towards = torch.tensor([1, 0], device=x_0.device).repeat_interleave(batch)
        t = torch.full((2 * batch,), noise_level, device=x_0.device)
        x_t = self.diffusion.add_noise(x_0, eps, t[:batch])  # Eq. (2), t = Q
        x_t = torch.cat([x_t, x_t])  # the trajectory of y1, and x'_t of the mixture
        a = torch.zeros_like(x_0)
        for _ in range(self.num_steps):  # t = Q, Q - 1, ..., Q - R + 1
            eps_hat = network(x_t, t, y)
            if self.guidance_scale:
                scale = self.guidance_scale * (1 - self.diffusion.alpha_bar(t, x_t)).sqrt()
                eps_hat = eps_hat - scale * classifier_gradient(network, x_t, t, towards)
            x_t = self.diffusion.ddim_step(x_t, eps_hat, t)  # Eq. (5)
            a += (x_t[:batch] - x_t[batch:]) / (1 - self.tau)
            t = t - 1
        return a


class IntensityFloor:
    """The floor that every method has to beat: the intensities themselves, lifted to be positive; no network."""

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Intensities (B, 1, H, W) in [0, 2] of `x_0` (B, 1, H, W) in [-1, 1]."""
        return x_0.float() + 1
