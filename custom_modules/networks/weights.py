"""Weights on disk, and the list of the cases that they were trained on."""

from __future__ import annotations

import logging
import pickle
import shlex
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from custom_modules.files import atomic_path, is_whole, read_json_or_empty

logger = logging.getLogger(__name__)


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


def write_mark(weights: str | Path | BinaryIO, bundle_root: str | Path) -> None:
    """Writes the name of a bundle into a new file of weights, where any copy of the file keeps it.

    The file is a ZIP archive, and the name is the archive's comment: the tensors stay as they are, and every version
    loads them.
    """
    if name := _bundle_name(bundle_root):
        with zipfile.ZipFile(weights, "a") as archive:
            archive.comment = name.encode()


def mark_weights(path: str | Path, bundle_root: str | Path) -> None:
    """Writes the name of a bundle into weights of before.

    Raises:
        ValueError: the file is damaged or holds no weights.
    """
    if not is_whole(path):
        raise ValueError(f"{str(path)!r} is damaged or no file of weights; it was not marked.")
    with atomic_path(path) as aside:
        shutil.copyfile(path, aside)
        write_mark(aside, bundle_root)


def check_bundle(weights: Sequence[str | Path | None], bundle_root: str | Path) -> None:
    """Checks that files of weights are of this bundle, by their mark or else the folder that they are in: the networks
    of two bundles may be alike. Where neither says it, that is logged.

    Raises:
        ValueError: they are of another one.
    """
    own = _bundle_name(bundle_root)
    for path in dict.fromkeys(map(str, filter(None, weights))) if own else ():
        mark = _mark(path)
        name = mark or _bundle_name(Path(path).resolve().parent.parent)
        if name and name != own:
            raise ValueError(f"the weights {path!r} are of the bundle {name!r}; this is {own!r}. Run that one.")
        if not name and mark is not None:
            code = f"from {__name__} import mark_weights; mark_weights({path!r}, {str(bundle_root)!r})"
            logger.warning(
                "%s does not say which bundle it is of (made before 0.7.0, or saved anew); with weights of another"
                " than %r the masks are wrong. If it is of this one, mark it: python -c %s",
                path, own, shlex.quote(code),
            )  # fmt: skip


def _bundle_name(root: str | Path) -> str | None:
    return read_json_or_empty(Path(root) / "configs" / "metadata.json").get("name")


def _mark(path: str | Path) -> str | None:
    """Reads the name in a file of weights, empty if it has none; None if it is no such file, as `load_weights` says."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace")
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def training_list(weights: str | Path) -> Path:
    """Returns the file beside `weights` that names the cases they were trained on, one a line."""
    return Path(weights).with_suffix(".training.txt")


def training_cases(weights: str | Path | None) -> list[str] | None:
    """Returns the cases that `weights` were trained on, or None if that was not recorded or there are no weights."""
    path = training_list(weights) if weights else None
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path and path.is_file() else None
