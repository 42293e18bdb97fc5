"""The config of what is timed, and its slices, prepared as for inference."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import torch
from monai.bundle import ConfigParser

from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.files import read_json
from examples.phantom import head_phantom

CONFIGS = Path(__file__).parents[1] / "bundles" / "brats_flair" / "configs"


def read_config(device: torch.device, *names: str, **knobs) -> ConfigParser:
    """Read these configs of brats_flair, with knobs."""
    config = ConfigParser()
    config.read_config([str(CONFIGS / name) for name in names])
    config.update({"bundle_root": str(CONFIGS.parent), "device": device, **knobs})
    return config


def prepared_slices(config: ConfigParser, datalist: str | None, dataset_dir: str | None, n: int) -> torch.Tensor:
    """Return slices (n, 1, H, W) with a target: of validation patients, or without a datalist of a synthetic head."""
    with tempfile.TemporaryDirectory() as folder:
        if datalist:
            cases = read_json(datalist)["validation"]
            cases = [{**case, "image": str(Path(dataset_dir or ".") / case["image"])} for case in cases]
        else:
            image, lesion = head_phantom()
            nib.save(image, Path(folder) / "head.nii.gz")
            tags = (lesion.get_fdata() > 0).any(axis=(0, 1)).astype(int).tolist()
            cases = [{"case": "head", "image": f"{folder}/head.nii.gz", "slice_labels": tags}]
        slices = []
        for case in cases:
            item = config.get_parsed_content("preprocessing")(case)
            positive = tags_of_volume(item["slice_labels"].as_tensor()) > 0
            slices.append(item["image"].as_tensor().movedim(-1, 0)[positive])
            if sum(map(len, slices)) >= n:
                break
    slices = torch.cat(slices)
    return slices[torch.arange(n) % len(slices)].contiguous()
