"""How good the student's labels are: their Dice with the masks of training cases, with each rule left out in turn.

The rules (`custom_modules.training.map_labels`) never see a mask. Their constants were chosen by this study, with the
masks of training cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any
from unittest.mock import patch

from monai.bundle import ConfigParser
from torch import Tensor
from tqdm import tqdm

from custom_modules.data.datalist import labelled_cases
from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.training import map_labels
from custom_modules.training.distill import mapped_cases
from custom_modules.training.supervised import LoadMaskd

ANYWHERE = 1000  # pixels: wider than any slice
WITHOUT = {  # {variant: constants of `map_labels`}
    "all rules": {"FLOOR": map_labels.FLOOR},
    "no least threshold": {"FLOOR": 0.0},
    "not from slice to slice": {"REACH": ANYWHERE},
    "not to the edges": {"STEPS": 0},
    "none of the three": {"FLOOR": 0.0, "REACH": ANYWHERE, "STEPS": 0},
}


def measure_labels(
    bundle: Path, dataset_dir: str, datalist: str, maps_dir: Path, number: int, seed: int, knobs: Mapping[str, Any]
) -> list[str]:
    """Measures labels against masks.

    Args:
        bundle: its folder.
        dataset_dir: folder that the datalist's paths start from.
        datalist: with masks of its training cases.
        maps_dir: `RUN/distill/maps` of a training on them.
        number: cases to draw; 0: all.
        seed: of that draw.
        knobs: {knob: value} of training.

    Returns:
        The lines of a table in Markdown: volume Dice and slice Dice, means over cases and tagged slices.

    Raises:
        FileNotFoundError: a map is missing.
        ValueError: no training case has a mask.
    """
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / f"{name}.yaml") for name in ("train", "distill")])
    where = {"bundle_root": str(bundle), "dataset_dir": dataset_dir, "datalist": datalist, "annotated": False}
    where["maps_dir"] = str(maps_dir)
    parser.update(where | dict(knobs))
    target_labels, axis = (parser.get_parsed_content(id_) for id_ in ("labels", "slice_axis"))
    cases = labelled_cases(datalist, dataset_dir, "training", target_labels, axis)
    if number and number < len(cases):
        cases = [cases[i] for i in sorted(Random(seed).sample(range(len(cases)), number))]
    prepare = parser.get_parsed_content("preprocessing").transforms
    load_mask = LoadMaskd(target_labels)
    found = {name: ([], []) for name in WITHOUT}
    for case in tqdm(mapped_cases(cases, maps_dir), desc="labels", unit="case"):
        item = dict(case)
        for step in prepare[:-1]:
            item = step(item)
        truth = load_mask(item)["label"][0].bool()
        tagged = tags_of_volume(item["slice_labels"].as_tensor()).bool()
        for name, constants in WITHOUT.items():
            with patch.multiple(map_labels, **constants):
                label = prepare[-1](item)["label"][0] == 1
            found[name][0].append(_dice(label, truth))
            found[name][1].extend(_dice(label[..., k], truth[..., k]) for k in tagged.nonzero().flatten().tolist())
    head = f"| labels of {len(cases)} training cases | volume Dice | slice Dice |"
    rows = [f"| {name} | {fmean(volume):.3f} | {fmean(slices):.3f} |" for name, (volume, slices) in found.items()]
    return [head, "| --- | --- | --- |", *rows]


def _dice(label: Tensor, truth: Tensor) -> float:
    both = int(label.sum()) + int(truth.sum())
    return 2 * int((label & truth).sum()) / both if both else 1.0
