"""Distillation: a segmenter learns from the diffusion maps of the training volumes, and then needs no diffusion.

A map shows where the target is, the image shows its border, and a network that must explain many volumes at once does
not follow the errors of a few. So:

1. `write_maps` runs the bundle's inference over the training volumes, in the slices tagged y1.
2. `LoadMapd` makes a label of every tagged slice from the map and the image, on a finer grid than the map's.
3. `distill.yaml` over `train.yaml` trains the segmenter on these labels; a slice tagged y0 has no target.

No mask is read, and nothing is fitted to one: the labels come from Otsu's threshold. `run training` ends with these
steps (`run_student`), and `run distill` does them alone.
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
from monai.bundle.utils import ID_SEP_KEY
from torch import nn

from custom_modules.files import atomic_path, result_file, sha256
from custom_modules.inference.cases import CaseDataset
from custom_modules.knobs import find_knob
from custom_modules.training.checkpoints import AveragedWeights

logger = logging.getLogger(__name__)


def run_student(
    config_file: Sequence[str], distributed: str, cases: Sequence[Mapping], knobs: Mapping[str, Any]
) -> None:
    """Runs the items of `distill`, the last stages of training, in this process.

    Args:
        config_file: `train.yaml` and `distill.yaml`.
        distributed: overlay with which several processes (torchrun) train together.
        cases: training cases, with tags.
        knobs: values of knobs of that config, which a host or a command line may have changed for the first stage.

    Raises:
        ValueError: the config has no such knob.
    """
    idist.barrier()  # the first process has written the weights of the first stage
    parser = _read(config_file, distributed)
    for name in knobs:
        if problem := find_knob(name, parser.get()):
            raise ValueError(problem)
    parser.update({**knobs, "tagged_cases": tuple(cases)})
    for index in range(len(parser.get("distill"))):
        parser.get_parsed_content(f"distill{ID_SEP_KEY}{index}")


def _read(config_file: Sequence[str], distributed: str) -> ConfigParser:
    """Reads configs, and the overlay `distributed` where there are several processes.

    Cases enter such a parser as a tuple: it would evaluate texts in lists and dictionaries, and a case may have any
    name.
    """
    parser = ConfigParser()
    parser.read_config([*config_file, distributed] if idist.get_world_size() > 1 else list(config_file))
    return parser


def save_teacher(ckpt_path: str | Path, folder: str | Path) -> str:
    """Copies `ckpt_path` without its segmenter into `folder`, named after the tensors in it, and returns the path.

    Maps and checkpoints of a distillation belong to this name. Weights that only gained a segmenter keep it, so that
    these are found again; weights that were trained further get another.

    Raises:
        FileNotFoundError: `ckpt_path` does not exist.
    """
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(
            f"ckpt_path {str(ckpt_path)!r} does not exist: run training first, or give --ckpt_path."
        )
    state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    state = {name: value for name, value in state.items() if not name.startswith(("segmenter.", "distilled"))}
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous() + 0  # an average makes 0 of -0, which is the same weight
        digest.update(name.encode() + tensor.numpy().tobytes())
    path = Path(folder, f"teacher_{digest.hexdigest()[:12]}.pt")
    if not path.is_file():
        with atomic_path(path) as aside, open(aside, "wb") as file:
            torch.save(state, file)
    return str(path)


def mapped_cases(cases: Sequence[Mapping], maps_dir: str | Path) -> list[dict]:
    """Adds to each case `map_file`, the map that `write_maps` has written, and its SHA-256 for the key of a cache.

    Raises:
        FileNotFoundError: a map is missing.
    """
    named = CaseDataset(cases, None).data
    files = [result_file(maps_dir, case["stem"], "saliency.nii.gz") for case in named]
    if absent := [case["case"] for case, file in zip(named, files) if not file.is_file()]:
        raise FileNotFoundError(f"maps_dir {maps_dir} has no map of {absent[:5]}: `run distill` makes them.")
    return [{**c, "map_file": str(file), "map_sha256": sha256(file)} for c, file in zip(cases, files, strict=True)]


def write_maps(
    config_file: Sequence[str], distributed: str, network: nn.Module, cases: Sequence[Mapping], **knobs: Any
) -> None:
    """Runs a bundle's inference over `cases`; maps that already exist, from the same weights, are not made again.

    Args:
        config_file: `inference.yaml` and its overlays.
        distributed: overlay with which several processes (torchrun) share the cases.
        network: network with the weights of the knob `ckpt_path`.
        cases: cases of the datalist, with tags.
        knobs: values of knobs of that config.

    Raises:
        RuntimeError: a case failed.
    """
    logger.info("stage 2 of 3: maps of %d training volumes, in %s", len(cases), knobs["output_dir"])
    parser = _read(config_file, distributed)
    parser.update({**knobs, "network": network, "cases": tuple(cases)})
    parser.update({"provenance#command": ({}, tuple(config_file))})  # not that of the training
    parser.update({"inferer#appearance": None})  # these are the training volumes
    parser.get_parsed_content("evaluator").run()


def write_statistics(config_file: Sequence[str], network: nn.Module, cases: Sequence[Mapping], **knobs: Any) -> None:
    """Runs the item `statistics` of a bundle's inference on the training `cases`, in the first process.

    Args:
        config_file: `inference.yaml` and its overlays.
        network: network with the weights of the knob `ckpt_path`.
        cases: training cases.
        knobs: values of knobs of that config.
    """
    if idist.get_rank() > 0:
        return
    parser = ConfigParser()
    parser.read_config(list(config_file))
    parser.update({**knobs, "method": "segmenter", "network": network, "cases": tuple(cases)})
    parser.get_parsed_content(f"statistics{ID_SEP_KEY}1")  # not the check of the command line, which is training's


class DistilledWeights(AveragedWeights):
    """Writes the network once, after its segmenter has learned: the file holds the weights that the maps come from, and
    a run that is resumed must find it unchanged."""

    WRITTEN = Events.COMPLETED

    def __call__(self, engine: Engine) -> None:
        self.ema.ema_model.distilled.fill_(1)
        super().__call__(engine)
