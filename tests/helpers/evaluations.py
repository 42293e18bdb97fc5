"""Masks of 4x4 slices, and an engine that hands them to the evaluation handler."""

from __future__ import annotations

import csv

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

LABEL = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
PRED = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])  # the square, moved by one pixel
EMPTY = np.zeros((4, 4), int)


def volume(*slices: np.ndarray) -> np.ndarray:
    return np.stack(slices, axis=-1)


def item(case, pred, label, **more):
    """Makes an entry of an evaluator's output from masks (4, 4, D), in voxels of 2 x 3 x 5 mm."""
    affine = torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0]))
    pred, label = (MetaTensor(torch.as_tensor(mask)[None].float(), affine=affine) for mask in (pred, label))
    return {"case": case, "stem": case, "pred": pred, "label": label, **more}


def run(handler, outputs, cases=None, done=()):
    """Runs the handler over `cases` (default: those of `outputs`) as a `VolumeEvaluator` does; `done` were measured."""
    engine = Engine(lambda engine, output: output)
    names = [item["case"] for output in outputs for item in output] if cases is None else cases
    engine.cases = {name: {"case": name, "stem": name, "label_file": f"{name}_seg.nii.gz"} for name in names}
    engine.done, engine.failures = list(done), {}
    handler.attach(engine)
    engine.run(outputs)
    handler.failures = engine.failures
    return handler.folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
