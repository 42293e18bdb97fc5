"""Distillation: a segmenter learns from the diffusion maps of the training volumes, and then needs no diffusion.

A map knows where the target is, the image knows its border, and a network that has to explain many volumes at once
does not follow what is wrong in a few of them. So:

1. `write_maps`: inference, as the bundle does it, over the training volumes, in the slices whose tag says y1.
2. `LoadMapd`: map and image, at a finer grid than the map's, become a label of every tagged slice.
3. `distill.yaml` over `train.yaml`: the segmenter is trained on these labels; a slice tagged y0 has no target.

No mask is read. The labels are those of Otsu's threshold; nothing is fitted to a training mask.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from torch import nn

from custom_modules.files import atomic_path, result_file, sha256
from custom_modules.inference.cases import CaseDataset
from custom_modules.training.checkpoints import AveragedWeights

logger = logging.getLogger(__name__)


def save_teacher(ckpt_path: str | Path, folder: str | Path) -> str:
    """Path of a copy of `ckpt_path` without its segmenter, in `folder`, named after the tensors in it.

    What a distillation leaves behind goes by this name: weights that only got a segmenter have the same one, so that
    maps and checkpoints are found again, and weights that were trained further have another.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(
            f"ckpt_path {str(ckpt_path)!r} does not exist: run training first, or give --ckpt_path."
        )
    state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    state = {name: value for name, value in state.items() if not name.startswith(("segmenter.", "distilled"))}
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    path = Path(folder, f"teacher_{digest.hexdigest()[:12]}.pt")
    if not path.is_file():
        with atomic_path(path) as aside, open(aside, "wb") as file:
            torch.save(state, file)
    return str(path)


def mapped_cases(cases: Sequence[Mapping], maps_dir: str | Path) -> list[dict]:
    """`cases` with `map_file`, where `write_maps` has put the map of each, and its SHA-256, by which a cache of labels
    knows it.

    Raises:
        FileNotFoundError: if a map is not there.
    """
    named = CaseDataset(cases, None).data
    files = [result_file(maps_dir, case["stem"], "saliency.nii.gz") for case in named]
    if absent := [case["case"] for case, file in zip(named, files) if not file.is_file()]:
        raise FileNotFoundError(f"maps_dir {maps_dir} has no map of {absent[:5]}: `run distill` makes them.")
    return [{**c, "map_file": str(file), "map_sha256": sha256(file)} for c, file in zip(cases, files, strict=True)]


def write_maps(
    config_file: Sequence[str], distributed: str, network: nn.Module, cases: Sequence[Mapping], **knobs: Any
) -> None:
    """Runs a bundle's inference over `cases`; what is there already, from the same weights, is not done again.

    Args:
        config_file: `inference.yaml` and what comes over it.
        distributed: the overlay by which several processes (torchrun) share the cases.
        network: the weights at work, those of the knob `ckpt_path`.
        cases: of the datalist, with tags.
        knobs: of that config.

    Raises:
        RuntimeError: if a case failed.
    """
    logger.info("maps of %d training volumes, in %s", len(cases), knobs["output_dir"])
    parser = ConfigParser()
    parser.read_config([*config_file, distributed] if idist.get_world_size() > 1 else list(config_file))
    parser.update({**knobs, "network": network, "cases": list(cases)})
    parser.get_parsed_content("evaluator").run()


class DistilledWeights(AveragedWeights):
    """Writes the network once, when its segmenter has learned: the file is the one that the maps come from, and a run
    that is resumed has to find it as it was."""

    WRITTEN = Events.COMPLETED

    def __call__(self, engine: Engine) -> None:
        self.ema.ema_model.distilled.fill_(1)
        super().__call__(engine)
