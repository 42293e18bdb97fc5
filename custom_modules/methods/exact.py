"""CDM with the exact derivative: the limit of Algorithm 1 for tau -> 1.

Instead of a second trajectory x'_t, the tangent dx_t = how x_t changes with the condition, along y1 - y0, is carried
beside x_t (forward-mode differentiation, `forward_mode.py`); it is 0 at t = Q, and

    a = sum over t of dx_{t-1}

CG-CDM's guidance difference does not vanish in that limit. Its weight is kept at s / (1 - tau), so that on the
trajectory of y1 itself, where it is s, it vanishes.
"""

from __future__ import annotations

import torch
from torch import nn

from custom_modules.methods.cdm import CDM, PairsOfDraws
from custom_modules.methods.forward_mode import Dual
from custom_modules.methods.guidance import ClassifierGuidance


class ExactCDM(CDM):
    """CDM or CG-CDM by the exact derivative; arguments and call are those of `CDM`.

    It does not cancel digits, so bf16 is safe at every tau, which here only weighs the guidance.
    """

    @staticmethod
    def _keeps_digits(tau: float) -> bool:
        return True

    def derivative(self, x_t: torch.Tensor, t: torch.Tensor, network: nn.Module) -> torch.Tensor:
        guidance = ClassifierGuidance(network, self.diffusion, self.guidance_scale / (1 - self.tau))
        y, dy = (torch.tensor([v], device=x_t.device).expand(len(x_t), 2) for v in ([0.0, 1.0], [-1.0, 1.0]))
        dx, a = torch.zeros_like(x_t), torch.zeros_like(x_t)
        for step in range(self.num_steps):
            eps_hat = network(x_t if step == 0 else Dual(x_t, dx), t, Dual(y, dy))
            eps_hat, d_eps = eps_hat.primal.float(), eps_hat.tangent.float()
            if self.guidance_scale:  # x'_t -> x_t, where the two guidances still differ
                to_y0, to_y1 = guidance(x_t, t)
                d_eps = d_eps - (to_y1 - to_y0)
            # Eq. (5) is linear in x_t and eps_hat, so it is its own derivative.
            x_t, dx = self.diffusion.ddim_step(x_t, eps_hat, t), self.diffusion.ddim_step(dx, d_eps, t)
            a += dx
            t = t - 1
        return a


DERIVATIVES = {"finite_difference": CDM, "exact": ExactCDM}


def build_cdm(
    *args, derivative: str = "finite_difference", uncertainty: bool = False, **settings
) -> CDM | PairsOfDraws:
    """Builds CDM or CG-CDM as the knobs `derivative` and `uncertainty` ask for; all else is passed to it.

    Raises:
        ValueError: if there is no such derivative, or a setting is out of its range.
    """
    if derivative not in DERIVATIVES:
        raise ValueError(f"derivative must be one of {list(DERIVATIVES)}; got {derivative!r}.")
    method = DERIVATIVES[derivative](*args, **settings)
    return PairsOfDraws(method) if uncertainty else method
