"""Pictures of results: image, saliency and mask beside each other, with the true outline where there is one.

    python -m custom_modules.report OUT --output gallery.png [--cases A B]

`OUT` is the output folder of an inference or evaluation. Which image a result belongs to stands in the provenance file
beside it; its label is looked for where `custom_modules.layouts` finds labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.transforms import LoadImage

from custom_modules.layouts import find_cases, load_label

COLUMNS = ("image, true outline", "saliency", "mask, true outline")


def draw_slice(
    axes: list[Axes], image: np.ndarray, truth: np.ndarray | None, saliency: np.ndarray, mask: np.ndarray, top: float
) -> None:
    """Draws one slice into three axes, in the order of `COLUMNS`.

    Args:
        axes: three axes.
        image: (H, W), any real values.
        truth: (H, W) binary, or None.
        saliency: (H, W); 0 to `top` goes from clear to bright.
        mask: (H, W) binary.
        top: saliency that is shown brightest.
    """
    low, high = np.percentile(image, [1, 99.7])
    for axis in axes:
        axis.imshow(image.T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        axis.set(xticks=[], yticks=[])
    heat = np.clip(saliency.T / max(top, 1e-6), 0, 1)
    axes[1].imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.75 * heat)
    if mask.any():
        axes[2].imshow(np.ma.masked_equal(mask.T, 0), cmap="autumn", vmin=0, vmax=1, alpha=0.5)
    if truth is not None and truth.any():
        for axis in (axes[0], axes[2]):
            axis.contour(truth.T, [0.5], colors="cyan", linewidths=0.9)


def read_result(folder: Path, target_labels: list[int]) -> dict:
    """Reads one result folder: {"case", "image", "saliency", "mask", "truth"} as (H, W, D) arrays; truth may be None.

    Raises:
        FileNotFoundError: if the folder holds no provenance file, or its image is gone.
    """
    provenance = next(folder.glob("*_provenance.json"), None)
    if provenance is None:
        raise FileNotFoundError(f"{folder} holds no *_provenance.json: not a result of this bundle.")
    facts = json.loads(provenance.read_text())
    if not Path(facts["image"]).exists():
        raise FileNotFoundError(f"the image of {folder} is not at {facts['image']} any more.")
    stem, load = provenance.name.removesuffix("_provenance.json"), LoadImage(image_only=True)
    image, saliency, mask = (
        load(path).numpy() for path in (facts["image"], *(folder / f"{stem}_{x}.nii.gz" for x in ("saliency", "mask")))
    )
    label = next((case["label"] for case in find_cases(facts["image"]) if "label" in case), None)
    truth = None if label is None else load_label(label, facts["image"])
    if truth is not None:
        truth = np.isin(truth, target_labels) if target_labels else truth > 0
    return {"case": facts["case"], "image": image, "saliency": saliency, "mask": mask, "truth": truth}


def gallery(results: list[dict], output: Path) -> None:
    """Draws, for every result, the slice with the largest target (or mask, without a truth), two results a row."""
    rows = -(-len(results) // 2)
    figure = Figure(figsize=(2.0 * 6, 2.15 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 6, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, result in enumerate(results):
        cells = axes[i // 2, 3 * (i % 2) : 3 * (i % 2) + 3]
        reference = result["mask"] if result["truth"] is None else result["truth"]
        k = int(reference.sum(axis=(0, 1)).argmax())
        top = float(np.percentile(result["saliency"][..., k], 99.8))
        volumes = (result[key] for key in ("image", "truth", "saliency", "mask"))
        planes = (None if volume is None else volume[..., k] for volume in volumes)
        draw_slice(list(cells), *planes, top)
        cells[0].set_title(f"{result['case']}, slice {k}", fontsize=7, loc="left")
        if i < 2:
            for axis, name in zip(cells[1:], COLUMNS[1:]):
                axis.set_title(name, fontsize=7)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a gallery of results.")
    parser.add_argument("results", type=Path, help="output folder of an inference or evaluation")
    parser.add_argument("--output", type=Path, default=Path("gallery.png"))
    parser.add_argument("--cases", nargs="*", help="names of the cases to draw; all without it")
    parser.add_argument("--target_labels", nargs="*", type=int, default=[], help="all above 0 without it")
    options = parser.parse_args(argv)
    folders = sorted(path.parent for path in options.results.glob("*/*_provenance.json"))
    results = [read_result(folder, options.target_labels) for folder in folders]
    chosen = [result for result in results if not options.cases or result["case"] in options.cases]
    if not chosen:
        raise SystemExit(f"no result to draw in {options.results}; it holds {[result['case'] for result in results]}.")
    gallery(chosen, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
