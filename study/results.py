"""A results folder as figures and reports see it: its runs, with their measurements, settings and kept volumes.

Three kinds are told apart by what they hold: a study (`results.json`; many runs), the output of one evaluation
(`metrics/`; one run), or of an inference alone (results of cases, no measurements).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from custom_modules.files import read_json
from study.tables import read_rows
from study.volumes import Case, case_folders, read_case, read_facts, volume_file

REFERENCES = {"intensity": "floor: no network", "supervised": "upper bound: trained on masks"}  # not label-only
KINDS = "neither results.json (a study), metrics/summary.json (an evaluation) nor results of cases (an inference)"


@dataclass(frozen=True)
class Run:
    """One method or setting over all its repeats.

    Args:
        name: its name in the study.
        folders: of its repeats, each the output of an evaluation or inference.
        facts: of the first repeat's `cell.json`; empty outside a study.
        summary: of the first repeat's `summary.json`; empty for an inference.
        slices: rows of every repeat's `per_slice.csv`, as dicts with `repeat`.
        volumes: the same of `per_volume.csv`.
    """

    name: str
    folders: tuple[Path, ...]
    facts: Mapping = field(default_factory=dict)
    summary: Mapping = field(default_factory=dict)
    slices: tuple[dict, ...] = ()
    volumes: tuple[dict, ...] = ()

    @property
    def settings(self) -> dict:
        """The recorded knobs, {knob: value}."""
        return {**self.summary.get("settings", {}), **self.facts.get("settings", {})}

    @property
    def method(self) -> str:
        """Value of the knob `method`."""
        return str(self.settings.get("method", self.name))

    def dice(self, group: str | None = None) -> dict[str, float]:
        """Return the Dice of each case, mean over its positive slices and the repeats; of one group, or of all."""
        values = defaultdict(list)
        for row in self.slices:
            if group is None or row["group"] == group:
                values[row["case"]].append(float(row["dice"]))
        return {case: fmean(dice) for case, dice in values.items()}

    def largest_slice(self, case: str) -> int:
        """Return the index of the case's slice with the largest target."""
        return int(max((row for row in self.slices if row["case"] == case), key=lambda r: float(r["area"]))["slice"])

    def slice_dice(self, case: str, index: int, repeat: int = 0) -> float | None:
        """Return the Dice of one slice in one repeat; None where it was not measured."""
        wanted = (case, index, repeat)
        found = (row for row in self.slices if (row["case"], int(row["slice"]), row["repeat"]) == wanted)
        return next((float(row["dice"]) for row in found), None)

    @cached_property
    def kept(self) -> dict[str, tuple[int, Path]]:
        """{case: (first repeat that kept its volumes, their folder)} of the cases whose image still exists."""
        kept: dict[str, tuple[int, Path]] = {}
        for repeat, output_dir in enumerate(self.folders):
            for folder in case_folders(output_dir):
                facts = read_facts(folder)
                needed = (volume_file(folder, "saliency"), volume_file(folder, "mask"), Path(facts["image"]))
                if all(path.exists() for path in needed):
                    kept.setdefault(facts["case"], (repeat, folder))
        return kept

    def read(self, case: str) -> tuple[int, Case] | None:
        """Read a case's volumes; returns the repeat they are from, and the volumes, or None where none were kept."""
        if case not in self.kept:
            return None
        repeat, folder = self.kept[case]
        return repeat, read_case(folder, self.settings.get("target_labels"), self.settings.get("slice_axis"))


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Args:
        folder: the folder.
        kind: `study`, `evaluation` or `inference`.
        bundle: name of the bundle; "" where it is not recorded.
        runs: in the study's order.
        table: one summary (see `metrics.summarise`, with run, group, min_area and repeats) for each run, smallest area
            and group of cases.
    """

    folder: Path
    kind: str
    bundle: str
    runs: tuple[Run, ...]
    table: tuple[dict, ...]

    @property
    def groups(self) -> list[str]:
        """Names of the groups of cases."""
        return sorted({row["group"] for row in self.table})

    @property
    def sweeps(self) -> dict[str, list[tuple[object, Run]]]:
        """{knob: [(value, run), ...]} of the runs named `knob=value` after a setting."""
        sweeps = defaultdict(list)
        for run in self.runs:
            knob, equals, text = run.name.partition("=")
            if equals:
                sweeps[knob].append((run.settings.get(knob, text), run))
        return dict(sweeps)

    @property
    def compared(self) -> list[Run]:
        """The runs that represent a method: all but those of sweeps."""
        return [run for run in self.runs if "=" not in run.name]

    def default_of(self, knob: str) -> object:
        """Return the value that a knob has where another one is swept; None where no run tells."""
        others = [run for run in self.runs if not run.name.startswith(f"{knob}=") and knob in run.settings]
        others.sort(key=lambda run: "=" not in run.name)  # a method that is compared may have a setting of its own
        return others[0].settings[knob] if others else None

    def best(self, group: str) -> Run | None:
        """Return the label-only run with the highest Dice in a group, sweeps apart; None where there is none."""
        candidates = {run.name: run for run in self.compared if run.method not in REFERENCES}
        rows = [r for r in self.rows(group) if r["run"] in candidates and r["dice"]["mean"] is not None]
        return candidates[max(rows, key=lambda r: r["dice"]["mean"])["run"]] if rows else None

    def rows(self, group: str, min_area: float | None = None) -> list[dict]:
        """Return the table's rows of a group and smallest area (by default the least of them)."""
        if min_area is None:
            min_area = min(row["min_area"] for row in self.table)
        return [row for row in self.table if row["group"] == group and row["min_area"] == min_area]


def read_results(folder: str | Path) -> Results:
    """Read a results folder.

    Raises:
        FileNotFoundError: it holds no results.
    """
    folder = Path(folder)
    if (folder / "results.json").is_file():
        table = tuple(read_json(folder / "results.json")["results"])
        runs = tuple(_study_run(folder / "cells" / name, name) for name in dict.fromkeys(row["run"] for row in table))
        kind = "study"
    elif (folder / "metrics" / "summary.json").is_file():
        summary = read_json(folder / "metrics" / "summary.json")
        runs = (Run(summary["method"] or "method", (folder,), {}, summary, *_measurements([folder])),)
        table, kind = tuple(_by_group(summary, runs[0])), "evaluation"
    elif cases := case_folders(folder):
        settings = read_facts(cases[0]).get("settings", {})
        runs = (Run(str(settings.get("method", "method")), (folder,), {"settings": settings}),)
        table, kind = (), "inference"
    else:
        raise FileNotFoundError(f"{folder} holds {KINDS}.")
    bundle = next((run.summary["bundle"] for run in runs if run.summary.get("bundle")), "")
    return Results(folder, kind, bundle, runs, table)


def _study_run(folder: Path, name: str) -> Run:
    repeats = sorted(path.parent for path in folder.glob("*/cell.json"))
    summary = repeats[0] / "metrics" / "summary.json" if repeats else folder / "metrics"
    facts = read_json(repeats[0] / "cell.json") if repeats else {}
    return Run(name, tuple(repeats), facts, read_json(summary) if summary.is_file() else {}, *_measurements(repeats))


def _by_group(summary: Mapping, run: Run) -> Iterable[dict]:
    """Yield the summary of an evaluation as the rows of a study's table."""
    context = {"run": run.name, "min_area": summary["settings"].get("min_area", 0), "repeats": 1}
    for name in sorted({row["group"] for row in run.volumes}):
        yield {**summary, **summary.get("groups", {}).get(name or "none", {}), **context, "group": name}


def _measurements(repeats: Iterable[Path]) -> list[tuple[dict, ...]]:
    """Read the rows of `per_slice.csv` and of `per_volume.csv` of all repeats, where there are any."""
    tables: list[tuple[dict, ...]] = []
    for name in ("per_slice.csv", "per_volume.csv"):
        paths = [(repeat, folder / "metrics" / name) for repeat, folder in enumerate(repeats)]
        tables.append(tuple(row for repeat, path in paths if path.is_file() for row in read_rows(path, repeat)))
    return tables
