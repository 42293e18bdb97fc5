"""Heads of a few voxels with a bright lesion, and `monai.bundle` runs of tiny networks on them."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from scipy import ndimage

REPO = Path(__file__).resolve().parents[2]
BUNDLES = ("brats_flair", "chaos_kidney")
SHAPE = (48, 40, 6)
TAGS = [0, 0, 1, 1, 0, 0]  # slices of `head` that show the lesion
LPS = np.diag([-1.0, -1.0, 4.0, 1.0])
TINY = (  # a network of a few thousand weights, on the CPU wherever the tests run; logging stays pytest's
    "--network_def#denoiser#channels=[8,8,8] --network_def#denoiser#num_head_channels=8 "
    "--network_def#classifier#channels=[8,8,8] --network_def#classifier#num_head_channels=8 "
    "--network_def#denoiser#norm_num_groups=4 --network_def#classifier#norm_num_groups=4 "  # 8 would cancel the label
    "--network_def#segmenter#features=[8,8,8,8,8,8] --network_def#segmenter#norm_num_groups=4 "
    "--image_size=32 --batch_size=4 --device=cpu --logging_file=False"
).split()
CDM = ["--method=cdm", "--num_steps=2"]
SHORT = ["--epoch_length=2", "--max_epochs=2", "--segmenter_epochs=2", "--segmenter_size=64"]


def config(bundle: str, name: str) -> str:
    return f"bundles/{bundle}/configs/{name}.yaml"


def monai_bundle(*arguments, cwd: Path = REPO) -> None:
    """`python -m monai.bundle *arguments` without the seconds that a new process takes to start."""
    argv, path = ["monai.bundle", *map(str, arguments)], list(sys.path)
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", path):
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def monai_bundle_process(*arguments, cwd: Path = REPO) -> subprocess.CompletedProcess:
    """`python -m monai.bundle *arguments` as a user types it; stdout and stderr come back together."""
    command = [sys.executable, "-m", "monai.bundle", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=cwd, env=environment, encoding="utf-8", timeout=300, **streams)


class Kill:
    """Handler that ends its own process by SIGKILL after an iteration: `tests.helpers.bundles.Kill` in a config."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        last = Events.ITERATION_COMPLETED(once=self.iteration)
        engine.add_event_handler(last, lambda: os.kill(os.getpid(), signal.SIGKILL))


def head(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A stripped head (48, 40, 6) float32 with a bright lesion in the slices of `TAGS`, and its mask uint8."""
    random = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    tissue = ((x - 24) / 18) ** 2 + ((y - 20) / 15) ** 2 < 1
    centre = random.integers((18, 14), (30, 26))
    lesion = (np.hypot(x - centre[0], y - centre[1]) < 5) & np.array(TAGS, bool)[z]
    texture = ndimage.gaussian_filter(random.normal(size=SHAPE), 2) * 100
    return (tissue * (100 + texture + 80 * lesion)).astype(np.float32), lesion.astype(np.uint8)


def save_nifti(array: np.ndarray, path: Path, affine: np.ndarray = LPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def zip_of(folder: Path) -> Path:
    """The zip beside a packed bundle's folder."""
    return folder.with_name(f"{folder.name.replace('-', '_v')}.zip")


def load(bundle: str, name: str) -> dict:
    """Content of one config of a bundle."""
    return ConfigParser.load_config_file(REPO / config(bundle, name))


def inference(bundle: str, data, out, trained, *more) -> list:
    """Arguments of CDM with a tiny network, on every slice: one of two epochs finds nothing, so no gate."""
    where = ["--dataset_dir", data, "--output_dir", out, "--ckpt_path", trained.weights, "--segmenter_size=32"]
    return ["run", "--config_file", config(bundle, "inference"), *where, *TINY, *CDM, "--gate=all", *more]


def failure(command: list) -> str:
    """What a failing command prints at its end: the error and its causes, whatever their types."""
    with pytest.raises(Exception) as error:  # noqa: B017
        monai_bundle(*command)
    return "".join(traceback.format_exception(error.value))


def state(path, key=None) -> dict[str, torch.Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded if key is None else loaded[key]


def targets(node) -> set[str]:
    """Every `_target_` (and what a SaveImaged writes with) below a config node."""
    if isinstance(node, dict):
        own = {node[key] for key in ("_target_", "writer") if isinstance(node.get(key), str)}
        return own.union(*map(targets, node.values()))
    return set().union(*map(targets, node)) if isinstance(node, list) else set()
