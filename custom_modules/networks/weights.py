"""Weights on disk, and the list of the cases that they were trained on."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn

from custom_modules.files import is_whole, read_json_or_empty


def load_weights(
    network: nn.Module, path: str | Path | None, knob: str = "ckpt_path", remedy: str = "train first"
) -> nn.Module:
    """Loads a flat state dict (`model.pt`) into `network`, which stays as it is where `path` is None, and returns it.

    Errors name the `knob` that set `path`; for a missing file also the `remedy`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or not a state dict of this network.
    """
    if path is None:
        return network
    if not Path(path).is_file():
        raise FileNotFoundError(f"{knob} {str(path)!r} does not exist; {remedy}, or give --{knob} FILE.")
    if not is_whole(path):  # torch checks no checksum: one flipped bit would be another network
        raise ValueError(
            f"{knob} {str(path)!r} is damaged (cut short?) or no file of weights; copy it again, or {remedy}."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{knob} {str(path)!r} does not hold weights of this network_def: {error}") from error
    return network


def check_bundle(weights: str | Path | None, bundle_root: str | Path) -> None:
    """Checks that weights in the folder of a bundle are those of this bundle: the networks of two bundles may be alike.

    Raises:
        ValueError: they are in the folder of another one.
    """
    if weights is None:
        return
    roots = (Path(bundle_root), Path(weights).resolve().parent.parent)
    own, other = (read_json_or_empty(root / "configs" / "metadata.json").get("name") for root in roots)
    if own and other and own != other:
        raise ValueError(f"the weights {str(weights)!r} are of the bundle {other!r}; this is {own!r}. Run that one.")


def training_list(weights: str | Path) -> Path:
    """Returns the file beside `weights` that names the cases they were trained on, one a line."""
    return Path(weights).with_suffix(".training.txt")


def training_cases(weights: str | Path | None) -> list[str] | None:
    """Returns the cases that `weights` were trained on, or None if that was not recorded or there are no weights."""
    path = training_list(weights) if weights else None
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path and path.is_file() else None
