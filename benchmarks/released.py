"""The released procedure, transcribed plainly, for comparison only: Algorithm 1 with R = 10 and tau = 0.95, slice after
slice and condition after condition; with `scale` (s), CG-CDM with a backward pass of the classifier for each condition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import slice_noise
from custom_modules.networks.precision import autocast

R, TAU = 10, 0.95


def released(
    network: nn.Module, diffusion: Diffusion, noise_level: int, scale: float, amp: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function from slices (n, 1, H, W) in [-1, 1] to their maps; `scale` is s, `amp` opens bf16."""

    def guidance(x_t: torch.Tensor, t: torch.Tensor, y: int) -> torch.Tensor | float:
        if not scale:
            return 0.0
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            log_p = network.classify(x_t, t).float().log_softmax(dim=1)[:, y].sum()
        return scale * (1 - diffusion.alpha_bar(t, x_t)).sqrt() * torch.autograd.grad(log_p, x_t)[0]

    def one_slice(x_0: torch.Tensor, index: int) -> torch.Tensor:
        conditions = torch.tensor([[0.0, 1.0], [1 - TAU, TAU]], device=x_0.device).split(1)
        t = torch.full((1,), noise_level, device=x_0.device)
        x = x_prime = diffusion.add_noise(x_0, slice_noise(x_0, 0, 0, [index]), t)
        a = torch.zeros_like(x_0)
        for _ in range(R):
            eps = network(x, t, conditions[0]).float() - guidance(x, t, 1)
            eps_prime = network(x_prime, t, conditions[1]).float() - guidance(x_prime, t, 0)
            x, x_prime = diffusion.ddim_step(x, eps, t), diffusion.ddim_step(x_prime, eps_prime, t)
            a += (x - x_prime) / (1 - TAU)
            t = t - 1
        return a

    def maps(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(x.device, amp):
            return torch.cat([one_slice(x_0, index) for index, x_0 in enumerate(x.split(1))])

    return maps
