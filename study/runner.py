"""A study: many evaluations under one protocol, and one table of them all.

    python -m study.runner CONFIGS/benchmark.yaml --dataset_dir DIR --datalist LIST --output_dir OUT
    python -m study.runner CONFIGS/ablation.yaml  --dataset_dir DIR --datalist LIST --output_dir OUT

A study's YAML names runs, each a set of knobs over `inference.yaml` and `evaluate.yaml`. One datalist is evaluated with
the weights at hand and repeated over the noise seeds. Several datalists are the folds of a cross-validation: every fold
trains its own weights first and is one repeat. Any other `--knob value` goes to every config that knows it.

    OUT/cells/<run>/<repeat>/   the evaluation's output, and cell.json once it went well
    OUT/models/<repeat>/        weights and checkpoints of a fold
    OUT/study.json              what all cells share
    OUT/results.csv, results.json, results.md, report.html, and the pictures for which there are volumes

What is there already is not done again: an interrupted study continues, a failed run is reported and the others are
finished. A volume is read and prepared once for all runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from torch.utils.data import Dataset

from custom_modules import __version__
from custom_modules.files import sha256, write_json
from custom_modules.inference.cases import reason
from custom_modules.inference.provenance import VERSIONS
from custom_modules.knobs import find_knob
from study.figures import draw_study
from study.report import write_report
from study.tables import write_tables

SHARED = (
    *("dataset_dir", "datalist", "section", "image_size", "segmenter_size", "slice_axis", "orientation"),
    "target_labels",
)
logger = logging.getLogger(__name__)


class PreparedCases(Dataset):
    """The items of `dataset`, each prepared once and kept in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.data, self.items = dataset, dataset.data, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        if index not in self.items:
            self.items[index] = self.dataset[index]
        return deepcopy(self.items[index])  # what follows inverts transforms in place


def read_study(path: str | Path) -> dict:
    """A study's YAML with its sweeps turned into runs and the paths of its configs made absolute.

    Returns:
        {"config_file": [...], "base": {knob: value} of all runs, "runs": {name: {knob: value}}, "sweeps": {knob:
        [values]}, "seeds": [...], "min_areas": [...], "keep": number of cases whose volumes are kept (None: all),
        "training": {knob that takes the weights: {"config_file": [...], "weights": file name, "runs": that need it
        (absent: all), "run": id to run (absent: training), "knobs": {knob: value}, "after": one more such stage}}}.

    Raises:
        ValueError: if it holds no run, or a run sets what all runs share.
    """
    path = Path(path)
    study = {"runs": {}, "sweeps": {}, "seeds": [0], "min_areas": [0], "training": {}, "base": {}, "keep": None}
    study |= yaml.safe_load(path.read_text(encoding="utf-8"))
    folder = path.resolve().parent
    for holder in (study, *stages(study)):
        holder["config_file"] = [str(folder / name) for name in holder["config_file"]]
    for knob, values in study["sweeps"].items():
        study["runs"] |= {f"{knob}={value}": {knob: value} for value in values}
    if not study["runs"]:
        raise ValueError(f"{path} names no runs and no sweeps.")
    for name, knobs in study["runs"].items():
        if clash := sorted(set(knobs) & set(SHARED)):
            raise ValueError(f"run {name!r} of {path} sets {clash}, which all runs of a study share.")
    return study


def stages(study: Mapping) -> list[dict]:
    """All stages of a study's trainings, in order."""
    return [stage for first in study["training"].values() for stage in (first, first.get("after")) if stage]


class Study:
    """The cells of a study, run x repeat, each evaluated once; see the top of this file.

    Args:
        study: of `read_study`.
        output_dir: OUT.
        dataset_dir: folder that the datalists' paths start from.
        datalists: one, or one a fold.
        knobs: {knob: value} for every run.
        only: names of the runs to do; None: all. The tables show all that are there.
        models_dir: where the folds' weights are, or come to be; None: `OUT/models`.

    Raises:
        ValueError: if OUT holds a study on other data or with other knobs, or a knob would replace a fold's weights.
    """

    def __init__(
        self,
        study: Mapping,
        output_dir: Path,
        dataset_dir: str,
        datalists: Sequence[str],
        knobs: Mapping[str, Any],
        only: Sequence[str] | None = None,
        models_dir: Path | None = None,
    ) -> None:
        self.study, self.output_dir, self.dataset_dir = study, Path(output_dir), dataset_dir
        self.knobs, self.folded = dict(knobs), len(datalists) > 1
        self.runs = {name: given for name, given in study["runs"].items() if only is None or name in only}
        self.config = ConfigParser.load_config_files(study["config_file"])
        if self.folded:
            self.repeats = {f"fold{k}": {"datalist": datalist} for k, datalist in enumerate(datalists)}
        else:
            self.repeats = {f"seed{seed}": {"datalist": datalists[0], "seed": seed} for seed in study["seeds"]}
        if self.folded and (clash := sorted(set(knobs) & set(study["training"]))):
            raise ValueError(f"several datalists are folds, and each trains its own weights; leave out {clash}.")
        self.models_dir = self.output_dir / "models" if models_dir is None else Path(models_dir)
        self._claim()
        self.shared: dict[tuple[str, int], dict[str, Any]] = {}
        self.weights: dict[tuple[str, str], str] = {}
        self.failures: dict[str, str] = {}

    def _claim(self) -> None:
        """Notes in `study.json` what is the same for all cells: one table must not mix data or settings."""
        mine = {
            "dataset_dir": self.dataset_dir,
            "repeats": self.repeats,
            "base": self.study["base"],
            "knobs": self.knobs,
        }
        path, mine = self.output_dir / "study.json", json.loads(json.dumps(mine))
        if path.is_file() and (there := json.loads(path.read_text(encoding="utf-8"))) != mine:
            differing = [key for key in mine if there.get(key) != mine[key]]
            raise ValueError(f"{self.output_dir} holds a study with other {differing}; give another --output_dir.")
        write_json(path, mine)

    def run(self) -> None:
        """Trains where there are folds, evaluates every cell that is not there yet, writes tables, pictures, report.

        Raises:
            RuntimeError: at the end, if runs failed.
        """
        for repeat in self.repeats:
            try:
                self._train(repeat)
            except subprocess.CalledProcessError as error:
                self.failures[f"training, {repeat}"] = f"exit status {error.returncode}, see above"
                continue
            for name, knobs in self.runs.items():
                try:
                    self._cell(name, repeat, knobs)
                except Exception as error:  # whatever a run may raise, the others are worth having
                    logger.exception("%s, %s failed", name, repeat)
                    self.failures[f"{name}, {repeat}"] = reason(error)
        write_tables(self.output_dir, self.study, self.repeats)
        if any(self.output_dir.glob("cells/*/*/cell.json")):
            for path in (*draw_study(self.output_dir), write_report(self.output_dir)):
                print(path, flush=True)
        if self.failures:
            listed = "\n".join(f"  {cell}: {why}" for cell, why in self.failures.items())
            raise RuntimeError(f"{len(self.failures)} runs failed; the same command tries them again:\n{listed}")

    def _train(self, repeat: str) -> None:
        """Trains the fold's weights, or finishes their training, in a process each, and points the knobs to them."""
        for knob, training in self.study["training"].items() if self.folded else ():
            folder = self.models_dir / repeat / knob
            for stage in (training, training.get("after", {"runs": []})):
                if set(stage.get("runs", self.runs)) & set(self.runs):
                    self._stage(stage, folder, repeat)
                    self.weights[repeat, knob] = str(folder / training["weights"])

    def _stage(self, stage: Mapping, folder: Path, repeat: str) -> None:
        run, config = stage.get("run", "training"), ConfigParser.load_config_files(stage["config_file"])
        given = {"dataset_dir": self.dataset_dir, "datalist": self.repeats[repeat]["datalist"]}
        given |= {"output_dir": str(folder), "ckpt_dir": str(folder), **stage.get("knobs", {})}
        given |= {name: value for name, value in self.knobs.items() if find_knob(name, config) is None}
        print(f"\n==== {repeat}: {run} in {folder}", flush=True)
        words = bundle_command(run, stage["config_file"], given)
        subprocess.run([sys.executable, *words[1:]], check=True)

    def _cell(self, name: str, repeat: str, knobs: Mapping[str, Any]) -> None:
        """Evaluates one run in one repeat, unless it stands there already."""
        folder = self.output_dir / "cells" / name / repeat
        further = not self.folded and repeat != next(iter(self.repeats))  # seeds after the first
        given = {"dataset_dir": self.dataset_dir} | self.repeats[repeat] | self.study["base"]
        given |= {knob: path for (trained, knob), path in self.weights.items() if trained == repeat}
        given |= {k: v for k, v in self.knobs.items() if find_knob(k, self.config) is None} | dict(knobs)
        placed = given | {"output_dir": str(folder)}  # a folder that was moved holds the same results
        parser = self._parser(placed)
        if further:  # numbers, but no second set of volumes
            steps = parser.get("postprocessing#transforms")
            parser["postprocessing#transforms"] = [step for step in steps if step.get("_target_") != "SaveImaged"]
        settings = json.loads(json.dumps(parser.get_parsed_content("settings")))
        cell = {"given": given, "settings": settings, "custom_modules": __version__}
        cell |= {"weights_sha256": sha256(parser.get_parsed_content("weights"))}
        cell |= {"datalist_sha256": sha256(given["datalist"])}
        record = folder / "cell.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")).items() >= cell.items():
            return
        evaluator = parser.get_parsed_content("evaluator")
        if further and not hasattr(evaluator.inferer.method, "seed"):
            return  # it draws no noise: another seed gives the same
        print(f"\n==== {name}, {repeat}", flush=True)
        record.unlink(missing_ok=True)
        evaluator.run()
        self._prune(folder)
        facts = {
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(bundle_command(None, self.study["config_file"], placed)),
            "bundle": Path(parser.get("bundle_root")).name,
            "section": parser.get("section"),
            "versions": VERSIONS,
            "hardware": hardware(torch.device(parser.get_parsed_content("device"))),
        }
        write_json(record, cell | facts)

    def _parser(self, given: Mapping[str, Any]) -> ConfigParser:
        """The configs with what is given, their prepared volumes shared with every run on the same datalist at the same
        size of slices."""
        parser = ConfigParser()
        parser.read_config(self.study["config_file"])
        bundle_root = str(Path(self.study["config_file"][0]).parent.parent)
        parser.update({"bundle_root": bundle_root, **given})
        parser.update({"num_workers": 0, "overwrite": True})  # a worker's cache would end with it; a cell is done whole
        key = given["datalist"], parser.get_parsed_content("slice_size")
        if key not in self.shared:
            dataset = PreparedCases(parser.get_parsed_content("dataset"))
            self.shared = {key: {"dataset": dataset, "preprocessing": parser.get_parsed_content("preprocessing")}}
        parser.update(self.shared[key])  # both: a volume is brought back by the very transforms that prepared it
        return parser

    def _prune(self, folder: Path) -> None:
        """Removes the volumes of all cases but the first `keep` of the study."""
        if self.study["keep"] is not None:
            for case in sorted(path.parent for path in folder.glob("*/*_provenance.json"))[self.study["keep"] :]:
                for volume in case.glob("*.nii.gz"):
                    volume.unlink()


def bundle_command(run_id: str | None, config_file: Sequence[str], knobs: Mapping[str, Any]) -> list[str]:
    """The words of `python -m monai.bundle run ...`."""
    words = ["python", "-m", "monai.bundle", "run", *([run_id] if run_id else []), "--config_file", str(config_file)]
    return words + [word for knob, value in knobs.items() for word in (f"--{knob}", str(value))]


def hardware(device: torch.device) -> str:
    """The processor that does the work, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Evaluate many methods or settings under one protocol.",
        epilog="Any other --knob value goes to every config that knows it; it comes after the study.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, help="benchmark.yaml or ablation.yaml of a bundle")
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--datalist", required=True, nargs="+", help="one; or one for each fold, which is then trained")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--runs", nargs="+", help="names of the runs to do; all without it")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the noise; those of the study without it")
    parser.add_argument("--models_dir", type=Path, help="weights of folds, from another study's OUT/models")
    options, rest = parser.parse_known_args(argv)
    try:
        _conduct(options, rest)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None


def _conduct(options: argparse.Namespace, rest: Sequence[str]) -> None:
    study = read_study(options.study)
    study["seeds"] = options.seeds or study["seeds"]
    if unknown := sorted(set(options.runs or []) - set(study["runs"])):
        raise SystemExit(f"--runs: {options.study} has no {unknown}; it has {list(study['runs'])}.")
    knobs, folder = read_knobs(rest, study), options.output_dir
    Study(study, folder, options.dataset_dir, options.datalist, knobs, options.runs, options.models_dir).run()


def read_knobs(words: Sequence[str], study: Mapping) -> dict[str, Any]:
    """`--knob value` pairs, each known to at least one config of the study.

    Raises:
        SystemExit: if a word is not a pair's, or no config has the knob.
    """
    configs = [ConfigParser.load_config_files(c["config_file"]) for c in (study, *stages(study))]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    knobs = {}
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise SystemExit(f"expected pairs of --knob value; got {' '.join(words)}.")
    for name, value in zip(words[::2], words[1::2]):
        problems = [find_knob(name[2:], config) for config in configs]
        if all(problems):
            raise SystemExit(problems[0])
        knobs[name[2:]] = yaml.safe_load(value)
    return knobs


if __name__ == "__main__":
    main()
