"""What a run writes: the averaged weights, which are its result, and checkpoints from which a killed run continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, EMAHandler
from ignite.handlers.checkpoint import BaseSaveHandler
from monai.handlers import CheckpointLoader
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from custom_modules.files import atomic_path, is_whole, lock_folder, remove_partial, unlock_folder
from custom_modules.networks.weights import training_cases, training_list, write_mark

logger = logging.getLogger(__name__)


class AveragedWeights:
    """Keeps the exponential moving average of the weights (`ema_handler`) and writes it after every epoch.

    The file is one flat state dict of `network_def`, in half precision: that halves its size and changes nothing
    measurable at inference. It appears whole or not at all. The names of the training cases are written beside it
    (`training_list`), so that evaluation can tell when it is given one of them. A run that continues after its last
    epoch restores files that are gone.

    Args:
        ema: average of the network.
        path: file to write.
        cases: names of the training cases.
        bundle_root: of the bundle, whose name the file gets.
        start: weights that the run starts from, whose training cases are added; None: it starts from scratch.
    """

    WRITTEN = Events.EPOCH_COMPLETED

    def __init__(
        self, ema: EMAHandler, path: str, cases: Sequence[str], bundle_root: str, start: str | None = None
    ) -> None:
        earlier = (training_cases(start) if start else None) or []
        self.bundle_root = bundle_root
        self.ema, self.path, self.cases = ema, Path(path), list(dict.fromkeys([*earlier, *cases]))

    def attach(self, engine: Engine) -> None:
        self.ema.attach(engine)
        engine.add_event_handler(Events.STARTED, self._begin_at_the_network)
        engine.add_event_handler(Events.EPOCH_STARTED, self._continue_warmup)
        engine.add_event_handler(self.WRITTEN, self)
        engine.add_event_handler(Events.COMPLETED, self._restore)

    def _begin_at_the_network(self, engine: Engine) -> None:
        self.ema.ema_model.load_state_dict(self.ema.model.state_dict())  # a host may load weights by a handler

    def _continue_warmup(self, engine: Engine) -> None:
        self.ema.momentum_scheduler.event_index = engine.state.iteration  # a resumed run would start it again

    def _restore(self, engine: Engine) -> None:
        if not (self.path.is_file() and training_list(self.path).is_file()):
            self(engine)

    def __call__(self, engine: Engine) -> None:
        if engine.state.rank > 0:
            return
        state = self.ema.ema_model.state_dict()  # on the CPU: a machine without a GPU cannot load CUDA tensors
        state = {k: (v.half() if v.is_floating_point() else v).cpu() for k, v in state.items()}
        with atomic_path(self.path) as aside, open(aside, "w+b") as file:  # given a path, torch.save stores its name
            torch.save(state, file)
            write_mark(file, self.bundle_root)
        with atomic_path(training_list(self.path)) as aside:
            aside.write_text("".join(f"{case}\n" for case in self.cases), encoding="utf-8")


class FastEMAHandler(EMAHandler):
    """Ignite's `EMAHandler`, in one call for all parameters: on a GPU, one by one takes as long as a training step."""

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        average = get_ema_multi_avg_fn(1 - getattr(engine.state, name))
        average(list(self.ema_model.parameters()), list(self.model.parameters()), None)
        for averaged, buffer in zip(self.ema_model.buffers(), self.model.buffers()):
            averaged.data = buffer.data


def ema_handler(network: nn.Module, decay: float) -> EMAHandler:
    """Makes an exponential moving average of `network`, warmed up so that it soon forgets the random start."""
    return FastEMAHandler(network, momentum=1 - decay, momentum_warmup=0.2, warmup_iters=int(2 / (1 - decay)))


class ResumableRun:
    """Writes after every epoch all that a run needs to continue, and continues from the newest such file.

    Ignite's `Checkpoint` and MONAI's `CheckpointLoader` get `save_dict` and the trainer itself (epoch, iteration). The
    files are `checkpoint_epoch=N.pt` in `save_dir`; the first process writes them and keeps the newest two. A file that
    is cut short, as a full disk or a copy may leave it, is named in the log, and the one before is taken.

    Raises:
        RuntimeError: on attaching, another run is writing to `save_dir`.
        ValueError: on attaching, the processes of a run see different checkpoints.
    """

    def __init__(self, save_dir: str, save_dict: Mapping) -> None:
        self.save_dir, self.save_dict = save_dir, dict(save_dict)

    def attach(self, engine: Engine) -> None:
        everything = {**self.save_dict, "trainer": engine}
        found = sorted(Path(self.save_dir).glob("checkpoint_epoch=*.pt"), key=lambda p: int(p.stem.rpartition("=")[2]))
        while found and not is_whole(found[-1]):
            logger.warning("%s is broken (cut short?) and skipped; the run continues from the one before.", found.pop())
        if len(seen := set(idist.all_gather(found[-1].name if found else "none"))) > 1:
            raise ValueError(
                f"the processes see different newest checkpoints in {self.save_dir}: {sorted(seen)}. ckpt_dir must be "
                "one folder that all machines share."
            )
        if found:
            # each state dict copies onto its own device; AdamW's `step` stays here, where a GPU need not wait for it
            CheckpointLoader(str(found[-1]), everything, map_location="cpu").attach(engine)
        if engine.state.rank == 0:
            lock_folder(self.save_dir)
            remove_partial(self.save_dir)
            engine.add_event_handler(Events.COMPLETED, lambda: unlock_folder(self.save_dir))
            for superseded in found[:-2]:  # the saver below does not know the files of earlier processes
                superseded.unlink()
        saver = Checkpoint(
            everything,
            WholeFiles(self.save_dir),
            filename_prefix="",
            score_function=lambda engine: engine.state.epoch,
            score_name="epoch",
            n_saved=2,
        )
        engine.add_event_handler(Events.EPOCH_COMPLETED, saver)


class WholeFiles(BaseSaveHandler):
    """Writes checkpoints whole or not at all, by the first process; MONAI's `CheckpointSaver` writes in place."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        if idist.get_rank() == 0:
            with atomic_path(self.folder / filename) as aside, open(aside, "wb") as file:
                torch.save(checkpoint, file)

    def remove(self, filename: str) -> None:
        if idist.get_rank() == 0:
            (self.folder / filename).unlink(missing_ok=True)
