"""Training: what one iteration computes, and the handlers that make a run reproducible and resumable.

The denoiser learns |eps - f(x_t, t, y)|^2 with the slice's tag as condition y, the classifier learns p(y | x_t). Their
losses touch disjoint parameters, so training both in one run equals training them apart: each has its own learning
rate and its own gradient clipping. Only images and slice tags are read here, never a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler, ProgressBar
from monai.engines.utils import IterationEvents, PrepareBatch
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.metrics import compute_roc_auc
from monai.utils import evenly_divisible_all_gather
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from custom_modules.diffusion import Diffusion
from custom_modules.networks import WeakDiffusionNetwork, autocast
from custom_modules.slices import epoch_seed, share
from custom_modules.writers import whole


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
        if not 0 <= low <= high < diffusion.num_train_timesteps:
            raise ValueError(
                f"timestep_range must be [low, high] with 0 <= low <= high < {diffusion.num_train_timesteps}; "
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
        anywhere = torch.randint(0, self.diffusion.num_train_timesteps, (batch_size,), device=device)
        return torch.where(torch.rand(batch_size, device=device) < self.timestep_focus, focus, anywhere)

    def forward(self, x_0: torch.Tensor, tags: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        total = len(x_0) * idist.get_world_size()
        eps = share(torch.randn(total, *x_0.shape[1:], device=x_0.device))
        t = share(self.sample_timesteps(total, x_0.device))
        clean = share(torch.rand(total, device=x_0.device) < self.clean_fraction)
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


class ClipGradients:
    """Clips the gradient norm of every optimizer group by itself, after each backward pass."""

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.max_norm)


class EpochSeed:
    """Makes noise and t of an epoch a function of (seed, epoch), the same in every process.

    As `BalancedSampler` does so for slices and augmentations, a run that was killed and resumes at an epoch's start
    draws the same as one that was never stopped, and no generator's state has to be stored. Validation
    (`every_epoch=False`) draws the same noise each time.
    """

    def __init__(self, seed: int, every_epoch: bool = True) -> None:
        self.seed, self.every_epoch = seed, every_epoch

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        torch.manual_seed(epoch_seed(self.seed, self.every_epoch * engine.state.epoch))


class MeanLoss:
    """Under several processes: makes the loss that is logged the mean over all of them, that of the whole batch."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"].detach() / idist.get_world_size()
        engine.state.output["loss"] = idist.all_reduce(loss)


class AveragedWeights:
    """Keeps the exponential moving average of the weights (`ema_handler`) and writes it after every epoch.

    The file is one flat state dict of `network_def` in half precision, which costs nothing measurable at inference and
    halves it; it appears whole or not at all. The names of the training cases stand beside it (`training_list`), so
    that evaluation can tell when it is fed one.

    Args:
        ema: of the network.
        path: of the file.
        cases: names of the training cases.
        start: weights that the run starts from, whose training cases count as well; None: from scratch.
    """

    WRITTEN = Events.EPOCH_COMPLETED

    def __init__(self, ema: EMAHandler, path: str, cases: Sequence[str], start: str | None = None) -> None:
        earlier = (training_cases(start) if start else None) or []
        self.ema, self.path, self.cases = ema, Path(path), list(dict.fromkeys([*earlier, *cases]))

    def attach(self, engine: Engine) -> None:
        self.ema.attach(engine)
        engine.add_event_handler(Events.STARTED, self._begin_at_the_network)
        engine.add_event_handler(Events.EPOCH_STARTED, self._continue_warmup)
        engine.add_event_handler(self.WRITTEN, self)

    def _begin_at_the_network(self, engine: Engine) -> None:
        self.ema.ema_model.load_state_dict(self.ema.model.state_dict())  # a host may have loaded weights by a handler

    def _continue_warmup(self, engine: Engine) -> None:
        self.ema.momentum_scheduler.event_index = engine.state.iteration  # a resumed run would begin it anew

    def __call__(self, engine: Engine) -> None:
        if engine.state.rank > 0:
            return
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.ema.ema_model.state_dict().items()}
        with whole(self.path) as aside, open(aside, "wb") as file:  # a path's name would enter the file
            torch.save(state, file)
        with whole(training_list(self.path)) as aside:
            aside.write_text("".join(f"{case}\n" for case in self.cases), encoding="utf-8")


class TagMetrics:
    """Validation metrics of `TrainingStep`, over the slices of all processes: denoising loss by tag, and AUC of the
    classifier over the drawn t."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._gather)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._compute)

    def _start(self, engine: Engine) -> None:
        self.losses, self.probabilities, self.tags = [], [], []

    def _gather(self, engine: Engine) -> None:
        pred, tags = engine.state.output["pred"], engine.state.output["label"]
        self.losses.append(pred["denoising"])
        self.probabilities.append(pred["probability"])
        self.tags.append(tags)

    def _compute(self, engine: Engine) -> None:
        losses, probabilities, tags = (
            evenly_divisible_all_gather(torch.cat(values)).cpu()
            for values in (self.losses, self.probabilities, self.tags)
        )
        for tag in (0, 1):
            engine.state.metrics[f"val_denoising_y{tag}"] = float(losses[tags == tag].mean())
        engine.state.metrics["val_classifier_auc"] = float(compute_roc_auc(probabilities, tags))


class TrainingProgress(ProgressBar):
    """Ignite's progress bar with the loss beside it."""

    def __init__(self) -> None:
        super().__init__(desc="training")

    def attach(self, engine: Engine) -> None:
        super().attach(engine, output_transform=lambda output: {"loss": float(output["loss"].detach())})


def training_list(weights: str | Path) -> Path:
    """Where the names of the cases that `weights` were trained on stand: beside them, one a line."""
    return Path(weights).with_suffix(".training.txt")


def training_cases(weights: str | Path) -> list[str] | None:
    """The cases that `weights` were trained on, or None when that was not recorded."""
    path = training_list(weights)
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else None


def ema_handler(network: nn.Module, decay: float) -> EMAHandler:
    """Ignite's exponential moving average of `network`, warmed up so that early averages are not the random start."""
    return EMAHandler(network, momentum=1 - decay, momentum_warmup=0.2, warmup_iters=int(2 / (1 - decay)))


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Learning rates that rise linearly over `warmup_steps` and fall to 0 along a cosine until `total_steps`.

    MONAI's `WarmupCosineSchedule` stores its length in the checkpoint, so that a run resumed with more epochs would
    keep the old one; here the length is always the one asked for.
    """

    def factor(step: int) -> float:
        return min(1.0, step / max(warmup_steps, 1)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))

    return LambdaLR(optimizer, factor)


class ResumableRun:
    """Writes all that a run needs to continue after every epoch, and continues from the newest file it finds.

    MONAI's `CheckpointSaver` and `CheckpointLoader` over `save_dict` and the trainer itself (epoch, iteration), in
    files `checkpoint_epoch=N.pt` of `save_dir`, which the first process writes and of which it keeps the newest two.

    Raises:
        ValueError: on attaching, if the processes of a run see different checkpoints.
    """

    def __init__(self, save_dir: str, save_dict: Mapping, map_location: torch.device | str = "cpu") -> None:
        self.save_dir, self.save_dict, self.map_location = save_dir, dict(save_dict), map_location

    def attach(self, engine: Engine) -> None:
        everything = {**self.save_dict, "trainer": engine}
        found = sorted(Path(self.save_dir).glob("checkpoint_epoch=*.pt"), key=lambda p: int(p.stem.rpartition("=")[2]))
        if len(seen := set(idist.all_gather(found[-1].name if found else "none"))) > 1:
            raise ValueError(
                f"the processes see different newest checkpoints in {self.save_dir}: {sorted(seen)}. ckpt_dir must be "
                "one folder that all machines share."
            )
        if found:
            CheckpointLoader(str(found[-1]), everything, map_location=self.map_location).attach(engine)
        if engine.state.rank == 0:
            for superseded in found[:-2]:  # the saver below does not know those of an earlier process
                superseded.unlink()
        CheckpointSaver(self.save_dir, everything, file_prefix="", save_interval=1, n_saved=2).attach(engine)
