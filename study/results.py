"""A results folder as pictures and reports see it: runs with their numbers, and the volumes of a case.

Three kinds are told apart by what they hold: a study of `study.runner` (`results.json`; many runs), the
output of one evaluation (`metrics/`; one run), or of an inference alone (results of cases, no numbers).
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage

from custom_modules.data.labels import load_label
from custom_modules.data.layouts import find_cases
from custom_modules.inference.mask import slice_axis_of

REFERENCES = {"intensity": "floor: no network", "supervised": "upper bound: trained on masks"}  # not label-only
KINDS = "neither results.json (a study), metrics/summary.json (an evaluation) nor results of cases (an inference)"


@dataclass(frozen=True)
class Case:
    """One case on its stored grid, and slices of it the way they are looked at.

    `image`, `saliency` (H, W, D) real; `mask`, `truth` (H, W, D) binary, `truth` None where there is no label;
    `affine` (4, 4) to RAS mm; the slices run along `axis`.
    """

    name: str
    image: np.ndarray
    affine: np.ndarray
    axis: int
    truth: np.ndarray | None
    saliency: np.ndarray
    mask: np.ndarray

    def plane(self, volume: np.ndarray | None, index: int) -> np.ndarray | None:
        """Slice `index` of a stored volume (H, W, D) as (rows, columns) in the radiological convention.

        Rows run towards the feet (in axial slices: the back), columns towards the patient's left (in sagittal: back).
        """
        if volume is None:
            return None
        (rows, down), (columns, right) = self._in_plane()
        plane = np.moveaxis(volume, (self.axis, rows, columns), (0, 1, 2))[index]
        return plane[::down, ::right]

    @property
    def pixel(self) -> tuple[float, float]:
        """Distance in mm between the rows and between the columns of a `plane`."""
        spacing = nib.affines.voxel_sizes(self.affine)
        return tuple(float(spacing[axis]) for axis, _ in self._in_plane())

    def largest(self) -> int:
        """The slice that holds most of the truth; where there is none of the mask, or else of the saliency."""
        there = (volume for volume in (self.truth, self.mask, self.saliency) if volume is not None and volume.any())
        return int(np.moveaxis(next(there, self.image), self.axis, 0).sum(axis=(1, 2)).argmax())

    def _in_plane(self) -> list[tuple[int, int]]:
        """(stored axis, step) of the rows, then of the columns; the step leads towards L, P or I."""
        world = nib.io_orientation(self.affine).astype(int)  # a row a stored axis: which of x, y, z, and +1 for R, A, S
        axes = sorted((axis for axis in range(3) if axis != self.axis), key=lambda axis: -world[axis, 0])
        return [(axis, -int(world[axis, 1])) for axis in axes]


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
        return {**self.summary.get("settings", {}), **self.facts.get("settings", {})}

    @property
    def method(self) -> str:
        return str(self.settings.get("method", self.name))

    def dice(self, group: str | None = None) -> dict[str, float]:
        """Dice of each case, mean over its positive slices and the repeats; of one group's cases, or of all."""
        rows = defaultdict(list)
        for row in self.slices:
            if group is None or row["group"] == group:
                rows[row["case"]].append(float(row["dice"]))
        return {case: fmean(values) for case, values in rows.items()}

    def largest_slice(self, case: str) -> int:
        """The index of the case's slice with the largest target."""
        return int(max((row for row in self.slices if row["case"] == case), key=lambda r: float(r["area"]))["slice"])

    def slice_dice(self, case: str, index: int, repeat: int = 0) -> float | None:
        """Dice of one slice in one repeat, as measured; None where it was not."""
        wanted = (case, index, repeat)
        found = (row for row in self.slices if (row["case"], int(row["slice"]), row["repeat"]) == wanted)
        return next((float(row["dice"]) for row in found), None)

    @cached_property
    def kept(self) -> dict[str, tuple[int, Path]]:
        """{case: the first repeat that kept its volumes, and their folder} of the cases whose image is there too."""
        kept: dict[str, tuple[int, Path]] = {}
        for repeat, folder in enumerate(self.folders):
            for place in case_folders(folder):
                facts = read_facts(place)
                if all(path.exists() for path in (*_volumes(place), Path(facts["image"]))):
                    kept.setdefault(facts["case"], (repeat, place))
        return kept

    def read(self, case: str) -> tuple[int, Case] | None:
        """The repeat of which a case's volumes were kept, and the volumes; None where there are none."""
        if case not in self.kept:
            return None
        repeat, place = self.kept[case]
        return repeat, read_case(place, self.settings.get("target_labels"), self.settings.get("slice_axis"))


@dataclass(frozen=True)
class Results:
    """What a results folder holds: `kind` (study, evaluation or inference), its runs in order, and `table`, one
    summary (see `metrics.summarise`, with run, group, min_area and repeats) for each run, smallest area and group."""

    folder: Path
    kind: str
    bundle: str
    runs: tuple[Run, ...]
    table: tuple[dict, ...]

    @property
    def groups(self) -> list[str]:
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
        """The runs that stand for a method: all but those of sweeps."""
        return [run for run in self.runs if "=" not in run.name]

    def best(self, group: str) -> Run | None:
        """The label-only run with the highest Dice in a group, not counting sweeps; None where there is none."""
        candidates = {run.name: run for run in self.compared if run.method not in REFERENCES}
        rows = [r for r in self.rows(group) if r["run"] in candidates and r["dice"]["mean"] is not None]
        return candidates[max(rows, key=lambda r: r["dice"]["mean"])["run"]] if rows else None

    def rows(self, group: str, min_area: float | None = None) -> list[dict]:
        """The table's rows of a group and smallest area (by default the least of them)."""
        if min_area is None:
            min_area = min(row["min_area"] for row in self.table)
        return [row for row in self.table if row["group"] == group and row["min_area"] == min_area]


def read_results(folder: str | Path) -> Results:
    """Reads a results folder.

    Raises:
        FileNotFoundError: if it holds no results.
    """
    folder = Path(folder)
    if (folder / "results.json").is_file():
        table = tuple(_json(folder / "results.json")["results"])
        runs = tuple(_study_run(folder / "cells" / name, name) for name in dict.fromkeys(row["run"] for row in table))
        kind = "study"
    elif (folder / "metrics" / "summary.json").is_file():
        summary = _json(folder / "metrics" / "summary.json")
        runs = (Run(summary["method"] or "method", (folder,), {}, summary, *_rows([folder])),)
        table, kind = tuple(_by_group(summary, runs[0])), "evaluation"
    elif places := case_folders(folder):
        settings = read_facts(places[0]).get("settings", {})
        runs = (Run(str(settings.get("method", "method")), (folder,), {"settings": settings}),)
        table, kind = (), "inference"
    else:
        raise FileNotFoundError(f"{folder} holds {KINDS}.")
    bundle = next((run.summary["bundle"] for run in runs if run.summary.get("bundle")), "")
    return Results(folder, kind, bundle, runs, table)


def read_case(place: Path, target_labels: Iterable[int] | None = None, slice_axis: int | None = None) -> Case:
    """Reads the volumes of one case from the folder of its result.

    The provenance file says where the image is, and the label; else `custom_modules.data.layouts` finds the label.

    Args:
        place: `<output_dir>/<stem>`.
        target_labels: label values of the target, empty: all above 0; None: unknown, and the truth is left out.
        slice_axis: stored axis of the slices; None: the one that the recorded orientation names.

    Raises:
        FileNotFoundError: if the folder holds no provenance file, or a volume or the image is gone.
    """
    facts, (saliency, mask) = read_facts(place), _volumes(place)
    if not Path(facts["image"]).exists():
        raise FileNotFoundError(f"the image of {place} is not at {facts['image']} any more.")
    image, affine, labels = _read_image(facts["image"], facts.get("label"))
    truth = None
    if labels is not None and target_labels is not None:
        truth = np.isin(labels, list(target_labels)) if target_labels else labels > 0
    if slice_axis is None:
        slice_axis = slice_axis_of(affine, facts.get("settings", {}).get("orientation", "LPS"))
    saliency, mask = (np.asarray(nib.load(path).dataobj) for path in (saliency, mask))
    return Case(facts["case"], image, affine, slice_axis, truth, saliency, mask)


@lru_cache(maxsize=1)  # the runs of a study are drawn over the same image one after the other
def _read_image(path: str, label: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Image (H, W, D), affine (4, 4) and label values (H, W, D), None where there is no label."""
    found = find_cases(path)[0]
    image, label = LoadImage(image_only=True)(path), label or found.get("label")
    array = image.numpy() if image.ndim == 3 else image.numpy()[..., found.get("channel", 0)]
    return array, np.asarray(image.affine), None if label is None else load_label(label, path)


def case_folders(folder: Path) -> list[Path]:
    """The folders of the cases in the output of an evaluation or inference."""
    return sorted(path.parent for path in folder.glob("*/*_provenance.json"))


def read_facts(place: Path) -> dict:
    """The provenance of one case.

    Raises:
        FileNotFoundError: if the folder holds no provenance file.
    """
    path = next(place.glob("*_provenance.json"), None)
    if path is None:
        raise FileNotFoundError(f"{place} holds no *_provenance.json: not a result of this bundle.")
    return _json(path)


def _volumes(place: Path) -> list[Path]:
    """Where saliency and mask of a case are, or would be."""
    stem = next(place.glob("*_provenance.json")).name.removesuffix("_provenance.json")
    return [place / f"{stem}_{what}.nii.gz" for what in ("saliency", "mask")]


def _study_run(folder: Path, name: str) -> Run:
    repeats = sorted(path.parent for path in folder.glob("*/cell.json"))
    summary = repeats[0] / "metrics" / "summary.json" if repeats else folder / "metrics"
    facts = _json(repeats[0] / "cell.json") if repeats else {}
    return Run(name, tuple(repeats), facts, _json(summary) if summary.is_file() else {}, *_rows(repeats))


def _by_group(summary: Mapping, run: Run) -> Iterable[dict]:
    """The summary of an evaluation as the rows of a study's table."""
    context = {"run": run.name, "min_area": summary["settings"].get("min_area", 0), "repeats": 1}
    names = sorted({row["group"] for row in run.volumes})
    for name in names:
        yield {**summary, **summary.get("groups", {}).get(name or "none", {}), **context, "group": name}


def _rows(repeats: Iterable[Path]) -> list[tuple[dict, ...]]:
    """The rows of `per_slice.csv` and of `per_volume.csv` of all repeats."""
    tables = []
    for name in ("per_slice.csv", "per_volume.csv"):
        rows = []
        for repeat, folder in enumerate(repeats):
            if (path := folder / "metrics" / name).is_file():
                with open(path, newline="", encoding="utf-8") as file:
                    rows += [row | {"repeat": repeat} for row in csv.DictReader(file)]
        tables.append(tuple(rows))
    return tables


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
