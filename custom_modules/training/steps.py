"""What one iteration of denoiser and classifier computes.

The denoiser f learns |eps - f(x_t, t, y)|^2 with the tag of the slice as condition y, the classifier learns p(y | x_t).
Their losses touch disjoint parameters. So training both in one run equals training them apart: each has its own
learning rate and its own gradient clipping. Only images and slice tags are read, never a mask.
"""

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
from custom_modules.training.augmentation import Augmentation
from custom_modules.training.sampling import rank_share

CLEAN_FRACTION = 0.25  # of the classifier's samples, at t = 0, where it gates slices and where CAMs read it


class TagBatch(PrepareBatch):
    """Makes the input x_0 (B, 1, H, W) float32, the target (tags (B,) int64) and two further arguments of the network
    (tags and weights (B,) float32), on the engine's device, from a batch of `SliceDataset`.

    Args:
        augmentation: changes the slices at random; None in validation.
    """

    def __init__(self, augmentation: Augmentation | None = None) -> None:
        self.augmentation = augmentation

    def __call__(self, batchdata: Mapping, device=None, non_blocking: bool = False, **kwargs):
        x_0 = batchdata["image"].to(device=device, non_blocking=non_blocking, dtype=torch.float32)
        tags = batchdata["tag"].to(device=device, non_blocking=non_blocking, dtype=torch.long)
        weights = batchdata["weight"].to(device=device, non_blocking=non_blocking)
        if self.augmentation is not None:
            x_0, _ = self.augmentation(x_0)
        return x_0, tags, (tags, weights), {}


class TrainingStep(nn.Module):
    """Computes the two losses of a batch in a single forward pass, as `DistributedDataParallel` needs it.

    Noise and t come from torch's global generator, which `EpochSeed` sets. Every process draws them for the batches of
    all processes and takes its share, just as `BalancedSampler` divides the slices.

    Args:
        network: denoiser and classifier.
        diffusion: noise schedule.
        timestep_range: lowest and highest t drawn more often, around the noise levels that inference visits.
        timestep_focus: share of the samples drawn from that range; the rest is uniform over all t.
        amp: bf16 mixed precision where the hardware has it.

    Raises:
        ValueError: `timestep_range` is not inside 0..T-1, or `timestep_focus` not inside [0, 1].
    """

    def __init__(
        self,
        network: WeakDiffusionNetwork,
        diffusion: Diffusion,
        timestep_range: Sequence[int] = (200, 600),
        timestep_focus: float = 0.8,
        amp: bool = True,
    ) -> None:
        super().__init__()
        if network.segmenter is not None:
            network.segmenter.requires_grad_(False)  # it learns later, by distillation
        pair = isinstance(timestep_range, Sequence) and len(timestep_range) == 2
        low, high = timestep_range if pair else (-1, -1)
        if not 0 <= low <= high < NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"timestep_range must be [low, high] with 0 <= low <= high < {NUM_TRAIN_TIMESTEPS}; "
                f"got {timestep_range}."
            )
        if not 0 <= timestep_focus <= 1:
            raise ValueError(f"timestep_focus is a share and must be in [0, 1]; got {timestep_focus}.")
        self.network, self.diffusion, self.amp = network, diffusion, amp
        self.low, self.high, self.timestep_focus = low, high, timestep_focus

    def sample_timesteps(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Draws t (B,) int64: a share of `timestep_focus` in [low, high], the others anywhere in 0..T-1."""
        focus = torch.randint(self.low, self.high + 1, (batch_size,), device=device)
        anywhere = torch.randint(0, NUM_TRAIN_TIMESTEPS, (batch_size,), device=device)
        return torch.where(torch.rand(batch_size, device=device) < self.timestep_focus, focus, anywhere)

    def forward(self, x_0: torch.Tensor, tags: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Draws noise and t, and computes the losses.

        Args:
            x_0: clean slices (B, 1, H, W) float32 in [-1, 1].
            tags: (B,) int64, 0 or 1.
            weights: (B,) float32, of the denoiser's loss: only the classifier may infer a tag from the position.

        Returns:
            One float32 per slice, each (B,): "denoising" (mean squared error of the noise), "weight", "classification"
            (cross entropy), "probability" (p(y1 | x_t), for the AUC).
        """
        total = len(x_0) * idist.get_world_size()
        eps = rank_share(torch.randn(total, *x_0.shape[1:], device=x_0.device))
        t = rank_share(self.sample_timesteps(total, x_0.device))
        clean = rank_share(torch.rand(total, device=x_0.device) < CLEAN_FRACTION)
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
    """Adds the two mean losses that `TrainingStep` returns, the denoiser's weighted; they contain the tags already."""

    def forward(self, pred: Mapping[str, torch.Tensor], tags: torch.Tensor) -> torch.Tensor:
        return (pred["weight"] * pred["denoising"]).mean() + pred["classification"].mean()


def parameter_groups(network: WeakDiffusionNetwork, lr_denoiser: float, lr_classifier: float) -> list[dict]:
    """Makes the two optimizer groups, denoiser and classifier, each with its own learning rate."""
    return [
        {"params": list(network.denoiser.parameters()), "lr": lr_denoiser},
        {"params": list(network.classifier.parameters()), "lr": lr_classifier},
    ]


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Schedules learning rates: a linear rise over `warmup_steps`, times a cosine that is 0 at `total_steps`.

    MONAI's `WarmupCosineSchedule` stores its length in the checkpoint, so a run resumed with more epochs would keep the
    old length; here it is always the one asked for.
    """

    def factor(step: int) -> float:
        return min(1.0, step / max(warmup_steps, 1)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))

    return LambdaLR(optimizer, factor)
