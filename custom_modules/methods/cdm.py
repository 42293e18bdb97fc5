"""CDM: the target is where one denoising step depends on the condition.

A slice x_0 tagged y1 is noised to t = Q. From there R DDIM steps are taken twice, with the noise prediction f(x_t, y1)
and with the condition moved a little towards y0, f(x'_t, tau y1 + (1 - tau) y0). The finite difference

    a = sum over t of (x_{t-1} - x'_{t-1}) / (1 - tau)

approximates the derivative of the denoised image with respect to the condition, taken from y0 to y1: it is positive
where "shows the target" brightens the image. CG-CDM guides both predictions by a classifier (guidance.py).

Reference: Hu, Chen, Ho, Shi: Conditional Diffusion Models for Weakly Supervised Medical Image Segmentation, MICCAI
2023, arXiv 2306.03878, Algorithm 1. Its `beta_t` noise term is a slip; noising is Eq. (2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from custom_modules.diffusion import NUM_TRAIN_TIMESTEPS, Diffusion
from custom_modules.methods.guidance import ClassifierGuidance, GuidedPair
from custom_modules.networks.precision import autocast

MAX_TAU_BF16 = 0.5


class CDM:
    """Algorithm 1 on a batch of slices, averaged over noise levels and noise draws.

    Args:
        diffusion: the schedule.
        noise_level: Q, or several whose maps are averaged.
        num_steps: R, unit steps t -> t - 1 from t = Q.
        num_draws: noise draws averaged at each level, in antithetic pairs.
        tau: share of y1 in the second condition, in [0, 1).
        guidance_scale: s; 0 leaves the classifier out (CDM), above 0 it is CG-CDM.
        seed: of the noise.
        amp: bf16 where the hardware has it and the map keeps its digits: a finite difference divides the rounding error
            by 1 - tau, so above `MAX_TAU_BF16` it stays in float32 (on a GPU with torch's setting of TF32).

    Raises:
        ValueError: if a setting is out of its range.

    Example, with a network that predicts noise = the share of y1 everywhere, for which Eq. (5) is known in closed form:

        >>> import torch
        >>> from custom_modules.diffusion import Diffusion
        >>> network = lambda x_t, t, y: y[:, 1].view(-1, 1, 1, 1).expand_as(x_t)
        >>> cdm = CDM(Diffusion(), noise_level=400, num_steps=1, tau=0.0)
        >>> a = cdm(torch.zeros(1, 1, 4, 4), network, slices=[0])
        >>> now, after = Diffusion().alphas_cumprod[[400, 399]]
        >>> expected = (1 - after).sqrt() - (after * (1 - now) / now).sqrt()
        >>> torch.allclose(a, expected.expand(1, 1, 4, 4), atol=1e-5)
        True
    """

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
        self.levels = check_settings(noise_level, num_steps, num_draws, tau, guidance_scale)
        self.diffusion, self.num_steps, self.num_draws, self.tau = diffusion, num_steps, num_draws, tau
        self.guidance_scale, self.seed, self.bf16 = guidance_scale, seed, amp and self._keeps_digits(tau)

    @staticmethod
    def _keeps_digits(tau: float) -> bool:
        return tau <= MAX_TAU_BF16

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Gives the signed saliency (B, 1, H, W) float32 of `x_0` (B, 1, H, W) in [-1, 1]; `slices` seed the noise."""
        return self.maps(x_0, network, slices).mean(dim=1, keepdim=True)

    def maps(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns the maps of every draw and level, (B, num_draws * levels, H, W) float32, draw after draw."""
        x_0, maps = x_0.float(), []
        with torch.no_grad(), autocast(x_0.device, self.bf16):
            for draw in range(self.num_draws):
                eps = slice_noise(x_0, self.seed, draw, slices)
                for Q in self.levels:
                    t = torch.full((len(x_0),), Q, device=x_0.device)
                    maps.append(self.derivative(self.diffusion.add_noise(x_0, eps, t), t, network))  # Eq. (2), t = Q
        return torch.cat(maps, dim=1)

    def derivative(self, x_t: torch.Tensor, t: torch.Tensor, network: nn.Module) -> torch.Tensor:
        """Returns a (B, 1, H, W) for slices `x_t` (B, 1, H, W) noised to `t` (B,) = Q."""
        predict = ConditionPair(network, self.tau)
        if self.guidance_scale:
            predict = GuidedPair(predict, ClassifierGuidance(network, self.diffusion, self.guidance_scale))
        x_t_prime, a = x_t, torch.zeros_like(x_t)
        for _ in range(self.num_steps):  # t = Q, Q - 1, ..., Q - R + 1
            eps_hat, eps_hat_prime = predict(x_t, x_t_prime, t)
            x_t = self.diffusion.ddim_step(x_t, eps_hat, t)  # Eq. (5)
            x_t_prime = self.diffusion.ddim_step(x_t_prime, eps_hat_prime, t)
            a += (x_t - x_t_prime) / (1 - self.tau)
            t = t - 1
        return a


class ConditionPair:
    """Predicts f(x_t, y1) and f(x'_t, tau y1 + (1 - tau) y0), both as one batch of the network.

    Args:
        network: f.
        tau: share of y1 in the second condition.

    Call: `x_t` and `x_t_prime` (B, C, H, W) at `t` (B,); returns the two predictions, each (B, C, H, W) float32.
    """

    def __init__(self, network: nn.Module, tau: float) -> None:
        self.network, self.conditions = network, ((0.0, 1.0), (1 - tau, tau))

    def __call__(self, x_t: torch.Tensor, x_t_prime: torch.Tensor, t: torch.Tensor) -> Sequence[torch.Tensor]:
        y = torch.tensor(self.conditions, device=x_t.device).repeat_interleave(len(x_t), 0)
        return self.network(torch.cat([x_t, x_t_prime]), torch.cat([t, t]), y).float().chunk(2)


class PairsOfDraws:
    """Keeps the maps of the pairs of draws apart: their spread tells how much of a map the noise makes.

    Args:
        method: CDM with three draws or more; a last draw without partner counts as a pair.

    Raises:
        ValueError: if `method` has fewer draws.

    Call: as `CDM`, but returns (B, pairs, H, W).
    """

    def __init__(self, method: CDM) -> None:
        if method.num_draws < 3:
            raise ValueError(
                f"uncertainty needs two pairs of draws or more, num_draws >= 3; got {method.num_draws}."
            )
        self.method, self.seed = method, method.seed

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        pairs = self.method.maps(x_0, network, slices).split(2 * len(self.method.levels), dim=1)
        return torch.cat([pair.mean(dim=1, keepdim=True) for pair in pairs], dim=1)


def slice_noise(like: torch.Tensor, seed: int, draw: int, slices: Sequence[int]) -> torch.Tensor:
    """Draws standard normal noise like `like` (B, C, H, W); slice `slices[i]` always gets the same.

    A generator a slice makes the map independent of the batch size and of the order in which slices are visited. Draws
    come in antithetic pairs, eps and -eps: most of a map's error is odd in eps and cancels within a pair.
    """
    generator = torch.Generator()
    seeds = [((seed * 1_000_003 + draw // 2) * 65_537 + index) % 2**63 for index in slices]  # what a generator takes
    eps = torch.stack([torch.randn(like.shape[1:], generator=generator.manual_seed(s)) for s in seeds]).to(like)
    return -eps if draw % 2 else eps


def check_settings(
    noise_level: int | Sequence[int], num_steps: int, num_draws: int, tau: float, guidance_scale: float
) -> list[int]:
    """Returns the noise levels as a list; raises ValueError if a setting of `CDM` is out of its range."""
    levels = list(noise_level) if isinstance(noise_level, Sequence) else [noise_level]
    last = NUM_TRAIN_TIMESTEPS - 1
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
    return levels
