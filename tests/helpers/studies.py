"""A study's folder as `study.runner` leaves it, made on the spot from masks that are the truth, shifted."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml
from matplotlib.axes import Axes

from custom_modules.evaluation.metrics import slice_metrics, summarise, volume_metrics
from study.__main__ import main
from study.tables import write_tables
from tests.helpers.bundles import REPO, TINY

BUNDLE = REPO / "bundles" / "brats_flair"
FAST = ["--num_draws=1", *(knob for knob in TINY if not knob.startswith("--logging_file"))]
TRAINING = {"ckpt_path": {"config_file": ["train.yaml"], "weights": "model.pt"}}
LPS = np.diag([-1.0, -1.0, 4.0, 1.0])
SHIFTS = {"p1": 2, "p2": 0, "p3": 1}  # pixels by which every mask of a case is moved: p2 is the best case, p1 the worst
LARGEST = 2  # slice of `truth` with most of it
SWEEPS = {
    **{f"guidance_scale={s}": {"method": "cg_cdm", "guidance_scale": s, "shift": 2} for s in (0, 0.1, 10, 1000)},
    **{f"num_steps={r}": {"method": "cg_cdm", "num_steps": r, "shift": r} for r in (1, 2)},
    **{f"threshold={t}": {"method": "cg_cdm", "threshold": t} for t in ("otsu", 0.5)},
}
SETTINGS = {"gate": "tags", "orientation": "LPS", "num_steps": 10, "tau": 0.95, "guidance_scale": 10}


def truth() -> np.ndarray:
    """A target (24, 20, 5) bool in slices 1, 2 and 3, the largest in `LARGEST`."""
    mask = np.zeros((24, 20, 5), bool)
    for k, half in ((1, 2), (2, 4), (3, 3)):
        mask[12 - half : 12 + half, 10 - half : 10 + half, k] = True
    return mask


def write_dataset(root: Path, cases: Mapping[str, int]) -> dict[str, Path]:
    """Images and labels in BraTS's layout; {case: image}. Folder and file names do not depend on the case's name."""
    paths = {}
    for i, case in enumerate(cases):
        folder = root / "group" / f"case{i}"
        folder.mkdir(parents=True)
        image = np.random.default_rng(i).random(truth().shape) * 20 + 100 + 80 * truth()
        image[[0, 1, -1, -2]] = 0
        nib.save(nib.Nifti1Image(image.astype(np.float32), LPS), folder / f"case{i}_flair.nii.gz")
        nib.save(nib.Nifti1Image(truth().astype(np.uint8), LPS), folder / f"case{i}_seg.nii.gz")
        paths[case] = folder / f"case{i}_flair.nii.gz"
    return paths


def write_cell(
    folder: Path, images: Mapping[str, Path], shifts: Mapping[str, int], settings: Mapping, volumes: bool = True
) -> None:
    """The output of one evaluation, and `cell.json`; a mask is the truth moved by `shifts` pixels, None: empty."""
    slices, rows = [], []
    for case, shift in shifts.items():
        mask = truth() & False if shift is None else np.roll(truth(), shift, axis=0)
        place, stem = folder / images[case].parent.name, images[case].parent.name
        place.mkdir(parents=True)
        facts = {"case": case, "image": str(images[case]), "slices_processed": 3, "settings": dict(settings)}
        (place / f"{stem}_provenance.json").write_text(json.dumps(facts))
        if volumes:
            nib.save(nib.Nifti1Image(mask.astype(np.uint8), LPS), place / f"{stem}_mask.nii.gz")
            nib.save(nib.Nifti1Image(mask * np.float32(0.5), LPS), place / f"{stem}_saliency.nii.gz")
        about = {"case": case, "group": "group", "seed": 0, "in_training": 0}
        found = slice_metrics(mask, truth())
        slices += [about | row for row in found]
        means = {key: float(np.mean([row[key] for row in found])) for key in ("dice", "iou", "hd95")}
        rows.append(about | {"n_slices": 3} | means | volume_metrics(mask, truth()) | {"seconds_per_slice": 0.25})
    (folder / "metrics").mkdir()
    for name, table in (("per_slice", slices), ("per_volume", rows)):
        with open(folder / "metrics" / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    recorded = {"target_labels": [], "min_area": 0, "slice_axis": 2} | dict(settings)
    summary = summarise(slices, rows, bundle="brats_flair", method=settings["method"], settings=recorded)
    (folder / "metrics" / "summary.json").write_text(json.dumps(summary))
    given = {"dataset_dir": "data", "datalist": "list.json", "section": "test"}
    cell = {"given": given, "weights_sha256": "ab" * 32, "settings": dict(settings), "hardware": "CPU"}
    cell |= {"finished": "2026-01-02 03:04:05", "versions": {"torch": "2"}}
    cell["command"] = f"run {folder.parent.name} <out>"
    (folder / "cell.json").write_text(json.dumps(cell))


def write_study(root: Path, runs: Mapping[str, Mapping], cases: Mapping[str, int] = SHIFTS) -> Path:
    """A study under `root`.

    Args:
        root: an empty folder.
        runs: {name: settings over SETTINGS, with "method"; "shift": further pixels by which its masks are moved (None:
            empty masks); "repeats": number of noise seeds (1)}.
        cases: {case: pixels by which its masks are moved}.
    """
    images, out = write_dataset(root / "data", cases), root / "out"
    for name, run in runs.items():
        settings = SETTINGS | {key: value for key, value in run.items() if key not in ("shift", "repeats")}
        for seed in range(run.get("repeats", 1)):
            extra = run.get("shift", 0)
            shifts = {case: None if extra is None else shift + extra + seed for case, shift in cases.items()}
            write_cell(out / "cells" / name / f"seed{seed}", images, shifts, settings, volumes=seed == 0)
    write_tables(out, runs, sorted({path.name for path in out.glob("cells/*/*")}), [0])
    return out


def study_file(folder: Path, runs: Mapping, **more) -> Path:
    """Write a study's YAML."""
    path = folder / "study.yaml"
    content = {"config_file": ["inference.yaml", "evaluate.yaml"], "runs": runs} | more
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def conduct(study: Path, out: Path, dataset: Path, *more) -> None:
    """Run a study of tiny networks; `more` are words of the command."""
    lists = ["--datalist", str(dataset / "datalist.json")] if "--datalist" not in more else []
    given = ["--bundle", str(BUNDLE), "--dataset_dir", str(dataset), "--output_dir", str(out), *lists]
    main(["benchmark", str(study), *given, *FAST, *map(str, more)])


def texts(axis: Axes) -> list[str]:
    """Return what is written into a panel."""
    return [text.get_text() for text in axis.texts]
