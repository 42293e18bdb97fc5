"""Slice tags as an annotation server hands them over: cases {"image", "label"} whose label is a JSON file of tags.

MONAI Label keeps one file beside each image as its label and trains with a list of such pairs. Here that file is

    {"slice_labels": [0, 0, 1, 1, 0]}

with one tag for each slice, as in a datalist: who annotates says which slices show the target and draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from custom_modules.data.geometry import in_a_line
from custom_modules.data.layouts import stem_of


def tagged_cases(items: Sequence[Mapping]) -> list[dict]:
    """Gives each case {"image", "label"} of an annotation server its name and the tags in the file `label`.

    Cases of a datalist, which have no `label`, stay as they are. Masks are refused, not reduced to tags: training never
    reads one, and whether each slice was looked at a mask does not say.

    Returns:
        `{"case", "image", "slice_labels"}`; what is wrong with the tags themselves, `check_cases` says.

    Raises:
        ValueError: names every label that does not hold tags.
    """
    cases, problems = [], []
    for item in items:
        case = dict(item)
        if label := case.pop("label", None):
            case = {"case": stem_of(Path(case["image"]))} | case
            try:
                case["slice_labels"] = _read_tags(Path(label))
            except (OSError, ValueError) as error:
                problems.append(f"{case['case']}: {in_a_line(error)} ({label})")
        cases.append(case)
    if problems:
        fix = 'Save {"slice_labels": [0, 1, ...]}, a tag for each slice, as the label instead, or remove the label.'
        raise ValueError("\n  ".join([f"{len(problems)} label(s) without slice tags. {fix}", *problems]))
    return cases


def _read_tags(path: Path) -> list[int]:
    if path.suffix != ".json":
        raise ValueError("it is not a JSON file; training reads slice tags and never a mask.")
    content = json.loads(path.read_text(encoding="utf-8"))
    tags = content.get("slice_labels") if isinstance(content, dict) else None
    if not isinstance(tags, list) or not all(isinstance(tag, int) for tag in tags):
        raise ValueError(f"slice_labels must be a list of 0 and 1; got {in_a_line(ValueError(content))[:80]}.")
    return tags
