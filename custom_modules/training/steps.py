"""What one iteration of training computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ignite.distributed as idist
import torch
from monai.engines.utils import PrepareBatch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from custom_modules.diffusion import NUM_TRAIN_TIMESTEPS, Diffusion
from custom_modules.networks.precision import autocast
from custom_modules.networks.weak_diffusion import WeakDiffusionNetwork
from custom_modules.training.sampling import rank_share


class TagBatch(PrepareBatch):
    """Batch of `SliceDataset` -> x_0 (B, 1, H, W) float32, tags (B,) int64, target and argument of the network at once,
    and as another argument the weights (B,) float32, on the engine's device."""

    def __call__(self, batchdata: Mapping, device=None, non_blocking: bool = False, **kwargs):
        x_0 = batchdata["image"].to(device=device, non_blocking=non_blocking, dtype=torch.float32)
        tags = batchdata["tag"].to(device=device, non_blocking=non_blocking, dtype=torch.long)
        weights = batchdata["weight"].to(device=device, non_blocking=non_blocking)
        return x_0, tags, (tags, weights), {}


class TrainingStep(nn.Module):
    """The two losses of one batch, as a single forward pass, which is what `DistributedDataParallel` needs.

    Args:
        network: the denoiser and the classifier.
        diffusion: the schedule.
        timestep_range: lowest and highest t drawn more often, around the noise levels that inference visits.
        timestep_focus: share of samples drawn from that range; the rest is uniform over all t.
        clean_fraction: share of the classifier's samples at t = 0, where it gates slices and where CAMs read it.
        amp: bf16 mixed precision where the hardware has it.

    Forward: `x_0` (B, 1, H, W) in [-1, 1], `tags` (B,) in {0, 1} and `weights` (B,) of the denoiser's loss (the
    classifier may read the tag off the position, f must not); returns, a value a sample, "denoising" (mean squared
    error of the noise), "weight", "classification" (cross entropy), and "probability" (p(y1 | x_t), for the AUC).
    Noise and t come from torch's global generator, which `EpochSeed` sets; every process draws them for the batches of
    all processes and takes its share, as `BalancedSampler` deals out the slices.

    Raises:
        ValueError: if `timestep_range` is not inside 0..T-1 or a share is not inside [0, 1].
    """

    def __init__(
        self,
        network: WeakDiffusionNetwork,
        diffusion: Diffusion,
        timestep_range: Sequence[int] = (200, 600),
        timestep_focus: float = 0.8,
        clean_fraction: float = 0.25,
        amp: bool = True,
    ) -> None:
        super().__init__()
        if network.segmenter is not None:
            network.segmenter.requires_grad_(False)  # it learns later, by distillation
        low, high = timestep_range
        if not 0 <= low <= high < NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"timestep_range must be [low, high] with 0 <= low <= high < {NUM_TRAIN_TIMESTEPS}; "
                f"got {list(timestep_range)}."
            )
        for name, value in (("timestep_focus", timestep_focus), ("clean_fraction", clean_fraction)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share and must be in [0, 1]; got {value}.")
        self.network, self.diffusion = network, diffusion
        self.low, self.high = low, high
        self.timestep_focus, self.clean_fraction, self.amp = timestep_focus, clean_fraction, amp

    def sample_timesteps(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """t (B,) int64: `timestep_focus` of them in [low, high], the others anywhere in 0..T-1."""
        focus = torch.randint(self.low, self.high + 1, (batch_size,), device=device)
        anywhere = torch.randint(0, NUM_TRAIN_TIMESTEPS, (batch_size,), device=device)
        return torch.where(torch.rand(batch_size, device=device) < self.timestep_focus, focus, anywhere)

    def forward(self, x_0: torch.Tensor, tags: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        total = len(x_0) * idist.get_world_size()
        eps = rank_share(torch.randn(total, *x_0.shape[1:], device=x_0.device))
        t = rank_share(self.sample_timesteps(total, x_0.device))
        clean = rank_share(torch.rand(total, device=x_0.device) < self.clean_fraction)
        x_t = self.diffusion.add_noise(x_0, eps, t)  # Eq. (2)
        with autocast(x_0.device, self.amp):
            eps_hat = self.network(x_t, t, tags)
            logits = self.network.classify(torch.where(clean[:, None, None, None], x_0, x_t), t.masked_fill(clean, 0))
        return {
            "denoising": (eps_hat.float() - eps).square().mean(dim=(1, 2, 3)),
            "weight": weights,
            "classification": nn.functional.cross_entropy(logits.float(), tags, reduction="none"),
            "probability": logits.float().softmax(dim=1)[:, 1],
        }


class JointLoss(nn.Module):
    """Sum of the two mean losses that `TrainingStep` returns, the denoiser's weighted; the tags are already inside."""

    def forward(self, pred: Mapping[str, torch.Tensor], tags: torch.Tensor) -> torch.Tensor:
        return (pred["weight"] * pred["denoising"]).mean() + pred["classification"].mean()


def parameter_groups(network: WeakDiffusionNetwork, lr_denoiser: float, lr_classifier: float) -> list[dict]:
    """Optimizer groups with a learning rate each for the denoiser and the classifier."""
    return [
        {"params": list(network.denoiser.parameters()), "lr": lr_denoiser},
        {"params": list(network.classifier.parameters()), "lr": lr_classifier},
    ]


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Learning rates that rise linearly over `warmup_steps` and fall to 0 along a cosine until `total_steps`.

    MONAI's `WarmupCosineSchedule` stores its length in the checkpoint, so that a run resumed with more epochs would
    keep the old one; here the length is always the one asked for.
    """

    def factor(step: int) -> float:
        return min(1.0, step / max(warmup_steps, 1)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))

    return LambdaLR(optimizer, factor)
