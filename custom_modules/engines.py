"""The evaluator over volumes: one bad case is reported by name, the others are finished, and nothing is done twice.

MONAI's evaluator ends at the first exception; in an archive of a thousand volumes that is the wrong one to lose.
Several processes (torchrun) divide the cases by the data loader's sampler, and all of them end with the same report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import ignite.distributed as idist
import monai
import torch
from ignite.engine import Engine, Events
from monai.bundle.utils import ID_SEP_KEY
from monai.data import Dataset, DistributedSampler
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents, PrepareBatch

from custom_modules import __version__
from custom_modules.dicom import OUTPUT_FORMATS, check_source
from custom_modules.knobs import command_line
from custom_modules.writers import read_record, remove_partial, result_file, write_json

logger = logging.getLogger(__name__)
DONE, ERROR = "done", "error"
VOLUMES, UNCERTAINTY, SEGMENTATION = ["mask.nii.gz", "saliency.nii.gz"], "uncertainty.nii.gz", "seg.dcm"
VERSIONS = {
    "custom_modules": __version__,
    "monai": monai.__version__,
    "torch": torch.__version__,
    "python": platform.python_version(),
}


def reason(error: BaseException) -> str:
    """The innermost cause of an error, in one line: MONAI wraps each transform's in one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, or of the files of a folder (a DICOM series) one after the other by name, in hexadecimal."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class CaseDataset(Dataset):
    """MONAI's `Dataset`, for which a case that cannot be read is an item {"case", "error"} instead of an exception.

    Args:
        data: cases {"case", "image", ...}. Each gets "stem", the name of its results: the image's file name without its
            ending, or the case's name for a DICOM series and wherever two stems would collide.
        transform: MONAI transforms of one case.
        records: handlers that write results; a case for which all of them say `is_done(case)` is an item {"case",
            "stem", "done"} and not prepared.
        overwrite: no case counts as done.
        output_format: `nifti`, or `dicom_seg`: for that, an image has to be a DICOM series.

    Raises:
        ValueError: if `output_format` is something else.
    """

    def __init__(
        self,
        data: Sequence[Mapping],
        transform,
        records: Sequence = (),
        overwrite: bool = False,
        output_format: str = "nifti",
    ) -> None:
        if output_format not in OUTPUT_FORMATS:
            raise ValueError(f"output_format must be one of {list(OUTPUT_FORMATS)}; got {output_format!r}.")
        self.output_format = output_format
        self.records = [] if overwrite else list(records)
        stems = [_stem(case) for case in data]
        counts, names = Counter(stems), {case["case"] for case in data}
        named = []
        for case, stem in zip(data, stems, strict=True):
            unique = counts[stem] == 1 and (stem == case["case"] or stem not in names)  # another may fall back on it
            named.append({**case, "stem": stem if stem and unique else case["case"]})
        super().__init__(named, transform)

    def _transform(self, index: int) -> dict:
        case = self.data[index]
        try:
            if self.records and all(record.is_done(case) for record in self.records):
                return {"case": case["case"], "stem": case["stem"], DONE: True}
            check_source(case, self.output_format)
            return super()._transform(index)
        except Exception as error:  # whatever a file may hold
            return {"case": case["case"], ERROR: reason(error)}


def _stem(case: Mapping) -> str:
    name = Path(case["image"]).name
    return next((name[: -len(ending)] for ending in (".nii.gz", ".nii") if name.endswith(ending)), "")


class CaseSampler(DistributedSampler):
    """Divides the cases among the processes (torchrun), none of them twice to fill up.

    Args:
        dataset: the cases.

    Raises:
        ValueError: if there are fewer cases than processes.
    """

    def __init__(self, dataset: CaseDataset) -> None:
        n_cases, n_processes = len(dataset), idist.get_world_size()
        if n_cases < n_processes:
            raise ValueError(
                f"{n_cases} cases for {n_processes} processes: start at most as many processes as cases, "
                f"--nproc_per_node {n_cases}."
            )
        super().__init__(dataset, even_divisible=False, shuffle=False)


class VolumeBatch(PrepareBatch):
    """Batch of `CaseDataset` -> image (B, 1, H, W, D) on the engine's device, and the tags where the case has them."""

    def __call__(self, batchdata: Mapping, device=None, non_blocking: bool = False, **kwargs):
        image = batchdata["image"].to(device=device, non_blocking=non_blocking)
        return image, None, (), {"slice_labels": batchdata["slice_labels"]} if "slice_labels" in batchdata else {}


class VolumeEvaluator(SupervisedEvaluator):
    """MONAI's evaluator that goes on after a failed case and raises at the end, naming all of them.

    `failures` maps case to reason, after a run those of all processes; `seen` holds the cases of this process and
    `done` the stems of those that were there already. After each iteration `state.output` is a list of one dict a
    volume, which holds the case's own entries too, or is empty when the case failed or was there.
    """

    def __init__(self, *args, **kwargs) -> None:
        self.failures: dict[str, str] = {}
        self.seen: list[str] = []
        self.done: list[str] = []
        super().__init__(*args, **kwargs)

    @cached_property
    def cases(self) -> dict[str, dict]:
        """The cases of the data set by their stems, in order: all of them, whichever the data loader gives."""
        return {case["stem"]: case for case in self.data_loader.dataset.data}

    def _iteration(self, engine: Engine, batchdata: Mapping) -> list[dict]:
        cases = list(batchdata["case"])
        rank = f" on rank {idist.get_rank()}" if idist.get_world_size() > 1 else ""
        there = ": there already" if DONE in batchdata else ""
        number = f"({engine.state.iteration} of {engine.state.epoch_length}{rank})"
        logger.info("case %s %s%s", ", ".join(cases), number, there)
        self.seen += cases
        if there:
            self.done += batchdata["stem"]
            return []
        try:
            if ERROR in batchdata:
                raise RuntimeError(batchdata[ERROR][0])
            super()._iteration(engine, batchdata)
        except Exception as error:
            why = batchdata[ERROR][0] if ERROR in batchdata else reason(error)
            self.failures.update(dict.fromkeys(cases, why))
            logger.error("case %s failed: %s", ", ".join(cases), why)
            return []
        items = zip(engine.state.batch, engine.state.output, self.inferer.facts, strict=True)
        return [{**item, **output, **facts} for item, output, facts in items]

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
                "%d of %d cases were there already, made with the same settings, overrides, first config file, "
                "weights and image (--overwrite True does them anew)", len(set().union(*done)), n_cases
            )  # fmt: skip
        if self.failures:
            listed = "\n".join(f"  {case}: {why}" for case, why in self.failures.items())
            raise RuntimeError(f"{len(self.failures)} of {n_cases} cases failed:\n{listed}")


@contextlib.contextmanager
def one_case(engine: VolumeEvaluator, case: str) -> Iterator[None]:
    """For handlers: an error ends the case, which then is no output any more but one of `failures`, and not the run."""
    try:
        yield
    except Exception as error:
        engine.failures[case] = reason(error)
        engine.state.output = [item for item in engine.state.output if item["case"] != case]
        logger.error("case %s failed: %s", case, engine.failures[case])


class Provenance:
    """Writes `<output_dir>/<stem>/<stem>_provenance.json` beside each result, last: how it came to be.

    By it, a later run knows what is done (`is_done`). So it is taken away before a result is replaced: a process that
    is killed in between leaves none that speaks of other files. Of the command line of `monai.bundle`, it records the
    nested ids (`a#b`) and the SHA-256 of the first config file; {} and None in a process that was started otherwise.

    Args:
        output_dir: of the results.
        ckpt_path: the weights, whose SHA-256 is recorded; None where there are none.
        settings: knobs to record.
        gate_ckpt_path: the weights of the classifier where that is the gate, else None.
        output_format: `dicom_seg`: a result has a DICOM Segmentation too.
    """

    def __init__(
        self,
        output_dir: str,
        ckpt_path: str | None,
        settings: Mapping,
        gate_ckpt_path: str | None = None,
        output_format: str = "nifti",
    ) -> None:
        self.output_dir, self.ckpt_path, self.gate_ckpt_path = Path(output_dir), ckpt_path, gate_ckpt_path
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        given, files = command_line()
        nested = {name.replace(ID_SEP_KEY, "#"): value for name, value in given.items()}
        self.overrides = {name: value for name, value in nested.items() if "#" in name}
        self.config_sha256 = sha256(files[0]) if files else None
        self.volumes = [*VOLUMES, *([SEGMENTATION] if output_format == "dicom_seg" else [])]
        self.volumes += [UNCERTAINTY] if self.settings.get("uncertainty") else []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda: self._weights)  # once, before the loader's workers are forked
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._withdraw)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def is_done(self, case: Mapping) -> bool:
        """Whether the result of `case` stands there whole, made by this version from the same (`_origin`)."""
        facts = read_record(self._file(case["stem"]))
        there = all(self._file(case["stem"], volume).is_file() for volume in self.volumes)
        version = facts.get("versions", {}).get("custom_modules")
        return there and version == __version__ and facts.items() >= self._origin(case).items()

    def _file(self, stem: str, ending: str = "provenance.json") -> Path:
        return result_file(self.output_dir, stem, ending)

    @cached_property
    def _weights(self) -> dict[str, str | None]:
        paths = {"weights_sha256": self.ckpt_path, "gate_weights_sha256": self.gate_ckpt_path}
        return {name: sha256(path) if path else None for name, path in paths.items()}

    def _origin(self, case: Mapping) -> dict:
        """What is recorded of all that a result depends on. Overlays are not: they show in `settings` alone."""
        return {
            "settings": self.settings,
            "overrides": self.overrides,
            "config_sha256": self.config_sha256,
            **self._weights,
            "image_sha256": sha256(case["image"]),
            **{key: case.get(key) for key in ("channel", "slice_labels")},
        }

    def _withdraw(self, engine: Engine) -> None:
        for path in map(self._file, engine.state.batch["stem"]):
            path.unlink(missing_ok=True)
            remove_partial(path.parent)
        for stem in engine.state.batch["stem"]:  # with other settings, none takes its place
            for optional in (SEGMENTATION, UNCERTAINTY):
                self._file(stem, optional).unlink(missing_ok=True)

    def __call__(self, engine: Engine) -> None:
        for item in engine.state.output:
            with one_case(engine, item["case"]):
                write_json(self._file(item["stem"]), self._facts(item, engine.cases[item["stem"]]))

    def _facts(self, item: Mapping, case: Mapping) -> dict:
        facts = {
            "case": item["case"],
            "image": case["image"],
            "label": item.get("label_file"),
            "slices_processed": item["n_slices"],
            "seconds_per_slice": item["seconds_per_slice"],
            "versions": VERSIONS,
            **self._origin(case),
        }
        if "expected_dice" in item:
            facts["expected_dice"] = item["expected_dice"]
        if "gate_probability" in item:
            facts["gate_probability"] = [round(p, 4) for p in item["gate_probability"]]
        return facts
