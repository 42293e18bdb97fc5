"""Guidance: the gradient of the noisy-image classifier."""

from __future__ import annotations

import torch
from torch import nn


def classifier_gradient(network: nn.Module, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of log p(y0 | x_t) and of log p(y1 | x_t) with respect to x_t, each (B, C, H, W), for `t` (B,) int.

    One backward pass gives both: with logits z, p(y1) = sigmoid(z_1 - z_0), so that with g = grad (z_1 - z_0)

        grad log p(y0) = -p(y1) g,    grad log p(y1) = p(y0) g,    and their difference is g.

    It works under `no_grad`, too.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        z_0, z_1 = network.classify(x_t, t).float().unbind(dim=1)
        g = torch.autograd.grad((z_1 - z_0).sum(), x_t)[0]
    p_1 = (z_1 - z_0).detach().sigmoid().view(-1, *[1] * (x_t.ndim - 1))
    return -p_1 * g, (1 - p_1) * g
