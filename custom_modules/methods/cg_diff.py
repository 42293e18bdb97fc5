"""CG-Diff: the target is what differs between a slice and its healthy counterfactual.

The slice x_0 is encoded into its noise x_L by DDIM run backwards, which draws no noise, so that x_L still holds the
patient's anatomy. From there DDIM decodes, led towards "healthy" (y0) by the gradient of the noisy-image classifier:

    eps_hat = f(x_t, t, y0)                                                      encoding, t up to L
    eps_hat = f(x_t, t, y0) - s sqrt(1 - abar_t) grad log p(y0 | x_t)            decoding, t down from L
    x_t'    = sqrt(abar_t') x0_hat + sqrt(1 - abar_t') eps_hat                   Eq. (5), t' the next index

The map is |x_0 - xhat|. The denoiser gets y0 in both directions, as in Wolleb's code. That code also clips x0_hat to
[-1, 1] and noises the slice once, at index 0, before it encodes; the paper does neither, nor do we.

References: Wolleb, Bieder, Sandkuehler, Cattin: Diffusion Models for Medical Anomaly Detection, MICCAI 2022, arXiv
2203.04306, Algorithm 1; DDIM and its encoding: Song et al. 2021, arXiv 2010.02502; guided DDIM: Dhariwal & Nichol
2021, arXiv 2105.05233, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from custom_modules.diffusion import Diffusion
from custom_modules.methods.guidance import ClassifierGuidance, ConditionalDenoiser
from custom_modules.methods.settings import check_cg_diff
from custom_modules.networks.precision import autocast


class CGDiff:
    """Runs Wolleb's Algorithm 1 on a batch of slices; deterministic.

    Args:
        diffusion: the schedule.
        noise_level: L, the index up to which a slice is encoded (Q of the other methods).
        guidance_scale: s; at 0 the classifier is not called, and the reconstruction is the slice but for the error of
            the discrete steps.
        stride: timesteps a step; the network is called 2 ceil((L + 1) / stride) times. 1 is the paper's. The guidance
            of a step grows with its length, so s means the same at every stride.
        amp: bf16 where the hardware has it.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        noise_level: int,
        guidance_scale: float = 100.0,
        stride: int = 1,
        amp: bool = True,
    ) -> None:
        check_cg_diff(noise_level, guidance_scale, stride)
        self.diffusion, self.guidance_scale, self.amp = diffusion, guidance_scale, amp
        # From the clean image (t = -1, where abar = 1) to L exactly; the last step up may be shorter than the others.
        self.timesteps = [*range(-1, noise_level, stride), noise_level]

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns the saliency (B, 1, H, W) float32, >= 0, of `x_0` (B, 1, H, W) in [-1, 1]; `slices` is ignored."""
        return (x_0.float() - self.reconstruct(x_0, network)).abs()

    def reconstruct(self, x_0: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Returns the healthy counterfactual xhat (B, 1, H, W) float32, about [-1, 1], of `x_0` (B, 1, H, W)."""
        x = x_0.float()
        denoise = guided = ConditionalDenoiser(network, torch.tensor([0], device=x.device))  # y0
        if self.guidance_scale:
            guided = ClassifierGuidance(denoise, network, self.diffusion, self.guidance_scale, towards=(0,))
        with torch.no_grad(), autocast(x.device, self.amp):
            for t, t_next in pairwise(self.timesteps):  # encode: -1 -> ... -> L
                (eps_hat,) = denoise([x], max(t, 0))  # the network knows no t = -1; index 0 is nearest to clean
                x = self.diffusion.ddim_step(x, eps_hat, t, t_next)  # Eq. (5), upwards
            for t, t_next in pairwise(reversed(self.timesteps)):  # decode: L -> ... -> -1
                (eps_hat,) = guided([x], t)
                x = self.diffusion.ddim_step(x, eps_hat, t, t_next)  # Eq. (5)
        return x
