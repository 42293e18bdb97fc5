"""Checks that a bundle is its own: no name, DICOM code, text or weights of the one that it was made from are left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai.bundle import ConfigParser

from custom_modules.files import read_json, sha256

TODO = "TODO:"  # begins what `packing.new_bundle` leaves to be written


def check_identity(bundle: Path, others: Sequence[Path]) -> None:
    """Compares a bundle's folder with itself and with other bundles.

    Raises:
        ValueError: something is another's, or is not written yet; the message lists all, with the file to edit.
    """
    config, name = _config(bundle), _name(bundle)
    segment, problems = config["segment"], []
    if config["name"] != bundle.name:
        problems.append(f"bundle.yaml: name must be {bundle.name!r}, that of the folder; got {config['name']!r}")
    if name in map(_name, others):
        problems.append(f"configs/metadata.json: name {name!r} is another bundle's")
    if segment["type"] is None:
        problems.append("bundle.yaml: segment has no type, the code of the target")
    texts = ("configs/metadata.json", "docs/README.md", "docs/data_license.txt")
    problems += [f"{file}: {TODO} is left" for file in texts if TODO in (bundle / file).read_text(encoding="utf-8")]
    for other in others:
        theirs = _config(other)["segment"]
        if segment["type"] and segment["type"] == theirs["type"] and segment["label"] != theirs["label"]:
            problems.append(f"bundle.yaml: segment {segment['label']!r} has the type of {other.name}, {theirs['type']}")
        weights = [folder / "models" / "model.pt" for folder in (bundle, other)]
        if all(file.is_file() for file in weights) and sha256(weights[0]) == sha256(weights[1]):
            problems.append(f"models/model.pt: it is that of {other.name}; train the bundle's own (docs/new_target.md)")
    if found := [problem for problem in problems if problem]:
        raise ValueError("\n  ".join([f"{bundle} is not ready to be packed:", *found]))


def _config(bundle: Path) -> dict:
    return ConfigParser.load_config_file(bundle / "configs" / "inference.yaml")


def _name(bundle: Path) -> str:
    return read_json(bundle / "configs" / "metadata.json")["name"]
