"""A study's YAML: which runs it has, what they share, and how the weights of a fold are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from custom_modules.knobs import find_knob

SHARED = (
    *("dataset_dir", "datalist", "section", "image_size", "segmenter_size", "slice_axis", "orientation"),
    "target_labels",
)


@dataclass(frozen=True)
class Plan:
    """What a study evaluates.

    Args:
        bundle: its folder.
        config_file: paths of the configs of an evaluation.
        runs: {name: {knob: value}}.
        base: {knob: value} of all runs.
        seeds: of the noise.
        min_areas: smallest targets that count, as fractions of the slice, in [0, 1); a table each.
        keep: number of cases whose volumes are kept; None: all.
        training: {knob that takes the weights: {"config_file": [...], "weights": file name, "runs": that need it
            (absent: all), "run": id to run (absent: training), "knobs": {knob: value}}}.

    Raises:
        ValueError: it has no run, a run sets what all runs share, or a smallest target is out of range.
    """

    bundle: Path
    config_file: Sequence[str]
    runs: Mapping[str, Mapping[str, Any]]
    base: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    min_areas: Sequence[float] = (0,)
    keep: int | None = None
    training: Mapping[str, Mapping] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("a study must have runs or sweeps; got none.")
        for name, knobs in self.runs.items():
            if clash := sorted(set(knobs) & set(SHARED)):
                raise ValueError(f"run {name!r} sets {clash}, which all runs of a study share.")
        if not all(0 <= area < 1 for area in self.min_areas):
            raise ValueError(f"min_areas must be fractions of the slice in [0, 1); got {list(self.min_areas)}.")

    def all_configs(self) -> list[Sequence[str]]:
        """Return the config files of the evaluation, then of every training."""
        return [self.config_file, *(training["config_file"] for training in self.training.values())]


def read_plan(path: str | Path, bundle: str | Path) -> Plan:
    """Read a study's YAML: the fields of `Plan`, and `sweeps`, {knob: [values]}, each value a run of its own.

    Args:
        path: the YAML.
        bundle: the bundle to evaluate; names in `config_file` are looked up in its `configs`.

    Raises:
        ValueError: an entry is unknown, the bundle lacks a config, or as for `Plan`.
    """
    path, bundle = Path(path), Path(bundle).resolve()
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    sweeps = content.pop("sweeps", {})
    content["runs"] = content.get("runs", {}) | {f"{k}={v}": {k: v} for k, values in sweeps.items() for v in values}
    known = [entry.name for entry in fields(Plan) if entry.name != "bundle"]
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{path} may have {', '.join([*known, 'sweeps'])}; got {', '.join(unknown)}.")
    for holder in (content, *content.get("training", {}).values()):
        holder["config_file"] = [str(bundle / "configs" / name) for name in holder["config_file"]]
        if missing := [file for file in holder["config_file"] if not Path(file).is_file()]:
            raise ValueError(f"{path} needs {', '.join(missing)}, which does not exist: is --bundle right?")
    try:
        return Plan(bundle, **content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_knobs(words: Sequence[str], config_files: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Read `--knob value` pairs, each known to at least one of the configs.

    Raises:
        ValueError: the words are no pairs, or no config has the knob.
    """
    configs = [ConfigParser.load_config_files(files) for files in config_files]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    knobs = {}
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ValueError(f"expected pairs of --knob value; got {' '.join(words)}.")
    for name, value in zip(words[::2], words[1::2]):
        problems = [find_knob(name[2:], config) for config in configs]
        if all(problems):
            raise ValueError(problems[0])
        knobs[name[2:]] = yaml.safe_load(value)
    return knobs
