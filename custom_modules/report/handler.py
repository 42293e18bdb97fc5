"""The report inside MONAI's engine: written once at the end of a run."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterable, Sequence

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events

from custom_modules.inference.cases import reason
from custom_modules.report.cases import doubts
from custom_modules.report.page import Run, write_report

logger = logging.getLogger(__name__)


class CaseReport:
    """Ignite handler that writes `<output_dir>/report.html` at the end of the run of a `VolumeEvaluator`.

    The first of several processes writes it, of the cases of all. A report that cannot be written is an error in the
    log: the results are whole without it.

    Args:
        output_dir: folder of the results.
        name, target, probability_methods: as in `Run`.
        training_cases: names of the cases that the weights have learned from; None: unknown.
    """

    def __init__(
        self,
        output_dir: str,
        name: str,
        target: str,
        training_cases: Iterable[str] | None = None,
        probability_methods: Sequence[str] = (),
    ) -> None:
        self.output_dir = output_dir
        self.run = Run(name, target, {}, {}, frozenset(training_cases or ()), tuple(probability_methods))
        self.doubts: dict[str, list] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep_doubts)
        engine.add_event_handler(Events.COMPLETED, self)

    def _keep_doubts(self, engine: Engine) -> None:
        """Sums up how unsure each slice is while its map is at hand: to read that again would take the longest."""
        for item in engine.state.output:
            if map_ := next((name for name in ("uncertainty", "saliency") if name in item), None):
                sums = doubts(np.asarray(item[map_][0].cpu()), map_ == "uncertainty")
                self.doubts[item["stem"]] = [one.tolist() for one in sums]

    def __call__(self, engine: Engine) -> None:
        told = idist.all_gather((engine.failures, self.doubts))  # waits for all processes
        failures, known = (dict(ChainMap(*dicts)) for dicts in zip(*told))
        if idist.get_rank() != 0:
            return
        labels = {stem: case["label_file"] for stem, case in engine.cases.items() if "label_file" in case}
        run = self.run._replace(failures=dict(sorted(failures.items())), labels=labels, doubts=known)
        try:
            logger.info("report: %s", write_report(self.output_dir, run))
        except Exception as error:  # no space, a folder of that name, ...
            logger.error("no report was written: %s", reason(error))
