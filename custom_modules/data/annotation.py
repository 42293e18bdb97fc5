"""Slice tags as an annotation server hands them over: cases {"image", "label"} whose label is a JSON file of tags.

MONAI Label stores one file per image as its label and trains on a list of such pairs. Here that file is

    {"slice_labels": [0, 0, 1, 1, 0]}

with one tag per slice, as in a datalist: the annotator says which slices show the target and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from custom_modules.data.geometry import one_line
from custom_modules.data.tags import tag_value
from custom_modules.files import flat_name, read_json, stem_of


def tagged_cases(items: Sequence[Mapping]) -> list[dict]:
    """Replace the label of each case {"image", "label"} by the tags in that file, and name the case.

    Cases of a datalist, which have no `label`, stay as they are. Masks are refused and not reduced to tags: training
    never reads one, and a mask does not say whether each slice was looked at.

    Returns:
        `{"case", "image", "slice_labels"}`; the tags themselves are checked by `check_cases`.

    Raises:
        ValueError: some labels do not hold tags; the message names all of them.
    """
    cases, problems = [], []
    for item in items:
        case = dict(item)
        if label := case.pop("label", None):
            case = {"case": flat_name(stem_of(case["image"]))} | case
            try:
                case["slice_labels"] = _tags_in(Path(label))
            except (OSError, ValueError) as error:
                problems.append(f"{case['case']}: {one_line(error)} ({label})")
        cases.append(case)
    if problems:
        fix = 'Save {"slice_labels": [0, 1, ...]}, one tag per slice, as the label instead, or remove the label.'
        raise ValueError("\n  ".join([f"{len(problems)} label(s) without slice tags. {fix}", *problems]))
    return cases


def _tags_in(path: Path) -> list[int]:
    if path.suffix != ".json":
        raise ValueError("it is not a JSON file; training reads slice tags and never a mask.")
    content = read_json(path)
    tags = content.get("slice_labels")
    if not isinstance(tags, list):
        raise ValueError(f"slice_labels must be a list of 0 and 1; got {' '.join(str(content).split())[:80]}.")
    return [tag_value(tag) for tag in tags]
