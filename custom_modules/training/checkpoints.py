"""Checkpoints of a run, and the averaged weights that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.handlers import CheckpointLoader, CheckpointSaver
from torch import nn

from custom_modules.files import atomic_path
from custom_modules.networks.weights import training_cases, training_list


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
        with atomic_path(self.path) as aside, open(aside, "wb") as file:  # a path's name would enter the file
            torch.save(state, file)
        with atomic_path(training_list(self.path)) as aside:
            aside.write_text("".join(f"{case}\n" for case in self.cases), encoding="utf-8")


def ema_handler(network: nn.Module, decay: float) -> EMAHandler:
    """Ignite's exponential moving average of `network`, warmed up so that early averages are not the random start."""
    return EMAHandler(network, momentum=1 - decay, momentum_warmup=0.2, warmup_iters=int(2 / (1 - decay)))


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
