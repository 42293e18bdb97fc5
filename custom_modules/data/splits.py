"""Splits by patient into training, validation and test: random under a seed, or given by a file.

Slices of one patient in both training and test would flatter every result. So patients are divided, not slices, each
group (hospital, folder) in the same proportions, and an image that is there twice is found.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from custom_modules.data.dicom import patient_id
from custom_modules.files import flat_name, read_json, sha256

logger = logging.getLogger(__name__)
SECTIONS = ("training", "validation", "test")
SPOTS, GOLDEN = 8, 0.618  # places of a file that are compared first, spread so that some show tissue


class Listed(NamedTuple):
    """A case as it is listed: an image, or one channel of it, in a section."""

    case: str
    image: str
    section: str
    channel: int | None = None


def patient_of(case: str) -> str:
    """Name the patient of a case: time points of BraTS (`BraTS-GLI-00001-000`, `-001`) and files of BIDS
    (`sub-01_ses-1_FLAIR`) share one, other cases do not."""
    return re.sub(r"^(?:(BraTS-[A-Za-z]+-\d+)-\d{3}|(sub-[A-Za-z0-9]+)_.*)$", r"\1\2", case)


def patients_of(cases: Sequence[dict]) -> dict[str, str]:
    """Give {case: patient}: by their names (`patient_of`), and joined where DICOM series have one PatientID.

    One that all series have (anonymised ones, mostly) says nothing; the log says so.
    """
    patients = {item["case"]: patient_of(item["case"]) for item in cases}
    by_id = defaultdict(list)
    for item in cases:
        if os.path.isdir(item["image"]) and (number := patient_id(item["image"])):
            by_id[number].append(item["case"])
    n_series = sum(map(len, by_id.values()))
    if len(by_id) == 1 < n_series:
        logger.warning("all %d DICOM series have one PatientID, so each is taken for a patient of its own; if some are "
                       "of one patient, put them in one section by --splits.", n_series)  # fmt: skip
        return patients
    for names in by_id.values():
        if len(several := {patients[name] for name in names}) > 1:
            patients |= {name: patients[names[0]] for name, patient in patients.items() if patient in several}
    if len(by_id) < n_series:
        logger.warning("%d DICOM series have %d PatientIDs; those of one stay in one section.", n_series, len(by_id))
    return patients


def same_images(listed: Sequence[Listed], folders: Sequence[str | Path] = ("",)) -> list[list[Listed]]:
    """Group the entries that are one image: by one name, by links, or as copies (equal bytes) in several sections.

    There may be thousands, on a disk over a network: each costs a call, those of one size some of their bytes, and only
    those that are equal in these are read.

    Args:
        listed: the entries; images that do not exist are left out.
        folders: that relative paths belong to; the first in which an image exists counts.
    """
    files: dict[tuple, list[Listed]] = defaultdict(list)
    for one, (path, found) in zip(listed, _in_threads(partial(_find, folders=folders), listed)):
        if found is not None:
            size = None if S_ISDIR(found.st_mode) else found.st_size
            files[size, one.channel, found.st_dev, found.st_ino].append(one._replace(image=path))
    alike = _parted([(key[:2], entries[0]) for key, entries in files.items()])
    for digest in (_sample, sha256):
        numbered = [(i, one) for i, part in enumerate(alike) for one in part]
        digests = _in_threads(partial(_digest, digest), [one for _, one in numbered])
        alike = _parted([((i, d), one) for (i, one), d in zip(numbered, digests) if d is not None])
    return [entries for entries in files.values() if len(entries) > 1] + alike


def _in_threads(call: Callable, listed: Sequence[Listed]) -> list:
    """Call `call` for each entry, many at once, since a disk over a network answers slowly."""
    step = 1 + len(listed) // 64  # for one entry a thread would cost more than the call
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda i: list(map(call, listed[i : i + step])), range(0, len(listed), step))
        return [result for part in parts for result in part]


def _parted(keyed: Iterable[tuple[object, Listed]]) -> list[list[Listed]]:
    """Group the entries by their keys; groups in one section are left out."""
    parts = defaultdict(list)
    for key, one in keyed:
        parts[key].append(one)
    return [part for part in parts.values() if len({one.section for one in part}) > 1]


def _find(one: Listed, folders: Iterable[str | Path]) -> tuple[str, os.stat_result | None]:
    for path in (os.path.join(folder, one.image) for folder in folders):
        with contextlib.suppress(OSError, ValueError):  # no file has a NUL in its name
            return path, os.stat(path)
    return one.image, None


def _digest(digest: Callable[[str], object], one: Listed) -> object:
    try:
        return digest(one.image)
    except (OSError, ValueError):  # reading it will say so
        return None


def _sample(image: str) -> tuple[int, bytes]:
    """Read 4 kB at `SPOTS` places of a file, or of a series' first one; before them the number of files."""
    files = [entry.path for entry in os.scandir(image) if entry.is_file()] if os.path.isdir(image) else [image]
    with open(min(files), "rb", buffering=0) as stream:
        size, content = os.fstat(stream.fileno()).st_size, b""
        for spot in range(SPOTS):
            stream.seek(int(size * (spot * GOLDEN % 1)))  # the header first; none at the edge of every slice
            content += stream.read(4096)
    return len(files), content


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
    patients = patients_of(cases)
    order = _stratified_order(cases, patients, seed)
    if folds < 0 or folds == 1 or folds > len(order):
        raise ValueError(f"folds must be 0, or from 2 to the number of patients ({len(order)}); got {folds}.")
    dealt = [i % folds for i in range(len(order))] if folds else _deal(len(order))
    place = dict(zip(order, dealt, strict=True))
    return expand_splits(cases, {item["case"]: place[patients[item["case"]]] for item in cases})


def _stratified_order(cases: list[dict], patients: Mapping[str, str], seed: int) -> list[str]:
    """List the patients group after group; the order of the groups, and of the patients of a group, is random."""
    group: dict[str, str] = {}
    for item in sorted(cases, key=lambda item: item["case"]):
        hospital = re.match(r"TCGA[_-]([A-Za-z0-9]{2})[_-]", item["case"])
        folder = Path(item["image"]).parent
        folder = folder.parent if folder.name == item["case"] else folder
        group.setdefault(patients[item["case"]], hospital[1] if hospital else folder.name)
    order = list(group)
    random.Random(seed).shuffle(order)
    rank = {name: i for i, name in enumerate(dict.fromkeys(group[patient] for patient in order))}
    return sorted(order, key=lambda patient: rank[group[patient]])


def _deal(n: int) -> list[str]:
    """Assign n places in a row to the sections, so that every stretch of the row holds about the share of each."""
    tenth = max(round(n * 0.1), int(n >= 3))
    quota = dict(zip(SECTIONS, (n - 2 * tenth, tenth, tenth), strict=True))
    dealt, count = [], Counter()
    for i in range(1, n + 1):
        unfilled = [name for name in SECTIONS if count[name] < quota[name]]
        dealt.append(max(unfilled, key=lambda name: i * quota[name] / n - count[name]))
        count[dealt[-1]] += 1
    return dealt


def warn_of_patients_apart(cases: Sequence[dict], place: Mapping[str, str | int]) -> None:
    """Log the patients whose cases lie in several sections or folds of a given split."""
    places = defaultdict(dict)
    for case, patient in patients_of(cases).items():
        places[patient].setdefault(place[case], case)
    parted = [found.items() for found in places.values() if len(found) > 1]
    if apart := [", ".join(f"{case} ({where})" for where, case in found) for found in parted]:
        more = f" and {len(apart) - 3} more" if len(apart) > 3 else ""
        logger.warning("the splits part series of one patient (PatientID): %s%s; put them in one section, or results "
                       "are too good.", "; ".join(apart[:3]), more)  # fmt: skip


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
