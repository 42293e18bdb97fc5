"""How a result was made, written beside it; from this record a later run knows what is already done."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import ignite.distributed as idist
import monai
import torch
from ignite.engine import Engine, Events
from monai.bundle.utils import ID_SEP_KEY
from monai.engines.utils import IterationEvents

from custom_modules import __version__
from custom_modules.files import (
    lock_folder,
    read_json_or_empty,
    remove_partial,
    result_file,
    sha256,
    stamp,
    unlock_folder,
    write_json,
)
from custom_modules.inference.appearance import CHECKS, unlike_training
from custom_modules.inference.cases import STAMP
from custom_modules.inference.evaluator import one_case
from custom_modules.networks.weights import training_cases

VOLUMES, UNCERTAINTY, SEGMENTATION = ["mask.nii.gz", "saliency.nii.gz"], "uncertainty.nii.gz", "seg.dcm"
logger = logging.getLogger(__name__)
VERSIONS = {
    "custom_modules": __version__,
    "monai": monai.__version__,
    "torch": torch.__version__,
    "python": platform.python_version(),
}


def hardware(device: torch.device) -> str:
    """Return the processor that does the work, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


class Provenance:
    """Writes `<output_dir>/<stem>/<stem>_provenance.json` beside each result, last: how it was made.

    One line about the result goes to the log: `case | slices | ml | seconds | file`.

    A later run reads it to know what is already done (`is_done`). So it is removed before a result is replaced: a
    process that is killed in between leaves no record of other files. Of two runs at once, the second is refused.
    What a reader should know of a result is under `warnings`, a list of texts; at the end of a run the cases that have
    some are named, also those that were done before.

    Args:
        output_dir: folder of the results.
        ckpt_path: the weights, whose SHA-256 is recorded; None where there are none.
        settings: knobs to record.
        gate_ckpt_path: the weights of the classifier where that is the gate, else None.
        output_format: with `dicom_seg` a result has a DICOM Segmentation, too.
        command: what `custom_modules.knobs.command_line` returns, {id: value} and the config files. The nested ids
            (`a#b`) and the SHA-256 of the first config file are recorded, {} and None by default.
    """

    def __init__(
        self,
        output_dir: str,
        ckpt_path: str | None,
        settings: Mapping,
        gate_ckpt_path: str | None = None,
        output_format: str = "nifti",
        command: tuple[Mapping[str, str], Sequence[str]] = ({}, ()),
    ) -> None:
        self.output_dir, self.ckpt_path, self.gate_ckpt_path = Path(output_dir), ckpt_path, gate_ckpt_path
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        given, files = command
        nested = {name.replace(ID_SEP_KEY, "#"): value for name, value in given.items()}
        self.overrides = {name: value for name, value in nested.items() if "#" in name}
        self.config_sha256 = sha256(files[0]) if files else None
        self.written: list[str] = []  # stems, in this run
        self.volumes = [*VOLUMES, *([SEGMENTATION] if output_format == "dicom_seg" else [])]
        self.volumes += [UNCERTAINTY] if self.settings.get("uncertainty") else []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._lock)
        engine.add_event_handler(Events.COMPLETED, lambda: unlock_folder(self.output_dir))
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._start_clock)
        engine.add_event_handler(Events.STARTED, lambda: self._weights)  # once, before the loader's workers are forked
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._remove_outdated)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._warn)

    def _lock(self, engine: Engine) -> None:
        """Locks the folder of the results; the first process does, and all end where it cannot."""
        refused, self.written = "", []
        if idist.get_rank() == 0:
            try:
                lock_folder(self.output_dir)
            except (RuntimeError, OSError) as error:
                refused = str(error)
        if told := "".join(idist.all_gather(refused)):
            raise RuntimeError(told)

    def _warn(self, engine: Engine) -> None:
        """Names the cases with warnings, in one line; the first process does, once all have written theirs."""
        finished = set().union(*idist.all_gather([*self.written, *engine.done]))
        if idist.get_rank() > 0:
            return
        records = [read_json_or_empty(self._file(stem)) for stem in engine.cases if stem in finished]
        warned = [record["case"] for record in records if record.get("warnings")]
        if warned:
            logger.warning(
                "%d of %d cases have warnings, look at their masks: %s (the report and `warnings` in "
                "<case>_provenance.json say why)",
                len(warned), len(records), ", ".join(warned[:10]) + (", ..." if len(warned) > 10 else ""),
            )  # fmt: skip

    def is_done(self, case: Mapping) -> bool:
        """Says whether the result of `case` is as written, and was made by this version from the same `_origin`."""
        facts = read_json_or_empty(self._file(case["stem"]))
        outputs = self._outputs(case["stem"])
        whole = None not in outputs.values() and facts.get("outputs_sha256", {}).items() >= outputs.items()
        version = facts.get("versions", {}).get("custom_modules")
        return whole and version == __version__ and facts.items() >= self._origin(case).items()

    def _file(self, stem: str, ending: str = "provenance.json") -> Path:
        return result_file(self.output_dir, stem, ending)

    def _outputs(self, stem: str) -> dict[str, str | None]:
        files = {volume: self._file(stem, volume) for volume in self.volumes}
        return {volume: sha256(file) if file.is_file() else None for volume, file in files.items()}

    @cached_property
    def _weights(self) -> dict[str, str | None]:
        paths = {"weights_sha256": self.ckpt_path, "gate_weights_sha256": self.gate_ckpt_path}
        return {name: sha256(path) if path else None for name, path in paths.items()}

    def _origin(self, case: Mapping) -> dict:
        """Collects all that a result depends on. Overlay configs are not recorded: they show in `settings` only."""
        return {
            "settings": self.settings,
            "overrides": self.overrides,
            "config_sha256": self.config_sha256,
            **self._weights,
            "image_sha256": sha256(case["image"]),
            **{key: case.get(key) for key in ("channel", "slice_labels")},
        }

    def _remove_outdated(self, engine: Engine) -> None:
        """Removes the record of an earlier result, what killed processes left, and files that may not be replaced."""
        for stem in engine.state.batch["stem"]:
            for ending in ("provenance.json", SEGMENTATION, UNCERTAINTY):  # other settings may write no new one
                self._file(stem, ending).unlink(missing_ok=True)
            remove_partial(self._file(stem).parent)

    def __call__(self, engine: Engine) -> None:
        for item in engine.state.output:
            with one_case(engine, item["case"]):
                write_json(self._file(item["stem"]), self._facts(item, engine.cases[item["stem"]]))
                self.written.append(item["stem"])
                self._report(item)

    def _start_clock(self) -> None:
        self._started = time.perf_counter()

    def _report(self, item: Mapping) -> None:
        mask, seconds = item["pred"], time.perf_counter() - self._started
        millilitres = float(mask.sum()) * float(torch.linalg.det(mask.affine[:3, :3]).abs()) / 1000  # mm3 -> ml
        words = (item["case"], item["n_slices"], millilitres, seconds, self._file(item["stem"], VOLUMES[0]))
        logger.info("%s | %d slices | %.1f ml | %.1f s | %s", *words)

    def _facts(self, item: Mapping, case: Mapping) -> dict:
        origin = self._origin(case)
        if stamp(case["image"]) != item[STAMP]:  # the hash would be that of another image
            raise ValueError("its image was replaced while it was worked on; run the same command again.")
        facts = {
            "case": item["case"],
            "image": case["image"],
            "label": item.get("label_file"),
            "warnings": self._warnings(item),
            "slices_processed": item["n_slices"],
            "seconds_per_slice": item["seconds_per_slice"],
            "versions": VERSIONS,
            **origin,
            "outputs_sha256": self._outputs(item["stem"]),
        }
        facts |= {name: round(float(item[name]), 3) for name in CHECKS if name in item}
        if "expected_dice" in item:
            facts["expected_dice"] = item["expected_dice"]
        if "gate_probability" in item:
            facts["gate_probability"] = [round(p, 4) for p in item["gate_probability"].tolist()]
        return facts

    def _warnings(self, item: Mapping) -> list[str]:
        """Lists what a reader of the result should know."""
        warnings = [why] if (why := unlike_training(item)) else []
        if not item["pred"].any():
            warnings.append("nothing was found: the mask is empty.")
        if self.ckpt_path and item["case"] in (training_cases(self.ckpt_path) or ()):
            warnings.append("a case of this name was in the training of the weights: its mask does not say how good "
                            "they are on others.")  # fmt: skip
        return warnings
