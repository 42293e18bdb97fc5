"""CG-Diff: the target is what differs between a slice and its healthy counterfactual.

The slice x_0 is encoded into its noise x_L by DDIM run backwards, which draws nothing, so that x_L still holds the
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

from custom_modules.diffusion import NUM_TRAIN_TIMESTEPS, Diffusion
from custom_modules.methods.guidance import ClassifierGuidance, GuidedDenoiser
from custom_modules.networks.precision import autocast


class CGDiff:
    """Wolleb's Algorithm 1 on a batch of slices; deterministic.

    Args:
        diffusion: the schedule.
        noise_level: L, the index up to which a slice is encoded (Q of the other methods).
        guidance_scale: s; 0 leaves the classifier out, and the reconstruction is the slice but for discretisation.
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
        last = NUM_TRAIN_TIMESTEPS - 1
        if not isinstance(noise_level, int) or not 1 <= noise_level <= last:
            raise ValueError(
                f"noise_level (L) of CG-Diff must be one integer in 1..{last}, not a list; got {noise_level}."
            )
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale (s) must be >= 0; got {guidance_scale}.")
        if not isinstance(stride, int) or not 1 <= stride <= noise_level:
            raise ValueError(
                f"stride must be an integer >= 1 and <= noise_level (L); got stride={stride}, L={noise_level}."
            )
        self.diffusion, self.guidance_scale, self.amp = diffusion, guidance_scale, amp
        # From the clean image (t = -1, where abar = 1) to L exactly; the last step up may be shorter than the others.
        self.timesteps = [*range(-1, noise_level, stride), noise_level]

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns the saliency (B, 1, H, W) float32, >= 0, of `x_0` (B, 1, H, W) in [-1, 1]; `slices` is not used."""
        return (x_0.float() - self.reconstruct(x_0, network)).abs()

    def reconstruct(self, x_0: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Gives the counterfactual xhat (B, 1, H, W) float32, about [-1, 1], of `x_0` (B, 1, H, W) in [-1, 1]."""
        x_t, decoder = x_0.float(), network
        if self.guidance_scale:
            decoder = GuidedDenoiser(network, ClassifierGuidance(network, self.diffusion, self.guidance_scale))
        y_0 = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
        path = [torch.full_like(y_0, t) for t in self.timesteps]
        with torch.no_grad(), autocast(x_t.device, self.amp):
            for t, t_next in pairwise(path):  # encode: -1 -> ... -> L
                # The network knows no t = -1; index 0 is nearest to clean.
                eps_hat = network(x_t, t.clamp(min=0), y_0).float()
                x_t = self.diffusion.ddim_step(x_t, eps_hat, t, t_next)  # Eq. (5), upwards
            for t, t_next in pairwise(reversed(path)):  # decode: L -> ... -> -1
                eps_hat = decoder(x_t, t, y_0).float()
                x_t = self.diffusion.ddim_step(x_t, eps_hat, t, t_next)  # Eq. (5)
        return x_t
