"""Classifier guidance: a prediction of the noise, led towards a class by the noisy-image classifier.

    eps_hat = f(x_t, t, y) - s sqrt(1 - abar_t) grad log p(y' | x_t)

CG-CDM leads its two predictions towards y1 and towards y0, CG-Diff its one towards y0.

Reference: Dhariwal & Nichol 2021, arXiv 2105.05233, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from custom_modules.diffusion import Diffusion


def classifier_gradient(network: nn.Module, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of log p(y0 | x_t) and of log p(y1 | x_t) with respect to x_t.

    One backward pass gives both: with logits z, p(y1) = sigmoid(z_1 - z_0), so that with g = grad (z_1 - z_0)

        grad log p(y0) = -p(y1) g,    grad log p(y1) = p(y0) g,    and their difference is g.

    Works under `no_grad`, too.

    Args:
        network: has `classify(x_t, t)`, logits (B, 2).
        x_t: slices (B, C, H, W) float.
        t: timesteps (B,) int.

    Returns:
        Two tensors (B, C, H, W), for y0 and for y1.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        z_0, z_1 = network.classify(x_t, t).float().unbind(dim=1)
        g = torch.autograd.grad((z_1 - z_0).sum(), x_t)[0]
    p_1 = (z_1 - z_0).detach().sigmoid().view(-1, *[1] * (x_t.ndim - 1))
    return -p_1 * g, (1 - p_1) * g


class ClassifierGuidance:
    """Computes what guidance takes off a prediction: s sqrt(1 - abar_t) grad log p(y | x_t), for y0 and for y1.

    Args:
        network: has the classifier, `classify`.
        diffusion: the schedule.
        scale: s.

    Call: `x_t` (B, C, H, W) at `t` (B,); returns two tensors (B, C, H, W), towards y0 and towards y1.
    """

    def __init__(self, network: nn.Module, diffusion: Diffusion, scale: float) -> None:
        self.network, self.diffusion, self.scale = network, diffusion, scale

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scale * (1 - self.diffusion.alpha_bar(t, x_t)).sqrt()
        to_y0, to_y1 = classifier_gradient(self.network, x_t, t)
        return scale * to_y0, scale * to_y1


class GuidedPair:
    """Wraps the two predictions of CDM: the first is led towards y1, the second towards y0 (CG-CDM).

    Args:
        predict: `(x_t, x_t_prime, t)` -> the two predictions.
        guidance: of the classifier.

    Call: as `predict`.
    """

    def __init__(self, predict: Callable[..., Sequence[torch.Tensor]], guidance: ClassifierGuidance) -> None:
        self.predict, self.guidance = predict, guidance

    def __call__(self, x_t: torch.Tensor, x_t_prime: torch.Tensor, t: torch.Tensor) -> Sequence[torch.Tensor]:
        eps_hat, eps_hat_prime = self.predict(x_t, x_t_prime, t)
        if x_t is x_t_prime:  # at t = Q one gradient serves both
            to_y0, to_y1 = self.guidance(x_t, t)
        else:
            to_y0, to_y1 = self.guidance(torch.cat([x_t, x_t_prime]), torch.cat([t, t]))
            to_y0, to_y1 = to_y0[len(x_t) :], to_y1[: len(x_t)]
        return eps_hat - to_y1, eps_hat_prime - to_y0


class GuidedDenoiser:
    """Wraps a denoiser: its prediction is led towards y0 (CG-Diff).

    Args:
        denoiser: `(x_t, t, y)` -> the predicted noise.
        guidance: of the classifier.

    Call: as `denoiser`.
    """

    def __init__(self, denoiser: Callable[..., torch.Tensor], guidance: ClassifierGuidance) -> None:
        self.denoiser, self.guidance = denoiser, guidance

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x_t, t, y).float() - self.guidance(x_t, t)[0]
