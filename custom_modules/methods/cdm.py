"""CDM and CG-CDM: the target is where a denoising step depends on the condition.

A slice x_0 tagged y1 is noised to t = Q. From there R DDIM steps are taken twice, with the noise prediction f(x_t, y1)
and with the condition moved a little towards y0, f(x'_t, tau y1 + (1 - tau) y0). The finite difference

    a = sum over t of (x_{t-1} - x'_{t-1}) / (1 - tau)

approximates the derivative of the denoised slice with respect to the condition, taken from y0 to y1: it is positive
where "shows the target" brightens the slice. CG-CDM leads the two predictions towards y1 and y0 with the gradient of
the noisy-image classifier, with scale s (`guidance.py`). `exact.py` has the derivative without the difference.

Reference: Hu, Chen, Ho, Shi: Conditional Diffusion Models for Weakly Supervised Medical Image Segmentation, MICCAI
2023, arXiv 2306.03878, Algorithm 1. Its `beta_t` noise term is a slip; noising is Eq. (2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from custom_modules.diffusion import Diffusion
from custom_modules.methods.guidance import ClassifierGuidance, ConditionalDenoiser, Denoiser
from custom_modules.methods.settings import check_cdm
from custom_modules.networks.precision import autocast


class CDM:
    """Runs Algorithm 1 on a batch of slices, averaged over noise levels and noise draws. The defaults are the paper's.

    Args:
        diffusion: the schedule.
        noise_level: Q, or several whose maps are averaged.
        num_steps: R, unit steps t -> t - 1 from t = Q.
        num_draws: noise draws averaged at each level, in antithetic pairs.
        tau: share of y1 in the second condition, in [0, 1).
        guidance_scale: s of CG-CDM; 0 is CDM, without the classifier.
        seed: of the noise.
        amp: bf16 where the hardware has it and the map keeps its digits: the difference divides the rounding error by
            1 - tau, so above `MAX_TAU_BF16` it stays in float32 (on a GPU with torch's setting of TF32).

    Raises:
        ValueError: if a setting is out of its range.

    Example, with a denoiser in closed form, in which y1 brightens a square:
        >>> target = torch.zeros(1, 1, 4, 4)
        >>> target[..., 1:3, 1:3] = 1
        >>> def network(x_t, t, y):
        ...     return -y[:, 1].view(-1, 1, 1, 1) * target
        >>> a = CDM(Diffusion(), noise_level=400, num_steps=1)(torch.zeros(1, 1, 4, 4), network, slices=[0])
        >>> (a / a.max())[0, 0].round().int()
        tensor([[0, 0, 0, 0],
                [0, 1, 1, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """

    MAX_TAU_BF16 = 0.5

    def __init__(
        self,
        diffusion: Diffusion,
        noise_level: int | Sequence[int] = 400,
        num_steps: int = 10,
        num_draws: int = 1,
        tau: float = 0.95,
        guidance_scale: float = 0.0,
        seed: int = 0,
        amp: bool = True,
    ) -> None:
        self.levels = check_cdm(noise_level, num_steps, num_draws, tau, guidance_scale)
        self.diffusion, self.num_steps, self.num_draws = diffusion, num_steps, num_draws
        self.tau, self.guidance_scale, self.seed = tau, guidance_scale, seed
        self.bf16 = amp and tau <= self.MAX_TAU_BF16

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns the signed saliency (B, 1, H, W) float32 of `x_0` (B, 1, H, W) in [-1, 1].

        `network` is f(x_t, t, y), for CG-CDM with `classify`; the number of each slice, in `slices`, seeds its noise.
        """
        return self.maps(x_0, network, slices).mean(dim=1, keepdim=True)

    def maps(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns the maps of every draw and level, (B, num_draws * levels, H, W) float32, draw after draw."""
        x_0 = x_0.float()
        with torch.no_grad(), autocast(x_0.device, self.bf16):
            denoise = self.denoiser(network, x_0.device)
            noise = [slice_noise(x_0, self.seed, draw, slices) for draw in range(self.num_draws)]
            return torch.cat([self.algorithm_1(x_0, eps, Q, denoise) for eps in noise for Q in self.levels], dim=1)

    def algorithm_1(self, x_0: torch.Tensor, eps: torch.Tensor, Q: int, denoise: Denoiser) -> torch.Tensor:
        """Returns the map a (B, 1, H, W) of slices `x_0` from one noise level and one noise `eps`, as `x_0`."""
        a, step = 0, self.diffusion.ddim_step
        x = x_prime = self.diffusion.add_noise(x_0, eps, Q)  # Eq. (2)
        for t in range(Q, Q - self.num_steps, -1):
            eps_hat, eps_hat_prime = denoise([x, x_prime], t)  # f(x_t, y1), f(x'_t, tau y1 + (1 - tau) y0)
            x, x_prime = step(x, eps_hat, t), step(x_prime, eps_hat_prime, t)  # Eq. (5)
            a += (x - x_prime) / (1 - self.tau)
        return a

    def denoiser(self, network: nn.Module, device: torch.device) -> Denoiser:
        """Returns the two predictions of Algorithm 1, guided where s is not 0."""
        conditions = torch.tensor([[0.0, 1.0], [1 - self.tau, self.tau]], device=device)  # weights of y0 and y1
        plain = ConditionalDenoiser(network, conditions)
        if not self.guidance_scale:
            return plain
        return ClassifierGuidance(plain, network, self.diffusion, self.guidance_scale, towards=(1, 0))


class PairsOfDraws:
    """Keeps the maps of the antithetic pairs apart: their spread tells how much of a map the noise makes.

    Args:
        method: CDM with three draws or more; a last draw without a partner counts as a pair.

    Call: as `CDM`, but returns (B, pairs, H, W).

    Raises:
        ValueError: if `method` has fewer draws.
    """

    def __init__(self, method: CDM) -> None:
        if method.num_draws < 3:
            raise ValueError(f"uncertainty needs two pairs of draws or more, num_draws >= 3; got {method.num_draws}.")
        self.method, self.seed = method, method.seed

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        pairs = self.method.maps(x_0, network, slices).split(2 * len(self.method.levels), dim=1)
        return torch.cat([pair.mean(dim=1, keepdim=True) for pair in pairs], dim=1)


def slice_noise(like: torch.Tensor, seed: int, draw: int, slices: Sequence[int]) -> torch.Tensor:
    """Draws standard normal noise like `like` (B, C, H, W), always the same for the slice with number `slices[i]`.

    A generator for each slice makes the map independent of the batch size and of the order in which slices are
    visited. Draws come in antithetic pairs, eps and -eps: most of a map's error is odd in eps and cancels in a pair.
    """
    generator = torch.Generator()
    seeds = [((seed * 1_000_003 + draw // 2) * 65_537 + index) % 2**63 for index in slices]  # what a generator takes
    eps = torch.stack([torch.randn(like.shape[1:], generator=generator.manual_seed(s)) for s in seeds]).to(like)
    return -eps if draw % 2 else eps
