"""Seconds of a whole volume on one core: reading, preparing, the method, the way back, writing."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate
from scipy import ndimage

from custom_modules.inference.inferer import FACTS
from examples.phantom import head_phantom

SHAPE, MARGIN = (240, 240, 155), 8  # of a BraTS volume, 1 mm; slices without brain at its ends
STAGES = ("reading", "preparing", "method", "back", "writing")


class VolumeClock:
    """Runs the default method of `inference.yaml` on one volume, on one thread, and clocks its stages.

    Args:
        config: `inference.yaml` with its `bundle_root` and a device.
        folder: where results, and a volume if none is given, are written.
        image: a NIfTI file; None for a synthetic head of the size of a BraTS volume.
    """

    def __init__(self, config: ConfigParser, folder: Path, image: Path | None) -> None:
        config["output_dir"] = str(folder)
        parts = ("preprocessing", "inferer", "network", "postprocessing")
        self.prepare, self.inferer, self.network, self.finish = map(config.get_parsed_content, parts)
        self.network.eval()
        self.method, self.inferer.method = self.inferer.method, lambda *x: self._clock("method", self.method, *x)
        self.case = {"case": "volume", "stem": "volume", "image": str(image or _head(folder / "head.nii.gz"))}
        self.seconds: dict[str, list[float]] = {}

    def _clock(self, stage: str, function, *arguments):
        start = time.perf_counter(), time.process_time()
        result = function(*arguments)
        self.seconds[stage] += np.subtract((time.perf_counter(), time.process_time()), start)
        return result

    def run(self) -> dict[str, np.ndarray]:
        """Returns seconds on the wall and of the processor by stage; what the inferer does beside its method counts as
        preparing."""
        self.seconds = defaultdict(lambda: np.zeros(2))
        item = self.case
        for step in self.prepare.transforms:
            item = self._clock("preparing" if self.seconds else "reading", step, item)
        batch = self._clock("preparing", list_data_collate, [item])
        with torch.no_grad():
            batch["pred"] = self._clock("inferer", lambda x: self.inferer(x, self.network), batch["image"])
        batch["pred"].meta.pop(FACTS)
        (item,) = decollate_batch(batch)
        for step in self.finish.transforms:
            item = self._clock("writing" if type(step).__name__.startswith("Save") else "back", step, item)
        self.seconds["preparing"] += self.seconds.pop("inferer") - self.seconds["method"]
        return {stage: self.seconds[stage] for stage in STAGES}


def volume_seconds(config: ConfigParser, image: Path | None, rounds: int) -> dict:
    """Returns the medians over `rounds` of a warm volume, and how many times its method's seconds the whole takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            clock = VolumeClock(config, Path(folder), image)
            runs = [clock.run() for _ in range(rounds + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    wall, cpu = ({stage: statistics.median(float(run[stage][i]) for run in runs) for stage in STAGES} for i in (0, 1))
    return {
        "seconds_per_volume": {**wall, "total": sum(wall.values())},
        "cpu_seconds_per_volume": {**cpu, "total": sum(cpu.values())},
        "pipeline_over_method": sum(wall.values()) / wall["method"],
    }


def volume_line(report: dict) -> str:
    """Puts what `volume_seconds` returns in words."""
    parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in report["seconds_per_volume"].items())
    cpu = report["cpu_seconds_per_volume"]["total"]
    return f"A volume by the default method on one thread, s: {parts} (CPU {cpu:.2f})."


def _head(path: Path) -> Path:
    """Writes the synthetic head, stretched to `SHAPE`: as many slices with brain as a BraTS volume."""
    image, _ = head_phantom()
    array = np.asarray(image.dataobj).astype(np.float32)
    wanted = (*SHAPE[:2], SHAPE[2] - 2 * MARGIN)
    array = ndimage.zoom(array, np.divide(wanted, array.shape), order=1)
    nib.save(nib.Nifti1Image(np.pad(array, [(0, 0), (0, 0), (MARGIN, MARGIN)]).astype(np.int16), np.eye(4)), path)
    return path
