"""Slice tags: from a label volume, or from a CSV file as a radiologist gives them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from custom_modules.data.geometry import UNREADABLE, one_line, read_geometry
from custom_modules.data.labels import load_label, target_mask
from custom_modules.files import check_name, flat_name


def tags_of_label(
    label: np.ndarray, target_labels: Sequence[int] | None = None, slice_axis: int = 2, min_area: int = 0
) -> list[int]:
    """Tag each slice of a label (H, W, D) with 1 if more than `min_area` of its pixels show the target, else with 0;
    see `target_mask`."""
    areas = target_mask(label, target_labels).sum(axis=tuple(axis for axis in range(3) if axis != slice_axis))
    return [int(area > min_area) for area in areas]


def read_tags(path: str | Path) -> dict[str, dict[int, int]]:
    """Read slice tags from a CSV file with the header `case,slice,label`, as `{case: {slice: 0 or 1}}`.

    Raises:
        ValueError: header, slice or label are wrong, or rows disagree; the message names the line.
    """
    tags: dict[str, dict[int, int]] = defaultdict(dict)
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not {"case", "slice", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must start with the header case,slice,label; got {reader.fieldnames}.")
        for row in reader:
            case, index, tag = ((row[key] or "").strip() for key in ("case", "slice", "label"))
            case, where = flat_name(case), f"{path}, line {reader.line_num} (case {case!r})"
            if not index.isdecimal():
                raise ValueError(f"{where}: slice must be a whole number from 0; got {index!r}.")
            if tag not in ("0", "1"):
                raise ValueError(f"{where}: label must be 0 or 1; got {tag!r}.")
            if tags[case].setdefault(int(index), int(tag)) != int(tag):
                raise ValueError(f"{where}: slice {index} is {tag} here and {tags[case][int(index)]} above.")
    return dict(tags)


def tag_cases(
    cases: list[dict], tags: dict[str, dict[int, int]] | None = None, **rule
) -> tuple[list[dict], dict[str, str], dict[str, str]]:
    """Give each case its `slice_labels`: from `tags`, or else from its label by `tags_of_label(label, **rule)`.

    Returns:
        The usable cases (those without tags lack `slice_labels`), `{case: why it was skipped}`, `{case: note}`.

    Raises:
        ValueError: `tags` name a case or a slice that does not exist.
    """
    if unknown := sorted(set(tags or ()) - {item["case"] for item in cases}):
        known = ", ".join(item["case"] for item in cases[:3])
        raise ValueError(f"the tags name unknown cases: {', '.join(unknown[:5])}. Cases are named like {known}.")
    usable, skipped, notes = [], {}, {}
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
            if max(tags[case]) >= n_slices:
                raise ValueError(f"the tags of {case!r} name slice {max(tags[case])}; its last is {n_slices - 1}.")
            item = item | {"slice_labels": [tags[case].get(index, 0) for index in range(n_slices)]}
            if missing := n_slices - len(tags[case]):
                notes[case] = f"{missing} of {n_slices} slices are not in the tags; they count as 0."
        else:
            notes[case] = f"no {'label' if tags is None else 'tags'}: listed as untagged, for inference only."
        usable.append(item)
    return usable, skipped, notes
