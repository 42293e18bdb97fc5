"""Shows the bundle at work without any data: draws a head with a known lesion and runs `brats_flair` on it.

    python -m examples.demo --output_dir demo_output

The volume passes through the same command as any other (`python -m monai.bundle run ...`, which is printed); only the
Dice at the end uses the true mask. The intensity floor (Otsu inside the head, largest component) is run for comparison,
because a lesion that a threshold finds would prove nothing. Unknown options are passed on to the bundle, e.g. `--method
cg_cdm`. The numbers say nothing about patients; for those see the results in the README.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from custom_modules.evaluation.metrics import slice_metrics
from custom_modules.knobs import ignore_noise
from examples.phantom import head_phantom
from study.figures.pictures import COLUMNS, draw_slice

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "bundles/brats_flair/configs/inference.yaml"
STEM = "head_flair"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the brats_flair bundle on a synthetic head.")
    parser.add_argument("--output_dir", default="demo_output", type=Path)
    parser.add_argument("--seed", default=4, type=int, help="of the synthetic head")
    options, knobs = parser.parse_known_args(arguments)
    ignore_noise()
    out = options.output_dir.resolve()

    print(f"Drawing a synthetic FLAIR head (seed {options.seed}) ...", flush=True)
    volumes = out / "volumes"
    case = volumes / "head"
    case.mkdir(parents=True, exist_ok=True)
    image, truth = head_phantom(options.seed)
    nib.save(image, case / f"{STEM}.nii.gz")
    nib.save(truth, case / "head_seg.nii.gz")

    result = run_bundle(volumes, out / "result", knobs)
    floor = run_bundle(volumes, out / "intensity", ["--method", "intensity"])

    mask, saliency = load(result / f"{STEM}_mask.nii.gz", image), load(result / f"{STEM}_saliency.nii.gz", image)
    image, lesion = np.asarray(image.dataobj), np.asarray(truth.dataobj)
    overlay = out / "overlay.png"
    draw(overlay, image, lesion, saliency, mask)
    rows = {"bundle": mask, "intensity Otsu inside the head": load(floor / f"{STEM}_mask.nii.gz", truth)}

    print("\nvolume    ", case / f"{STEM}.nii.gz")
    print("mask      ", result / f"{STEM}_mask.nii.gz")
    print("saliency  ", result / f"{STEM}_saliency.nii.gz")
    print("report    ", result.parent / "report.html")
    for record in sorted(result.glob("*.json")):
        print("provenance", record)
    print("overlay   ", overlay)
    print(f"\nDice, mean over the {int(lesion.any((0, 1)).sum())} slices with lesion:")
    for name, pred in rows.items():
        print(f"  {name:<32}{slice_dice(pred, lesion):.3f}")
    print("A synthetic head: this shows that the software works, not how well it does on patients.")
    print("Research only, not a medical device.")


def run_bundle(dataset_dir: Path, output_dir: Path, knobs: list[str]) -> Path:
    """Run the bundle's ordinary inference command; return the folder it wrote for the head.

    Raises:
        SystemExit: the command failed; its own message says why.
    """
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", CONFIG]
    command += ["--dataset_dir", str(dataset_dir), "--output_dir", str(output_dir), *knobs]
    print("\n$ python", *command[1:], flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"The bundle's inference ended with exit status {code}; its message is above.")
    return output_dir / STEM


def load(path: Path, like: nib.Nifti1Image) -> np.ndarray:
    """Read an output volume and check that it has the shape and affine of the input.

    Raises:
        ValueError: the geometry differs.
    """
    volume = nib.load(path)
    if volume.shape != like.shape or not np.allclose(volume.affine, like.affine, atol=1e-4):
        got = f"{volume.shape}, {volume.affine.tolist()}"
        raise ValueError(f"{path} must have the input's shape and affine; got {got}.")
    return np.asarray(volume.dataobj)


def slice_dice(pred: np.ndarray, lesion: np.ndarray) -> float:
    """Return the mean Dice over the slices with lesion; an empty prediction counts 0."""
    return float(np.mean([row["dice"] for row in slice_metrics(pred, lesion)]))


def draw(path: Path, image: np.ndarray, lesion: np.ndarray, saliency: np.ndarray, mask: np.ndarray) -> None:
    """Draw image with the true outline, saliency and mask, for slices spread over the lesion and one without."""
    positive = np.flatnonzero(lesion.any((0, 1)))
    slices = [*positive[np.linspace(0, len(positive) - 1, 6).astype(int)[1:-1]], positive[0] - 3]
    top = float(np.percentile(saliency[..., positive], 99.8))
    figure = Figure(figsize=(2.4 * len(slices), 2.6 * len(COLUMNS)), layout="tight")
    axes = figure.subplots(len(COLUMNS), len(slices), squeeze=False)
    for column, k in enumerate(slices):
        draw_slice(list(axes[:, column]), *(v[..., k].T for v in (image, lesion, saliency, mask)), top)
        axes[0, column].set_title(f"slice {k}" if lesion[..., k].any() else f"slice {k}, no lesion", fontsize=9)
    for axis, name in zip(axes[:, 0], COLUMNS):
        axis.set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
