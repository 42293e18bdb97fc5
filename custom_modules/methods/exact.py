"""CDM without its finite difference: the limit tau -> 1 of Algorithm 1, by forward-mode differentiation.

Along the trajectory x_t of y1, dx_t is how x_t changes with the condition, taken from y0 to y1:

    dx_Q     = 0
    d_eps    = df/dx dx_t + df/dy (y1 - y0)             at x_t and y1, one forward pass with a tangent
    dx_{t-1} = Eq. (5) of dx_t and d_eps                the step is linear, so it is its own derivative
    a        = sum over t of dx_{t-1}

In CG-CDM both trajectories become the same, x'_t -> x_t, and the difference of their guidances,
s sqrt(1 - abar_t) grad (log p(y1 | x_t) - log p(y0 | x_t)), does not vanish, so that its quotient by 1 - tau has no
limit: it is kept at the weight of the configured tau, s / (1 - tau). On x_t itself, where it is s, it vanishes in the
limit.

Reference: Hu et al., MICCAI 2023, arXiv 2306.03878, Algorithm 1, whose difference approximates this derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import CDM, PairsOfDraws
from custom_modules.methods.forward_mode import Dual
from custom_modules.methods.guidance import Denoiser, classifier_gradient


class ExactCDM(CDM):
    """Runs `CDM` with the derivative in place of the difference; tau only weighs the guidance.

    The arguments are those of `CDM`. No near numbers are subtracted, so bf16 is safe at every tau.
    """

    MAX_TAU_BF16 = 1.0

    def algorithm_1(self, x_0: torch.Tensor, eps: torch.Tensor, Q: int, denoise: Denoiser) -> torch.Tensor:
        a, step = 0, self.diffusion.ddim_step
        x, dx = self.diffusion.add_noise(x_0, eps, Q), None  # Eq. (2); 0, before the condition comes in
        for t in range(Q, Q - self.num_steps, -1):
            eps_hat, d_eps = denoise([x, dx], t)
            dx = torch.zeros_like(x) if dx is None else dx
            x, dx = step(x, eps_hat, t), step(dx, d_eps, t)  # Eq. (5) and its derivative
            a += dx
        return a

    def denoiser(self, network: nn.Module, device: torch.device) -> Denoiser:
        """Returns the prediction f(x_t, y1) and its change d_eps for [x_t, dx_t], guided where s is not 0."""
        y, dy = (torch.tensor([v], device=device) for v in ([0.0, 1.0], [-1.0, 1.0]))  # y1, y1 - y0

        def plain(xs: Sequence[torch.Tensor | None], t: int) -> tuple[torch.Tensor, torch.Tensor]:
            (x, dx), n = xs, len(xs[0])
            x_t = x if dx is None else Dual(x, dx)  # at t = Q a constant
            eps_hat = network(x_t, torch.full((n,), t, device=device), Dual(y.expand(n, 2), dy.expand(n, 2)))
            return eps_hat.primal.float(), eps_hat.tangent.float()

        def guided(xs: Sequence[torch.Tensor | None], t: int) -> tuple[torch.Tensor, torch.Tensor]:
            eps_hat, d_eps = plain(xs, t)
            to_y0, to_y1 = classifier_gradient(network, xs[0], t)
            scale = self.guidance_scale / (1 - self.tau) * (1 - self.diffusion.alpha_bar(t, xs[0])).sqrt()
            return eps_hat, d_eps - scale * (to_y1 - to_y0)

        return guided if self.guidance_scale else plain


DERIVATIVES = {"finite_difference": CDM, "exact": ExactCDM}


def build_cdm(
    diffusion: Diffusion, *args, derivative: str = "finite_difference", uncertainty: bool = False, **settings
) -> CDM | PairsOfDraws:
    """Builds CDM with `settings` by its `derivative`; `uncertainty` keeps the maps of the pairs of draws apart.

    Raises:
        ValueError: if there is no such derivative, or a setting is out of its range.
    """
    if derivative not in DERIVATIVES:
        raise ValueError(f"derivative must be one of {list(DERIVATIVES)}; got {derivative!r}.")
    method = DERIVATIVES[derivative](diffusion, *args, **settings)
    return PairsOfDraws(method) if uncertainty else method
