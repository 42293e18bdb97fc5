"""The paper's figure 1: how CG-Diff and CDM arrive at their maps, on one slice.

CG-Diff reconstructs the slice as if it were healthy, and its map is the difference (`custom_modules.methods.cg_diff`).
CDM takes the same denoising step with y1 and with y0, and its map is their difference (`custom_modules.methods.cdm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch
from torch import nn

from custom_modules.data.geometry import read_geometry
from custom_modules.data.labels import load_label, target_mask
from custom_modules.data.layouts import find_cases
from custom_modules.methods.cdm import CDM, slice_noise
from study.figures.pictures import annotate, draw_heat, draw_image, draw_mask, panels
from study.volumes import Case


def draw_denoising(
    config_file: str | Path, case: str | Path, index: int | None = None, knobs: Mapping[str, Any] | None = None
) -> Figure:
    """Draw image, truth, CG-Diff's reconstruction and map, one denoising step of CDM with y1 and y0, and its map.

    All are on the grid that the network sees, with the settings of the bundle.

    Args:
        config_file: `inference.yaml` of a bundle.
        case: an image file, or the folder of a DICOM series.
        index: slice after the bundle's preprocessing; None: the one with the largest target in the label.
        knobs: {knob: value} of the bundle, such as `ckpt_path`.

    Raises:
        ValueError: the image cannot be used, or there is neither an index nor a label to choose one by.
    """
    cg_diff, cdm = (_bundle(config_file, case, method, knobs or {}) for method in ("cg_diff", "cdm"))
    view = _prepared(cdm, case)
    if index is None and view.truth is None:
        raise ValueError(f"no label was found for {case}: name the slice, --slice K.")
    index = view.largest() if index is None else index
    network, inferer = cdm.get_parsed_content("network"), cdm.get_parsed_content("inferer")
    x_0 = torch.as_tensor(view.image)[None, None, ..., index].to(cdm.get_parsed_content("device"))
    rebuilt = cg_diff.get_parsed_content("inferer").method.reconstruct(x_0, network)
    towards_y1, towards_y0 = one_step(x_0, network, inferer.method, index)
    saliency = inferer(x_0[..., None], network)[:, :1, ..., 0]
    planes = [x_0, x_0, rebuilt, (x_0 - rebuilt).abs(), towards_y1, towards_y0, saliency]
    planes = [view.plane(plane[0, 0, ..., None].cpu().numpy(), 0) for plane in planes]
    return _draw_planes(planes, view.plane(view.truth, index), view.pixel, inferer.method.levels[0])


def one_step(x_0: torch.Tensor, network: nn.Module, method: CDM, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x_{Q-1} (1, 1, H, W) of one slice `x_0` (1, 1, H, W), with y1 and with y0, from the same x_Q."""
    t = torch.full((2,), method.levels[0], device=x_0.device)
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=x_0.device)
    x_t = method.diffusion.add_noise(x_0, slice_noise(x_0, method.seed, 0, [index]), t[:1])  # Eq. (2)
    x_t = x_t.repeat(2, 1, 1, 1)
    with torch.no_grad():
        return method.diffusion.ddim_step(x_t, network(x_t, t, y), t).split(1)  # Eq. (5)


def _bundle(config_file: str | Path, case: str | Path, method: str, knobs: Mapping[str, Any]) -> ConfigParser:
    """Read the bundle's inference of one image by one method, every slice processed."""
    parser = ConfigParser()
    parser.read_config(str(config_file))
    root = str(Path(config_file).resolve().parent.parent)
    parser.update({"bundle_root": root, **knobs, "dataset_dir": str(case), "method": method, "gate": "all"})
    return parser


def _prepared(parser: ConfigParser, case: str | Path) -> Case:
    """Prepare the image as the bundle does, and put its truth on the same grid."""
    item = parser.get_parsed_content("dataset")[0]
    if "error" in item:
        raise ValueError(f"{case}: {item['error']}")
    image, label, truth = item["image"], find_cases(case)[0].get("label"), None
    if label is not None:
        target = target_mask(load_label(label, case), parser.get_parsed_content("labels"))
        target = MetaTensor(torch.as_tensor(target)[None].float(), affine=torch.as_tensor(read_geometry(case)[1]))
        truth = ResampleToMatch(mode="nearest")(target, img_dst=image)[0].numpy() > 0.5
    image, affine = image[0].as_tensor().numpy(), np.asarray(image.affine)
    return Case(item["case"], image, affine, 2, truth, image, image)


def _draw_planes(planes: Sequence[np.ndarray], truth: np.ndarray | None, pixel: Sequence[float], q: int) -> Figure:
    """Draw the seven planes in a row, the two maps over the image."""
    steps = [f"step to t = {q - 1}, {y}" for y in ("y1", "y0")]
    names = ["image", "truth", "CG-Diff: as healthy", "CG-Diff: difference", *steps, "CDM: map"]
    height, width = np.multiply(planes[0].shape, pixel)
    figure, axes = panels(1, len(planes), 1.7, tall=height / width)
    for axis, name, plane in zip(axes[0], names, planes):
        is_map = name in ("CG-Diff: difference", "CDM: map")
        draw_image(axis, planes[0] if is_map else plane, pixel)
        if is_map:
            draw_heat(axis, plane, float(np.percentile(plane, 99.8)), pixel)
        annotate(axis, name)
    draw_mask(axes[0, 1], truth, truth, pixel)
    return figure
