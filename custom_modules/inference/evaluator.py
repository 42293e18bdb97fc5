"""The evaluator over volumes: it reports a failed case by name, finishes the others, and does nothing twice.

MONAI's evaluator ends at the first exception; one broken file must not end the run over an archive of a thousand
volumes. Several processes (torchrun) share the cases by the data loader's sampler, and all of them end with the same
report.
"""

from __future__ import annotations

import contextlib
import logging
from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import cached_property

import ignite.distributed as idist
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents, PrepareBatch

from custom_modules.files import printable
from custom_modules.inference.cases import DONE, ERROR, reason
from custom_modules.inference.inferer import FACTS

logger = logging.getLogger(__name__)


class VolumeBatch(PrepareBatch):
    """Gives the engine the image (B, 1, H, W, D) of a batch on its device, and the tags where the case has them."""

    def __call__(self, batchdata: Mapping, device=None, non_blocking: bool = False, **kwargs):
        image = batchdata["image"].to(device=device, non_blocking=non_blocking)
        return image, None, (), {"slice_labels": batchdata["slice_labels"]} if "slice_labels" in batchdata else {}


class VolumeEvaluator(SupervisedEvaluator):
    """Runs inference on every case, goes on after a failed one, and raises at the end, naming all that failed.

    `failures` maps case to reason, after a run those of all processes; `seen` holds the cases of this process and
    `done` the stems of those whose results already exist. After each iteration `state.output` is a list of one dict per
    volume: the case's own entries, the output of the postprocessing, and the inferer's facts. It is empty when the case
    failed or is already done.
    """

    def __init__(self, *args, **kwargs) -> None:
        self.failures: dict[str, str] = {}
        self.seen: list[str] = []
        self.done: list[str] = []
        super().__init__(*args, **kwargs)
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, _unpack_facts)  # before decollation and `Invertd`

    @cached_property
    def cases(self) -> dict[str, dict]:
        """All cases of the data set by their stems, in order, not only those that the data loader gives."""
        return {case["stem"]: case for case in self.data_loader.dataset.data}

    def _iteration(self, engine: Engine, batchdata: Mapping) -> list[dict]:
        cases = list(batchdata["case"])
        rank = f" on rank {idist.get_rank()}" if idist.get_world_size() > 1 else ""
        number = f"({engine.state.iteration} of {engine.state.epoch_length}{rank})"
        logger.info("case %s %s%s", printable(", ".join(cases)), number, ": already done" if DONE in batchdata else "")
        self.seen += cases
        if DONE in batchdata:
            self.done += batchdata["stem"]
            return []
        try:
            if ERROR in batchdata:
                raise RuntimeError(batchdata[ERROR][0])
            super()._iteration(engine, batchdata)
        except Exception as error:
            why = batchdata[ERROR][0] if ERROR in batchdata else reason(error)
            self.failures.update(dict.fromkeys(cases, why))
            logger.error("case %s failed: %s", printable(", ".join(cases)), why)
            return []
        return [{**item, **output} for item, output in zip(engine.state.batch, engine.state.output, strict=True)]

    def run(self, global_epoch: int = 1) -> None:
        """Evaluates every case; of several processes, each those that its data loader gives it.

        Raises:
            RuntimeError: after the last case, in every process, if any failed in any of them.
        """
        self.failures, self.seen, self.done = {}, [], []
        super().run(global_epoch)
        failures, seen, done = zip(*idist.all_gather((self.failures, self.seen, self.done)))
        self.failures, n_cases = dict(sorted(ChainMap(*failures).items())), len(set().union(*seen))
        if idist.get_rank() == 0 and any(done):
            logger.info(
                "%d of %d cases were already done with the same settings, overrides, first config file, weights and "
                "image (--overwrite True does them again)", len(set().union(*done)), n_cases
            )  # fmt: skip
        if self.failures:
            listed = "\n".join(f"  {printable(case)}: {why}" for case, why in self.failures.items())
            raise RuntimeError(f"{len(self.failures)} of {n_cases} cases failed:\n{listed}")


def _unpack_facts(engine: Engine) -> None:
    """Moves the inferer's facts from the meta data of `pred` to entries beside it."""
    output = engine.state.output
    output.update(output["pred"].meta.pop(FACTS, {}))


@contextlib.contextmanager
def one_case(engine: VolumeEvaluator, case: str) -> Iterator[None]:
    """Makes an error in a handler end its case instead of the run: out of `state.output`, into `failures`."""
    try:
        yield
    except Exception as error:
        engine.failures[case] = reason(error)
        engine.state.output = [item for item in engine.state.output if item["case"] != case]
        logger.error("case %s failed: %s", case, engine.failures[case])
