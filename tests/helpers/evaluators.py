"""An evaluator over volumes of a few voxels, with a method that fails on dark ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, LoadImaged, Orientationd
from torch import nn

from custom_modules.data.reader import VolumeReader
from custom_modules.data.tag_volume import TagVolumed
from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.checks import CheckVolumed
from custom_modules.inference.evaluator import VolumeBatch, VolumeEvaluator
from custom_modules.inference.inferer import SaliencyInferer
from tests.helpers.bundles import save_nifti

PREPROCESSING = Compose(
    [
        LoadImaged("image", reader=VolumeReader),
        EnsureChannelFirstd("image"),
        EnsureTyped("image", dtype=torch.float32),
        CheckVolumed("image"),
        TagVolumed(),
        Orientationd(["image", "slice_labels"], "LPS", labels=None, allow_missing_keys=True),
    ]
)


def darkest_fails(x_0: torch.Tensor, network: nn.Module, slices: list[int]) -> torch.Tensor:
    """Returns half of the slice as its map; fails on a slice that is darker than -0.4 everywhere."""
    if x_0.max() < -0.4:
        raise ArithmeticError("the slice is\ntoo dark")
    return x_0 / 2


def volume(inside: float) -> np.ndarray:
    """(12, 12, 3) float32: a square of `inside` in air of -1."""
    image = np.full((12, 12, 3), -1, np.float32)
    image[2:10, 2:10] = inside
    return image


def save_cases(folder: Path) -> list[dict]:
    """Four cases: one unreadable, one dark (the method fails on it), two that are fine."""
    (folder / "unreadable.nii.gz").write_bytes(b"no volume")
    for name, inside in (("dark", -0.5), ("fine", 0.5), ("last", 1.0)):
        save_nifti(volume(inside), folder / f"{name}.nii.gz")
    names = ("unreadable", "dark", "fine", "last")
    return [{"case": f"case_{n}", "image": str(folder / f"{n}.nii.gz"), "slice_labels": [1, 0, 1]} for n in names]


def evaluator(
    cases: list[dict], gate: str = "all", handlers=(), postprocessing=None, records=(), batch_size=1
) -> VolumeEvaluator:
    return VolumeEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CaseDataset(cases, PREPROCESSING, records), batch_size=batch_size),
        network=nn.Identity(),
        inferer=SaliencyInferer(darkest_fails, gate=gate, amp=False),
        prepare_batch=VolumeBatch(),
        postprocessing=postprocessing,
        val_handlers=list(handlers),
    )


class Collect:
    """Handler that keeps the output of every iteration."""

    def __init__(self) -> None:
        self.outputs: list[list[dict]] = []

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.outputs.append(e.state.output))
