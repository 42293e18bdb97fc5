"""A study: trains the folds, evaluates every run in every repeat, and writes tables, figures and a report of them.

    OUT/cells/<run>/<repeat>/   the evaluation's output, and cell.json once it has succeeded
    OUT/models/<repeat>/        weights and checkpoints of a fold
    OUT/study.json              what all cells share
    OUT/results.csv, results.json, results.md, report.html, and the figures for which there are volumes

One datalist is evaluated with the weights at hand and repeated over the noise seeds. Several datalists are the folds of
a cross-validation: every fold trains its own weights first and is one repeat. What exists is not done again: an
interrupted study continues; a failed run is reported, and the others are finished.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch.utils.data import Dataset

from custom_modules import __version__
from custom_modules.files import read_json, read_json_or_empty, sha256, write_json
from custom_modules.inference.cases import reason
from custom_modules.inference.provenance import VERSIONS, hardware
from custom_modules.knobs import find_knob
from study.figures.comparison import draw_comparison
from study.figures.pictures import NothingToDraw, save
from study.figures.sweeps import draw_ablation, draw_strips
from study.plan import Plan
from study.report import write_report
from study.results import read_results
from study.tables import write_tables
from study.volumes import case_folders

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


class Study:
    """The cells of a study, run x repeat, each evaluated once; see the top of this file.

    Args:
        plan: its runs.
        output_dir: OUT.
        dataset_dir: folder that the datalists' paths start from.
        datalists: one, or one a fold.
        knobs: {knob: value} for every run.
        only: names of the runs to do; None: all. The tables show all that exist.
        models_dir: where the folds' weights are, or will be; None: `OUT/models`.

    Raises:
        ValueError: there is no such run, a knob would replace a fold's weights, or OUT holds a study of another bundle,
            on other data or with other knobs.
    """

    def __init__(
        self,
        plan: Plan,
        output_dir: Path,
        dataset_dir: str,
        datalists: Sequence[str],
        knobs: Mapping[str, Any],
        only: Sequence[str] | None = None,
        models_dir: Path | None = None,
    ) -> None:
        if unknown := sorted(set(only or []) - set(plan.runs)):
            raise ValueError(f"--runs: there is no {unknown}; the study has {list(plan.runs)}.")
        self.plan, self.output_dir, self.dataset_dir = plan, Path(output_dir), dataset_dir
        self.knobs, self.folded = dict(knobs), len(datalists) > 1
        self.runs = [name for name in plan.runs if only is None or name in only]
        self.config = ConfigParser.load_config_files(plan.config_file)
        if self.folded:
            self.repeats = {f"fold{k}": {"datalist": datalist} for k, datalist in enumerate(datalists)}
        else:
            self.repeats = {f"seed{seed}": {"datalist": datalists[0], "seed": seed} for seed in plan.seeds}
        if self.folded and (clash := sorted(set(knobs) & set(plan.training))):
            raise ValueError(f"several datalists are folds, and each trains its own weights; leave out {clash}.")
        self.models_dir = self.output_dir / "models" if models_dir is None else Path(models_dir)
        self._claim()
        self.prepared: dict[tuple[str, int], dict[str, Any]] = {}
        self.weights: dict[str, dict[str, str]] = defaultdict(dict)
        self.failures: dict[str, str] = {}

    def _claim(self) -> None:
        """Note in `study.json` what is the same for all cells: one table must not mix bundles, data or settings."""
        mine = {"bundle": self.plan.bundle.name, "dataset_dir": self.dataset_dir, "repeats": self.repeats}
        mine |= {"base": self.plan.base, "knobs": self.knobs}
        path, mine = self.output_dir / "study.json", json.loads(json.dumps(mine))
        if path.is_file() and (found := read_json(path)) != mine:
            differing = [key for key in mine if found.get(key) != mine[key]]
            raise ValueError(f"{self.output_dir} holds a study with other {differing}; give another --output_dir.")
        write_json(path, mine)

    def run(self) -> None:
        """Train the folds, evaluate every cell that does not exist yet, write tables, figures and report.

        Raises:
            RuntimeError: at the end, if runs failed.
        """
        for repeat in self.repeats:
            try:
                self._train(repeat)
            except subprocess.CalledProcessError as error:
                self.failures[f"training, {repeat}"] = f"exit status {error.returncode}, see above"
                continue
            for name in self.runs:
                try:
                    self._evaluate(name, repeat)
                except Exception as error:  # whatever a run may raise, the others are worth having
                    logger.exception("%s, %s failed", name, repeat)
                    self.failures[f"{name}, {repeat}"] = reason(error)
        write_tables(self.output_dir, self.plan.runs, list(self.repeats), self.plan.min_areas)
        if any(self.output_dir.glob("cells/*/*/cell.json")):
            for path in (*draw_study(self.output_dir), write_report(self.output_dir)):
                print(path, flush=True)
        if self.failures:
            listed = "\n".join(f"  {cell}: {why}" for cell, why in self.failures.items())
            raise RuntimeError(f"{len(self.failures)} runs failed; the same command tries them again:\n{listed}")

    def _train(self, repeat: str) -> None:
        """Train the fold's weights, or finish their training, a process each, and point the knobs to them."""
        for knob, training in self.plan.training.items() if self.folded else ():
            folder = self.models_dir / repeat / knob
            if set(training.get("runs", self.runs)) & set(self.runs):
                self._train_knob(training, folder, repeat)
                self.weights[repeat][knob] = str(folder / training["weights"])

    def _train_knob(self, training: Mapping, folder: Path, repeat: str) -> None:
        run, config = training.get("run", "training"), ConfigParser.load_config_files(training["config_file"])
        given = {"dataset_dir": self.dataset_dir, "datalist": self.repeats[repeat]["datalist"]}
        given |= {"output_dir": str(folder), "ckpt_dir": str(folder)}
        given |= training.get("knobs", {}) | self._known_to(config)
        print(f"\n==== {repeat}: {run} in {folder}", flush=True)
        words = bundle_command(run, training["config_file"], given)
        subprocess.run([sys.executable, *words[1:]], check=True)

    def _known_to(self, config: Mapping) -> dict[str, Any]:
        return {knob: value for knob, value in self.knobs.items() if find_knob(knob, config) is None}

    def _evaluate(self, name: str, repeat: str) -> None:
        """Evaluate one run in one repeat, unless its results exist already."""
        folder = self.output_dir / "cells" / name / repeat
        given = {"dataset_dir": self.dataset_dir} | self.repeats[repeat] | self.plan.base | self.weights[repeat]
        given |= self._known_to(self.config) | self.plan.runs[name]
        placed = given | {"output_dir": str(folder)}  # not in `given`: a folder that was moved holds the same results
        parser = self._parser(placed)
        further = not self.folded and repeat != next(iter(self.repeats))  # seeds after the first
        if further:  # numbers, but no second set of volumes
            steps = parser.get("postprocessing#transforms")
            parser["postprocessing#transforms"] = [step for step in steps if step.get("_target_") != "SaveImaged"]
        settings = json.loads(json.dumps(parser.get_parsed_content("settings")))
        cell = {"given": given, "settings": settings, "custom_modules": __version__}
        cell |= {"weights_sha256": sha256(parser.get_parsed_content("weights"))}
        cell |= {"datalist_sha256": sha256(given["datalist"])}
        record = folder / "cell.json"
        if read_json_or_empty(record).items() >= cell.items():
            return
        evaluator = parser.get_parsed_content("evaluator")
        if further and not hasattr(evaluator.inferer.method, "seed"):
            return  # it draws no noise: another seed gives the same
        print(f"\n==== {name}, {repeat}", flush=True)
        record.unlink(missing_ok=True)
        evaluator.run()
        self._remove_volumes(folder)
        write_json(record, cell | self._circumstances(parser, placed))

    def _parser(self, given: Mapping[str, Any]) -> ConfigParser:
        """Read the configs and set what is given; runs on the same datalist and size of slices share their volumes."""
        parser = ConfigParser()
        parser.read_config(self.plan.config_file)
        parser.update({"bundle_root": str(self.plan.bundle), **given})
        parser.update({"num_workers": 0, "overwrite": True})  # a worker's cache would end with it; a cell is done whole
        parser.update({"report": False})  # the study has one of its own
        key = given["datalist"], parser.get_parsed_content("slice_size")
        if key not in self.prepared:
            dataset = PreparedCases(parser.get_parsed_content("dataset"))
            self.prepared = {key: {"dataset": dataset, "preprocessing": parser.get_parsed_content("preprocessing")}}
        parser.update(self.prepared[key])  # both: the transforms that prepared a volume bring it back
        return parser

    def _circumstances(self, parser: ConfigParser, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what does not decide whether a cell has to be evaluated again, but how its results came to be."""
        return {
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(bundle_command(None, self.plan.config_file, given)),
            "bundle": self.plan.bundle.name,
            "section": parser.get("section"),
            "versions": VERSIONS,
            "hardware": hardware(torch.device(parser.get_parsed_content("device"))),
        }

    def _remove_volumes(self, folder: Path) -> None:
        """Remove the volumes of all cases but the first `keep` of the plan."""
        if self.plan.keep is not None:
            for case in case_folders(folder)[self.plan.keep :]:
                for volume in case.glob("*.nii.gz"):
                    volume.unlink()


def bundle_command(run_id: str | None, config_file: Sequence[str], knobs: Mapping[str, Any]) -> list[str]:
    """Return the words of `python -m monai.bundle run ...`."""
    words = ["python", "-m", "monai.bundle", "run", *([run_id] if run_id else []), "--config_file", str(config_file)]
    return words + [word for knob, value in knobs.items() for word in (f"--{knob}", str(value))]


def draw_study(output_dir: str | Path) -> list[Path]:
    """Write every figure that a study's folder has the runs and the volumes for, into that folder.

    Returns:
        The files: `comparison.png` where methods were compared, `ablation.png` and `strips.png` where settings were.
    """
    results, written = read_results(output_dir), []
    for name, draw in (("comparison", draw_comparison), ("ablation", draw_ablation), ("strips", draw_strips)):
        try:
            written.append(save(draw(results), results.folder / f"{name}.png"))
        except NothingToDraw:  # not this kind of study, or the volumes no longer exist
            continue
    return written
