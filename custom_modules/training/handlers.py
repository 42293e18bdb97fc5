"""Training: what one iteration computes, and the handlers that make a run reproducible and resumable.

The denoiser learns |eps - f(x_t, t, y)|^2 with the slice's tag as condition y, the classifier learns p(y | x_t). Their
losses touch disjoint parameters, so training both in one run equals training them apart: each has its own learning
rate and its own gradient clipping. Only images and slice tags are read here, never a mask.
"""

from __future__ import annotations

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines.utils import IterationEvents
from monai.metrics import compute_roc_auc
from monai.utils import evenly_divisible_all_gather
from torch import nn

from custom_modules.training.sampling import epoch_seed


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
