"""The measured parts of `benchmarks.gpu`: phantoms, speed of the methods, throughput of training, a whole volume."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from scipy import ndimage

from benchmarks import speed
from benchmarks.gpu.throughput import throughput
from benchmarks.slices import prepared_slices
from benchmarks.timing import Maps, Row, peak_memory, reset_peak_memory
from custom_modules.files import write_json
from custom_modules.inference.provenance import VERSIONS, hardware
from custom_modules.methods.segmenter import probability
from custom_modules.networks.precision import has_bf16
from examples.phantom import head_phantom

BRATS = (240, 240, 155)
NETWORKS = ("denoiser", "classifier")
SMALL = {f"network_def#{part}#channels": [32] * 6 for part in NETWORKS} | {"image_size": 64}
SMALL |= {f"network_def#{part}#num_head_channels": 32 for part in NETWORKS}


def phantoms(folder: Path, device: torch.device, quick: bool) -> dict:
    """Write two heads to train on, one as large as a BraTS volume to infer, their masks and a datalist."""
    heads = [[np.asarray(part.dataobj) for part in head_phantom(seed)] for seed in range(1 if quick else 2)]
    zoom = [new / old for new, old in zip(heads[0][0].shape if quick else BRATS, heads[0][0].shape)]
    volume = [ndimage.zoom(part, zoom, order=order) for part, order in zip(heads[0], (1, 0))]
    cases = [_save(folder / "data", f"head{seed}", *head) for seed, head in enumerate(heads)]
    datalist = {"training": cases, "validation": cases[:1], "test": [_save(folder / "data", "volume", *volume)]}
    write_json(folder / "data" / "datalist.json", datalist)
    return {"volume": list(volume[0].shape), "training_slices": sum(head[0].shape[2] for head in heads)}


def _save(folder: Path, case: str, image: np.ndarray, lesion: np.ndarray) -> dict:
    folder.mkdir(exist_ok=True)
    for name, array in (("image", image), ("mask", lesion)):
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), folder / f"{case}_{name}.nii.gz")
    tags = lesion.any(axis=(0, 1)).astype(int).tolist()
    return {"case": case, "image": f"{case}_image.nii.gz", "label": f"{case}_mask.nii.gz", "slice_labels": tags}


class GpuBench(speed.Bench):
    """The main rows, the released procedure in bf16 and without TF32, and the student."""

    student_x: torch.Tensor  # slices (n, 1, H, W) at segmenter_size, on the device

    def _main_rows(self) -> list[Row]:
        released = self._released(speed.RELEASED, self.plain)
        plain = Row(f"{speed.RELEASED}, no TF32", without_tf32(released.maps), released.calls, self.n_few)
        released.reference = plain.name
        rows = [released, plain, self._released("bf16 alone", self.plain, amp=True), *super()._main_rows()[1:]]
        rows += [Row("student", self._student(True), 2, self.batch_size)]
        return [*rows, Row("student, float32", self._student(False), 2, self.batch_size)]

    def _student(self, amp: bool) -> Maps:
        x = self.student_x[: self.batch_size]
        return lambda _: probability(self.network.segmenter, x, amp)


def without_tf32(maps: Maps) -> Maps:
    """Return `maps` computed in full float32: by default, convolutions on a GPU round their inputs to 10 bits."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return maps(x)

    return plain


def speed_table(folder: Path, device: torch.device, quick: bool) -> dict:
    """Measure the compact network with its weights and the paper's with random ones."""
    options = argparse.Namespace(datalist=None, dataset_dir=None, quick=True, rounds=1 if quick else 3)
    config = ConfigParser(ConfigParser.load_config_file(speed.CONFIGS / "inference.yaml"))
    config.update({"bundle_root": str(speed.CONFIGS.parent), "device": device, "method": "segmenter"})
    GpuBench.student_x = prepared_slices(config, None, None, 128).to(device)
    report = {}
    for size, changes in (("compact", {}), ("paper", SMALL if quick else {})):
        report[size] = speed.measure(size, device, options, GpuBench, changes)
        print(f"\n{size} network, {hardware(device)}\n\n{speed.markdown(report[size])}\n", flush=True)
    return report


def training(folder: Path, device: torch.device, quick: bool) -> dict:
    """Measure iterations a second of denoiser and classifier and of the student, beside forward and backward alone."""
    rows = []
    for batch_size in (2,) if quick else (16, 64, 256):
        for name in ("train", "train+train_supervised"):  # the student's network, loss and augmentation, on masks
            rows.append(throughput(name, folder, device, batch_size, iterations=4 if quick else 30))
            print(rows[-1], flush=True)
    return {"rows": rows}


def volume(folder: Path, device: torch.device, quick: bool) -> dict:
    """Infer a whole volume twice by student and default of `cdm`, from file to files; the first time warms up."""
    report = {}
    for method in ("segmenter", "cdm"):
        config = ConfigParser(ConfigParser.load_config_file(speed.CONFIGS / "inference.yaml"))
        where = {"dataset_dir": str(folder / "data"), "output_dir": str(folder / method), "section": "test"}
        config.update({"bundle_root": str(speed.CONFIGS.parent), "device": device, "method": method, **where})
        config.update({"overwrite": True})
        evaluator, seconds = config.get_parsed_content("evaluator"), []
        reset_peak_memory(device)
        for _ in range(2):
            start = time.perf_counter()
            evaluator.run()  # ends with files on the disk
            seconds.append(time.perf_counter() - start)
        mask, truth = (np.asarray(nib.load(next(f.rglob("volume*_mask.nii.gz"))).dataobj) > 0
                       for f in (folder / method, folder / "data"))  # fmt: skip
        (output,) = evaluator.state.output
        report[method] = {
            "seconds": seconds[1],
            "seconds_of_first_run": seconds[0],
            "slices": int(output["n_slices"]),
            "method_seconds": float(output["seconds_per_slice"]) * int(output["n_slices"]),
            "peak_memory_mib": peak_memory(device),
            "dice": float(2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1)),
        }
        print(method, report[method], flush=True)
    return report


PARTS: dict[str, Callable] = {"phantoms": phantoms, "speed": speed_table, "throughput": training, "volume": volume}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True, help="of data and results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tf32 = {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
    facts = {"hardware": hardware(device), "versions": VERSIONS, "bf16": has_bf16(device), "tf32": tf32}
    result = PARTS[options.part](options.folder, device, options.quick)
    write_json(options.folder / f"{options.part}.json", facts | result)


if __name__ == "__main__":
    main()
