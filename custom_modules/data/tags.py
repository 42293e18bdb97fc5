"""Slice tags: from a label volume, or from a CSV file as a radiologist gives them."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from custom_modules.data.dicom import read_series
from custom_modules.data.geometry import UNREADABLE, one_line, read_geometry
from custom_modules.data.labels import load_label, target_mask
from custom_modules.files import NIFTI, atomic_path, check_name, flat_name, stem_of

HEADER = ("case", "slice", "label")
DICOM_COLUMNS = {"instance_number": "InstanceNumber", "sop_instance_uid": "SOPInstanceUID"}  # in place of slice
WORDS = {"no": 0, "n": 0, "false": 0, "yes": 1, "y": 1, "true": 1}
NOT_A_CSV = {
    b"PK\x03": "an Excel workbook",
    b"\xd0\xcf": "an Excel workbook",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
COUNTED = "If slices are counted from 1, give --first_slice 1."
Tags = dict[str, dict[int | str, int]]


def tags_of_label(
    label: np.ndarray, target_labels: Sequence[int] | None = None, slice_axis: int = 2, min_area: int = 0
) -> list[int]:
    """Tag each slice of a label (H, W, D) with 1 if more than `min_area` of its pixels show the target, else with 0;
    see `target_mask`."""
    areas = target_mask(label, target_labels).sum(axis=tuple(axis for axis in range(3) if axis != slice_axis))
    return [int(area > min_area) for area in areas]


def read_tags(path: str | Path, first_slice: int = 0) -> Tags:
    """Read slice tags from a CSV file with the header `case,slice,label`.

    The separator may be a comma, a semicolon or a tab; a label may also be 1.0, yes, no, true or false. Rows without a
    label count as absent. In a DICOM series, `instance_number` or `sop_instance_uid` may take the place of `slice`.

    Args:
        path: CSV file.
        first_slice: number of the first slice in the file, 0 or 1.

    Returns:
        `{case: {slice: 0 or 1}}`, slices from 0; instead of a slice, "InstanceNumber 12" or "SOPInstanceUID 1.2.3".

    Raises:
        ValueError: the file is no CSV in UTF-8, the header is wrong, or rows are; the message names all lines.
    """
    tags: Tags = defaultdict(dict)
    reader, skipped = _csv_reader(path)
    key = next((name for name in ("slice", *DICOM_COLUMNS) if name in (reader.fieldnames or ())), None)
    if key is None or not {"case", "label"} <= set(reader.fieldnames):
        raise ValueError(f"{path} must start with the header case,slice,label; got {reader.fieldnames}.")
    if twice := {name for name in ("case", key, "label") if reader.fieldnames.count(name) > 1}:
        raise ValueError(f"{path} has the column {min(twice)} more than once; keep one.")
    problems = []
    for row in _rows(reader, path):
        case, named, label = ((row[name] or "").strip() for name in ("case", key, "label"))
        if not (label or row[key] is None) or not case + named:
            continue
        case = flat_name(NIFTI.sub("", case))
        try:
            if row[key] is None:  # another separator than in the header, or a quote that is never closed
                raise ValueError("fewer values than columns.")
            if any(value.strip() for value in row.get(None, ())):
                raise ValueError(f"more values than columns: {', '.join(row[None])!r:.40}.")
            index, tag = _index(named, key, first_slice), tag_value(label)
            if tags[case].setdefault(index, tag) != tag:
                raise ValueError(f"{key} {named} is {tag} here and {tags[case][index]} above.")
        except ValueError as error:
            problems.append(f"line {reader.line_num + skipped} (case {case!r}): {error}")
    raise_all(problems, f"in {path}")
    return dict(tags)


def tag_value(value: object) -> int:
    """Read a tag, 0 or 1, also written as 1.0, yes, no, true or false.

    Raises:
        ValueError: it is none of these.
    """
    text = str(value).strip().lower()
    if re.fullmatch(r"[01](\.0*)?", text):
        return int(text[0])
    if text not in WORDS:
        raise ValueError(f"label must be 0 or 1; got {value!r:.40}.")
    return WORDS[text]


def _csv_reader(path: str | Path) -> tuple[csv.DictReader, int]:
    """Open a CSV of any separator, its header in lower case; the second value is the number of lines above it."""
    content = Path(path).read_bytes()
    kind = next((kind for start, kind in NOT_A_CSV.items() if content.startswith(start)), None)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        kind = kind or "not in UTF-8"
    if kind or "\0" in text:
        raise ValueError(f"{path} is {kind or 'UTF-16'}; save it as CSV in UTF-8 (in Excel: 'CSV UTF-8').")
    lines = text.splitlines()
    given = re.fullmatch(r'"?sep=(.)"?', lines[0].strip(), re.IGNORECASE) if lines else None  # Excel's own line
    lines = lines[1:] if given else lines
    separator = given[1] if given else max(",;\t", key=lines[0].count) if lines else ","
    try:
        reader = csv.DictReader(lines, delimiter=separator)
        reader.fieldnames = [name.strip().lower().replace(" ", "_") for name in reader.fieldnames or ()]
    except (csv.Error, TypeError, ValueError) as error:  # of the separator
        raise ValueError(f"{path} is no CSV: {error}; save it as one.") from None
    return reader, int(given is not None)


def _rows(reader: csv.DictReader, path: str | Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:  # a quote that is never closed makes one long field of the rest
        raise ValueError(f"{path} is no CSV: line {reader.line_num + 1}, {error}; save it as one.") from None


def _index(text: str, key: str, first_slice: int) -> int | str:
    if key == "sop_instance_uid":
        return f"{DICOM_COLUMNS[key]} {text}"
    number = re.fullmatch(r"(\d{1,12})(\.0*)?", text)
    if not number or key == "slice" and int(number[1]) < first_slice:
        raise ValueError(f"{key} must be a whole number from {first_slice if key == 'slice' else 0}; got {text!r:.40}.")
    return int(number[1]) - first_slice if key == "slice" else f"{DICOM_COLUMNS[key]} {int(number[1])}"


def raise_all(problems: Sequence[str], where: str) -> None:
    """Raise one ValueError that lists the first 20 problems, and how many more there are; nothing if there are none."""
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} problem(s) {where}:", *problems[:20], *more]))


def write_template(cases: Iterable[Mapping], path: str | Path, slice_axis: int = 2) -> int:
    """Write a CSV with a row for each slice of the cases and no label yet; returns the number of rows.

    Raises:
        FileExistsError: there is such a file: it may hold hours of work.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists and may hold tags; give another name, or remove it.")
    n_slices = {case["case"]: read_geometry(case["image"], case.get("channel"))[0][slice_axis] for case in cases}
    rows = [(case, index, "") for case, count in n_slices.items() for index in range(count)]
    with atomic_path(path) as aside, open(aside, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([HEADER, *rows])
    return len(rows)


def tag_cases(cases: list[dict], tags: Tags | None = None, **rule) -> tuple[list[dict], dict[str, str], dict[str, str]]:
    """Give each case its `slice_labels`: from `tags`, or else from its label by `tags_of_label(label, **rule)`.

    Tags may name a case by its image's file name, too.

    Returns:
        The usable cases (those without tags lack `slice_labels`), `{case: why it was skipped}`, `{case: note}`.

    Raises:
        ValueError: `tags` name cases or slices that do not exist, or no slice that shows the target; all are named.
    """
    usable, skipped, notes, problems = [], {}, {}, []
    tags = None if tags is None else named_tags(cases, tags, problems)
    for item in tqdm(cases, desc="reading cases", unit="case", leave=False, disable=None):
        case, label = item["case"], None
        try:
            check_name(case)
            n_slices = read_geometry(item["image"], item.get("channel"))[0][rule.get("slice_axis", 2)]
            if tags is None and "label" in item:
                label = load_label(item["label"], item["image"])
        except UNREADABLE as error:
            skipped[case] = one_line(error)
            continue
        if label is not None:
            item = item | {"slice_labels": tags_of_label(label, **rule)}
        elif case in (tags or ()):
            try:
                given = stored_slices(item, tags[case], n_slices)
            except UNREADABLE as error:
                problems.append(one_line(error))
                continue
            item = item | {"slice_labels": [given.get(index, 0) for index in range(n_slices)]}
            if missing := n_slices - len(given):
                notes[case] = f"{missing} of {n_slices} slices are not in the tags; they count as 0."
        else:
            notes[case] = f"no {'label' if tags is None else 'tags'}: listed as untagged, for inference only."
        usable.append(item)
    if tags is not None and not problems and not any(sum(item.get("slice_labels", ())) for item in usable):
        problems.append("no slice is tagged 1: nothing can be learned from them.")
    raise_all(problems, "in the tags")
    labels = [item["slice_labels"] for item in usable if "slice_labels" in item]
    if tags is None and labels and not any(map(any, labels)):
        notes["labels"] = f"none shows the target, {rule.get('target_labels') or 'above 0'}; see --target_labels."
    if tags and all(min(slices) == 1 for slices in tags.values()):
        notes["tags"] = f"slice 0 is not named, slice 1 is, in every case. {COUNTED}"
    return usable, skipped, notes


def named_tags(cases: Iterable[Mapping], tags: Tags, problems: list[str]) -> Tags:
    """Give the tags by the names of the cases, and add to `problems` the names that none of them has."""
    stems = [flat_name(stem_of(item["image"])) for item in cases]
    counts = Counter(stems)
    names = {stem: item["case"] for stem, item in zip(stems, cases) if counts[stem] == 1}
    names |= {item["case"]: item["case"] for item in cases}
    if unknown := sorted(set(tags) - set(names)):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        known = ", ".join(item["case"] for item in cases[:3])
        problems.append(f"unknown cases: {', '.join(unknown[:5])}{more}. Cases are named like {known}.")
    twice = [case for case, count in Counter(names[name] for name in tags if name in names).items() if count > 1]
    problems += [f"{case} is named both by its case and by its file; keep one name." for case in twice]
    return {names[name]: slices for name, slices in tags.items() if name in names}


def stored_slices(item: Mapping, slices: Mapping[int | str, int], n_slices: int) -> dict[int, int]:
    """Give the tags of a case by index of the stored slice, whatever they name.

    Raises:
        ValueError: they name slices that the case does not have.
    """
    where = f"the tags of {item['case']!r} name"
    if isinstance(next(iter(slices)), str):
        if not os.path.isdir(item["image"]):
            raise ValueError(f"{where} slices by {next(iter(slices)).split()[0]}, but it is no DICOM series.")
        keyword = next(iter(slices)).split()[0]
        values = [header.get(keyword) for header in read_series(item["image"])]
        if keyword == "InstanceNumber":  # which may have leading zeros
            values = [None if value is None else int(value) for value in values]
        index_of = {f"{keyword} {value}": i for i, value in enumerate(values)}
        if len(index_of) != n_slices:
            raise ValueError(f"{where} slices by {keyword}, but its slices do not have one each; tag by slice.")
        if unknown := [name for name in slices if name not in index_of]:
            raise ValueError(f"{where} {', '.join(unknown[:5])}, which the series does not have.")
        return {index_of[name]: tag for name, tag in slices.items()}
    if max(slices) >= n_slices:
        hint = f" {COUNTED}" if max(slices) == n_slices and 0 not in slices else ""
        raise ValueError(f"{where} slice {max(slices)}; its last is {n_slices - 1}.{hint}")
    return dict(slices)
