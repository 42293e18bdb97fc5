"""The evaluator over volumes: one bad case is reported by name and the others are finished.

MONAI's evaluator ends at the first exception; in an archive of a thousand volumes that is the wrong one to lose.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import monai
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.engines.utils import PrepareBatch

from custom_modules import __version__
from custom_modules.writers import write_json

logger = logging.getLogger(__name__)
ERROR = "error"
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
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CaseDataset(Dataset):
    """MONAI's `Dataset`, for which a case that cannot be read is an item {"case", "error"} instead of an exception.

    Args:
        data: cases {"case", "image", ...}. Each gets "stem", the name of its results: the image's file name without its
            ending, or the case's name for a DICOM series and wherever two stems would collide.
        transform: MONAI transforms of one case.
    """

    def __init__(self, data: Sequence[Mapping], transform) -> None:
        stems = [_stem(case) for case in data]
        counts, names = Counter(stems), {case["case"] for case in data}
        named = []
        for case, stem in zip(data, stems, strict=True):
            unique = counts[stem] == 1 and stem not in names - {case["case"]}  # another may fall back on its name
            named.append({**case, "stem": stem if stem and unique else case["case"]})
        super().__init__(named, transform)

    def _transform(self, index: int) -> dict:
        try:
            return super()._transform(index)
        except Exception as error:  # whatever a file may hold
            return {"case": self.data[index]["case"], ERROR: reason(error)}


def _stem(case: Mapping) -> str:
    name = Path(case["image"]).name
    return next((name[: -len(ending)] for ending in (".nii.gz", ".nii") if name.endswith(ending)), "")


class VolumeBatch(PrepareBatch):
    """Batch of `CaseDataset` -> image (B, 1, H, W, D) on the engine's device, and the tags where the case has them."""

    def __call__(self, batchdata: Mapping, device=None, non_blocking: bool = False, **kwargs):
        image = batchdata["image"].to(device=device, non_blocking=non_blocking)
        return image, None, (), {"slice_labels": batchdata["slice_labels"]} if "slice_labels" in batchdata else {}


class VolumeEvaluator(SupervisedEvaluator):
    """MONAI's evaluator that goes on after a failed case and raises at the end, naming all of them.

    `failures` maps case to reason. After each iteration `state.output` is a list of one dict a volume, which holds the
    case's own entries too, or is empty when the case failed.
    """

    def __init__(self, *args, **kwargs) -> None:
        self.failures: dict[str, str] = {}
        super().__init__(*args, **kwargs)

    def _iteration(self, engine: Engine, batchdata: Mapping) -> list[dict]:
        cases = list(batchdata["case"])
        logger.info("case %s (%d of %d)", ", ".join(cases), engine.state.iteration, engine.state.epoch_length)
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
        """Evaluates every case.

        Raises:
            RuntimeError: after the last case, if any failed.
        """
        self.failures = {}
        super().run(global_epoch)
        if self.failures:
            listed = "\n".join(f"  {case}: {why}" for case, why in self.failures.items())
            raise RuntimeError(f"{len(self.failures)} of {len(self.data_loader)} cases failed:\n{listed}")


class Provenance:
    """Writes `<output_dir>/<stem>/<stem>_provenance.json` beside each result: how it came to be.

    Args:
        output_dir: of the results.
        ckpt_path: the weights, whose SHA-256 is recorded; None where there are none.
        settings: knobs to record.
    """

    def __init__(self, output_dir: str, ckpt_path: str | None, settings: Mapping) -> None:
        self.output_dir, self.ckpt_path, self.settings = Path(output_dir), ckpt_path, dict(settings)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._hash)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _hash(self, engine: Engine) -> None:
        self.weights_sha256 = sha256(self.ckpt_path) if self.ckpt_path else None

    def __call__(self, engine: Engine) -> None:
        for item in engine.state.output:
            facts = {
                "case": item["case"],
                "image": str(item["image"].meta.get("filename_or_obj", "")),
                "label": item.get("label_file"),
                "slices_processed": item["n_slices"],
                "seconds_per_slice": item["seconds_per_slice"],
                "settings": self.settings,
                "weights_sha256": self.weights_sha256,
                "versions": VERSIONS,
            }
            write_json(self.output_dir / item["stem"] / f"{item['stem']}_provenance.json", facts)
