"""The denoiser as a method calls it, and classifier guidance as a wrapper around it.

A denoiser here is a callable `(xs, t) -> predictions`: it takes one batch (B, C, H, W) for each trajectory that a
method follows, all at the same t, and returns the predicted noise of each. `ConditionalDenoiser` is the network under
one condition for each trajectory. `ClassifierGuidance` wraps a denoiser and leads each trajectory towards a class y:

    eps_hat = eps_hat(x_t) - s sqrt(1 - abar_t) grad log p(y | x_t)

with p(y | x_t) the classifier of noised slices. CG-CDM leads its two trajectories towards y1 and y0, CG-Diff its only
one towards y0.

Reference: Dhariwal & Nichol 2021, arXiv 2105.05233, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from custom_modules.diffusion import Diffusion

Denoiser = Callable[[Sequence[torch.Tensor], int], Sequence[torch.Tensor]]


class ConditionalDenoiser:
    """Predicts the noise, f(x_t, t, y), of trajectories with a condition each, as one batch.

    Args:
        network: f.
        conditions: of the trajectories, (n,) int or (n, 2) float weights of y0 and y1, on the network's device.

    Call: `xs`, for each of the n trajectories x_t (B, C, H, W) float32, and `t`; returns the predictions, alike.
    """

    def __init__(self, network: nn.Module, conditions: torch.Tensor) -> None:
        self.network, self.conditions = network, conditions

    def __call__(self, xs: Sequence[torch.Tensor], t: int) -> Sequence[torch.Tensor]:
        x_t = torch.cat(list(xs))
        y = self.conditions.repeat_interleave(len(xs[0]), 0)
        return self.network(x_t, torch.full((len(x_t),), t, device=x_t.device), y).float().chunk(len(xs))


class ClassifierGuidance:
    """Wraps a denoiser: leads each of its trajectories towards a class.

    Args:
        denoiser: what is wrapped; it is called in the same way.
        network: has the classifier.
        diffusion: the schedule.
        scale: s.
        towards: class of each trajectory, 0 or 1.
    """

    def __init__(
        self, denoiser: Denoiser, network: nn.Module, diffusion: Diffusion, scale: float, towards: Sequence[int]
    ) -> None:
        self.denoiser, self.network, self.diffusion = denoiser, network, diffusion
        self.scale, self.towards = scale, towards

    def __call__(self, xs: Sequence[torch.Tensor], t: int) -> Sequence[torch.Tensor]:
        distinct = xs[:1] if xs[0] is xs[-1] else xs  # at t = Q, x'_t is x_t: half the work
        gradients = [g.chunk(len(distinct)) for g in classifier_gradient(self.network, torch.cat(list(distinct)), t)]
        scale = self.scale * (1 - self.diffusion.alpha_bar(t, xs[0])).sqrt()
        return [
            eps_hat - scale * gradients[y][i % len(distinct)]
            for i, (eps_hat, y) in enumerate(zip(self.denoiser(xs, t), self.towards))
        ]


def classifier_gradient(
    network: nn.Module, x_t: torch.Tensor, t: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of log p(y0 | x_t) and of log p(y1 | x_t) with respect to x_t.

    One backward pass gives both: with logits z, p(y1) = sigmoid(z_1 - z_0), so that with g = grad (z_1 - z_0)

        grad log p(y0) = -p(y1) g,    grad log p(y1) = p(y0) g,    and their difference is g.

    Both are (B, C, H, W) float32 like `x_t`; `t` is an int or (B,) int. Works under `no_grad`, too.
    """
    t = torch.full((len(x_t),), t, device=x_t.device) if isinstance(t, int) else t
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        z_0, z_1 = network.classify(x_t, t).float().unbind(dim=1)
        g = torch.autograd.grad((z_1 - z_0).sum(), x_t)[0]
    p_1 = (z_1 - z_0).detach().sigmoid().view(-1, *[1] * (x_t.ndim - 1))
    return -p_1 * g, (1 - p_1) * g
