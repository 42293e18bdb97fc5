"""Splits by patient into training, validation and test: random under a seed, or given by a file.

Slices of one patient in both training and test would flatter every result. So patients are divided, not slices, each
group (hospital, folder) in the same proportions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from custom_modules.files import flat_name, read_json

SECTIONS = ("training", "validation", "test")


def patient_of(case: str) -> str:
    """Name the patient of a case: time points of BraTS (`BraTS-GLI-00001-000`, `-001`) and files of BIDS
    (`sub-01_ses-1_FLAIR`) share one, other cases do not."""
    return re.sub(r"^(?:(BraTS-[A-Za-z]+-\d+)-\d{3}|(sub-[A-Za-z0-9]+)_.*)$", r"\1\2", case)


def split_cases(cases: list[dict], seed: int = 0, folds: int = 0) -> list[dict[str, list[dict]]]:
    """Divide cases by patient, randomly under a seed, each group (hospital, folder) in the same proportions.

    Args:
        cases: `{"case", "image", ...}`.
        seed: of the random order.
        folds: 0 for one split (8:1:1; from 3 patients on, each section gets one), or the number N of folds.

    Returns:
        One split `{"training", "validation", "test"}`, or N of them: in split k, fold k is the test and the other folds
        are the training.

    Raises:
        ValueError: there are fewer than 2 folds, or more than patients.
    """
    order = _stratified_order(cases, seed)
    if folds < 0 or folds == 1 or folds > len(order):
        raise ValueError(f"folds must be 0, or from 2 to the number of patients ({len(order)}); got {folds}.")
    dealt = [i % folds for i in range(len(order))] if folds else _deal(len(order))
    place = dict(zip(order, dealt, strict=True))
    return expand_splits(cases, {item["case"]: place[patient_of(item["case"])] for item in cases})


def _stratified_order(cases: list[dict], seed: int) -> list[str]:
    """List the patients group after group; the order of the groups, and of the patients of a group, is random."""
    group: dict[str, str] = {}
    for item in sorted(cases, key=lambda item: item["case"]):
        hospital = re.match(r"TCGA[_-]([A-Za-z0-9]{2})[_-]", item["case"])
        folder = Path(item["image"]).parent
        folder = folder.parent if folder.name == item["case"] else folder
        group.setdefault(patient_of(item["case"]), hospital[1] if hospital else folder.name)
    patients = list(group)
    random.Random(seed).shuffle(patients)
    rank = {name: i for i, name in enumerate(dict.fromkeys(group[patient] for patient in patients))}
    return sorted(patients, key=lambda patient: rank[group[patient]])


def _deal(n: int) -> list[str]:
    """Assign n places in a row to the sections, so that every stretch of the row holds about the share of each."""
    tenth = max(round(n * 0.1), int(n >= 3))
    quota = dict(zip(SECTIONS, (n - 2 * tenth, tenth, tenth), strict=True))
    dealt: list[str] = []
    for i in range(1, n + 1):
        unfilled = [name for name in SECTIONS if dealt.count(name) < quota[name]]
        dealt.append(max(unfilled, key=lambda name: i * quota[name] / n - dealt.count(name)))
    return dealt


def expand_splits(cases: list[dict], place: dict[str, str | int]) -> list[dict[str, list[dict]]]:
    """Make splits from the place of each case, a section or the number of a fold: one split, or one per fold."""
    n_folds = max((place[item["case"]] + 1 for item in cases if isinstance(place[item["case"]], int)), default=0)

    def section(p: str | int, fold: int) -> str:
        return p if isinstance(p, str) else "test" if p == fold else "training"

    return [
        {name: [item for item in cases if section(place[item["case"]], fold) == name] for name in SECTIONS}
        for fold in range(max(n_folds, 1))
    ]


def read_splits(path: str | Path) -> dict[str, str | int]:
    """Read splits from a JSON file that holds, at any depth, lists of case names under `training`, `validation` and
    `test`, or a list of such lists under `folds`.

    Returns:
        `{case: section, or number of its fold}`.

    Raises:
        ValueError: the file holds none of these, or a patient is in two places.
    """
    place: dict[str, str | int] = {}
    place_of_patient: dict[str, str | int] = {}
    for where, names in _named_lists(read_json(path)):
        if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise ValueError(f"{path}: {where} must be a list of names of cases; got {names!r:.60}.")
        for name in map(flat_name, names):
            first = place_of_patient.setdefault(patient_of(name), where)
            if first != where:
                raise ValueError(f"{path} puts the patient of {name} in two places: {first} and {where}.")
            place[name] = where
    if not place:
        raise ValueError(f"{path} must hold lists of cases under {', '.join(SECTIONS)} or folds; got none.")
    return place


def _named_lists(node: dict) -> Iterator[tuple[str | int, list[str]]]:
    nodes = [node]
    for node in nodes:  # grows
        for key, value in node.items():
            if key == "folds" and isinstance(value, list):
                yield from enumerate(value)
            elif key in (*SECTIONS, "folds"):
                yield key, value
            elif isinstance(value, dict):
                nodes.append(value)
