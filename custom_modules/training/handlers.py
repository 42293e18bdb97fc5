"""Handlers around the iterations: gradient clipping, seeds, loss and metrics over several processes, progress."""

from __future__ import annotations

import logging
import sys

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines.utils import IterationEvents
from monai.metrics import Cumulative, compute_roc_auc
from torch import nn

from custom_modules.training.sampling import epoch_seed

logger = logging.getLogger(__name__)


class ClipGradients:
    """Clips the gradient norm of each optimizer group on its own, after every backward pass."""

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.max_norm)


class EpochSeed:
    """Makes the noise and t of an epoch a function of (seed, epoch), the same in every process.

    `BalancedSampler` does the same for slices and augmentations. So a killed run that resumes at the start of an epoch
    draws as if it had never stopped, and no state of a generator has to be stored. Validation (`every_epoch=False`)
    draws the same noise each time.
    """

    def __init__(self, seed: int, every_epoch: bool = True) -> None:
        self.seed, self.every_epoch = seed, every_epoch

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        torch.manual_seed(epoch_seed(self.seed, self.every_epoch * engine.state.epoch))


class MeanLoss:
    """Replaces the loss that is logged by its mean over all processes, which is that of the whole batch."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"].detach() / idist.get_world_size()
        engine.state.output["loss"] = idist.all_reduce(loss)


class TagMetrics:
    """Validates a `TrainingStep` over the slices of all processes: denoising loss by tag, and AUC of the classifier
    over the drawn t."""

    def attach(self, engine: Engine) -> None:
        self.slices = Cumulative()
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.slices.reset())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._compute)

    def _collect(self, engine: Engine) -> None:
        pred = engine.state.output["pred"]
        self.slices.extend(pred["denoising"], pred["probability"], engine.state.output["label"])

    def _compute(self, engine: Engine) -> None:
        losses, probabilities, tags = (values.cpu() for values in self.slices.get_buffer())
        for tag in (0, 1):
            engine.state.metrics[f"val_denoising_y{tag}"] = float(losses[tags == tag].mean())
        engine.state.metrics["val_classifier_auc"] = float(compute_roc_auc(probabilities, tags))


class TrainingProgress(ProgressBar):
    """Shows the loss on Ignite's progress bar, now and then: to read it, a GPU has to finish all that is queued.

    Where the output is no terminal, it is one line an epoch.
    """

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()
        super().__init__(desc="training", disable=not self.shown)

    def attach(self, engine: Engine) -> None:
        super().attach(
            engine,
            output_transform=lambda output: {"loss": float(output["loss"].detach())},
            event_name=Events.ITERATION_COMPLETED(every=10),
        )
        if not self.shown:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)

    def _log(self, engine: Engine) -> None:
        state = engine.state
        logger.info("epoch %d of %d: loss %.4f", state.epoch, state.max_epochs, float(state.output["loss"].detach()))
