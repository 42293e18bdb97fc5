"""How far intensities alone go: the best threshold there is, chosen with the masks by which it is then judged.

This is an oracle and no method, for in use nobody knows that threshold; `intensity` is the floor without masks. After
Meissen et al. 2021 (arXiv 2109.06023, BrainLes), by their released code:

    e(x)    histogram equalised within the body: the share of the body's voxels that are at most as bright as x
    mask    e(x) > t: nothing is blurred, nothing removed (Meissen et al. drop components of up to 20 voxels)
    t       of `LEVELS` values the one with the best mean Dice, for all volumes together or for each by itself

Their images have no skull. A scalp is as bright as a tumour, so each group is measured twice: in the whole body, and
without its rim, as for `intensity` (knob `erosion`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from monai.transforms import Compose
from scipy.stats import rankdata
from tqdm import tqdm

from custom_modules.data.datalist import labelled_cases
from custom_modules.inference.body import ScaleToBodyd, body_mask
from custom_modules.training.supervised import LoadMaskd

LEVELS = 1000  # thresholds t; they leave the brightest 100 %, 99.9 %, 99.8 % ... of the body


def count(image: np.ndarray, body: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Counts the voxels of the mask at every threshold.

    Args:
        image: (H, W, D), real; the slices run along the last axis.
        body: (H, W, D), bool; what is outside is in no mask.
        truth: (H, W, D), bool.

    Returns:
        (3, D, LEVELS) int: of each slice, the voxels in the mask, in the truth, and in both.
    """
    level = np.ceil(LEVELS * rankdata(image[body], "max") / body.sum()).astype(np.int64)  # 1 to LEVELS
    first = np.arange(image.shape[2]) * (LEVELS + 1)
    slot = np.broadcast_to(first, image.shape)[body] + level  # one for each slice and level

    def at_least(slots: np.ndarray) -> np.ndarray:
        found = np.bincount(slots, minlength=image.shape[2] * (LEVELS + 1)).reshape(image.shape[2], LEVELS + 1)
        return found[:, :0:-1].cumsum(axis=1)[:, ::-1]

    mask, both = at_least(slot), at_least(slot[truth[body]])
    return np.stack([mask, np.broadcast_to(truth.sum(axis=(0, 1))[:, None], mask.shape), both])


def best_thresholds(name: str, volumes: Sequence[np.ndarray]) -> list[str]:
    """Lays out two rows of the table, the best threshold for all of a group's volumes, and the best for each.

    Args:
        name: of the group.
        volumes: what `count` returns for each volume; each has a target.
    """
    slices = [_dice(counts[:, counts[1, :, 0] > 0]) for counts in volumes]  # of positive slices
    whole = np.stack([_dice(counts.sum(axis=1)) for counts in volumes])
    together = _dice(np.sum([counts.sum(axis=1) for counts in volumes], axis=0))
    one = [np.concatenate(slices).mean(axis=0), whole.mean(axis=0), together]
    cells = [f"{dice.max():.3f} (brightest {1 - dice.argmax() / LEVELS:.1%})" for dice in one]
    own = np.concatenate([dice[:, dice.mean(axis=0).argmax()] for dice in slices]).mean(), whole.max(axis=1).mean()
    title = f"{name} ({len(volumes)} volumes, {sum(map(len, slices))} slices)"
    return [
        f"| {title}: one for all | {' | '.join(cells)} |",
        f"| one for each volume | {own[0]:.3f} | {own[1]:.3f} | |",
    ]


def _dice(counts: np.ndarray) -> np.ndarray:
    mask, truth, both = counts
    return 2 * both / (mask + truth)


def measure_floor(bundle: Path, dataset_dir: str, datalist: str, section: str, knobs: Mapping[str, Any]) -> list[str]:
    """Measures the best thresholds for the volumes of a section that have a target, each group of cases by itself.

    Args:
        bundle: its folder.
        dataset_dir: folder that the datalist's paths start from.
        datalist: with masks.
        section: of the datalist.
        knobs: {knob: value} of inference.

    Returns:
        The lines of a table in Markdown. Slice Dice is the mean over positive slices, volume Dice over volumes; the
        last column counts the voxels of all volumes together, as Meissen et al. do.

    Raises:
        ValueError: no case has a mask.
    """
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.yaml"))
    parser.update({"bundle_root": str(bundle), "dataset_dir": dataset_dir, "datalist": datalist} | dict(knobs))
    parser["method"] = "intensity"
    labels, axis, erosion, size = map(parser.get_parsed_content, ("labels", "slice_axis", "erosion", "image_size"))
    steps = parser.get_parsed_content("preprocessing").transforms
    native = takewhile(lambda step: not isinstance(step, ScaleToBodyd), steps)  # the rest crops and resizes
    prepare = Compose([*native, ScaleToBodyd("image"), LoadMaskd(labels)])
    groups = defaultdict(list)
    for case in tqdm(labelled_cases(datalist, dataset_dir, section, labels, axis), desc="floor", unit="case"):
        item = prepare(case)
        image, truth = item["image"][0].numpy(), item["label"][0].numpy() > 0
        if truth.any():
            rim = round(erosion * max(image.shape[:2]) / size)
            for where, pixels in (("whole body", 0), ("without its rim", rim)):
                groups[f"{case['group']}, {where}"].append(count(image, body_mask(image, pixels), truth))
    head = "| best threshold, chosen with the masks | slice Dice | volume Dice | all voxels together |"
    rows = [row for name, volumes in groups.items() for row in best_thresholds(name, volumes)]
    return [head, "| --- | --- | --- | --- |", *rows]
