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
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import KeepLargestConnectedComponent, LoadImage, MapTransform, ResampleToMatch
from scipy import ndimage
from torch import nn

from custom_modules.engines import CaseDataset, sha256
from custom_modules.segmentation import UNKNOWN
from custom_modules.training import AveragedWeights
from custom_modules.transforms import CROSS, body_mask, slice_tags, threshold_slices
from custom_modules.writers import result_file, whole

logger = logging.getLogger(__name__)


def teacher(ckpt_path: str | Path, folder: str | Path) -> str:
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
        with whole(path) as aside, open(aside, "wb") as file:
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


class LoadMapd(MapTransform):
    """Makes the label of a prepared case from its map, its image and its tags.

    The map is brought to the image's grid and multiplied by the intensities; then, in each slice tagged y1,

        label = map * intensity^p > scale * (Otsu's threshold of that inside the region),

    of which the largest components are kept, closed and filled (a cavity belongs to its tumour). `UNKNOWN` in these
    slices are the body's rim, where the map does not count, and the whole body where nothing is left of the target,
    since the tag says that it is there. Slices tagged y0 are 0.

    Expects `image` (1, H, W, D) MetaTensor in [-1, 1], the tag volume `slice_labels` and `map_file`; adds `label`, the
    same shape, uint8: 0, 1 or `UNKNOWN`.

    Args:
        intensity_power: p.
        erosion: width of the rim, in pixels.
        scale: of Otsu's threshold; below 1, because map times intensity falls off before the target's border.
        num_components: largest 3D components kept.

    Raises:
        ValueError: if the tags run along another axis than the slices.
    """

    def __init__(
        self,
        keys: str = "label",
        intensity_power: float = 2.0,
        erosion: int = 4,
        scale: float = 0.8,
        num_components: int = 1,
    ) -> None:
        super().__init__(keys)
        self.intensity_power, self.erosion, self.scale = intensity_power, erosion, scale
        self.keep_largest = KeepLargestConnectedComponent(is_onehot=False, num_components=num_components)
        self.load = LoadImage(image_only=True, ensure_channel_first=True)
        self.onto_image = ResampleToMatch(mode="bilinear", padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        image, tags = out["image"], slice_tags(out["slice_labels"].as_tensor())
        x = np.asarray(image[0])
        body, region = (body_mask(x, rim) & np.asarray(tags.bool()) for rim in (0, self.erosion))
        saliency = np.asarray(self.onto_image(self.load(out["map_file"]), image)[0])
        saliency = saliency * ((x + 1) / 2).clip(min=0) ** self.intensity_power
        slices = [np.moveaxis(volume, -1, 0) for volume in (saliency, region)]
        target = np.moveaxis(threshold_slices(*slices, "otsu", self.scale), 0, -1)
        target = np.asarray(self.keep_largest(torch.as_tensor(target[None], dtype=torch.uint8))[0]) > 0
        for k in np.flatnonzero(target.any(axis=(0, 1))):
            closed = ndimage.binary_closing(target[..., k], CROSS, iterations=2)
            target[..., k] = ndimage.binary_fill_holes(closed | target[..., k]) & body[..., k]
        unknown = body & ~(region & target.any(axis=(0, 1)))
        label = np.where(target, 1, np.where(unknown, UNKNOWN, 0)).astype(np.uint8)
        for key in self.keys:
            out[key] = MetaTensor(torch.as_tensor(label[None]), meta=image.meta)
        return out


class DistilledWeights(AveragedWeights):
    """Writes the network once, when its segmenter has learned: the file is the one that the maps come from, and a run
    that is resumed has to find it as it was."""

    WRITTEN = Events.COMPLETED

    def __call__(self, engine: Engine) -> None:
        self.ema.ema_model.distilled.fill_(1)
        super().__call__(engine)
