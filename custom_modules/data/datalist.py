"""Datalists: read for training, inference and evaluation, and checked before the work.

A datalist is a decathlon JSON as MONAI has it: lists of cases under `training`, `validation` and `test`,

    {"case": "p1", "image": "p1/p1_flair.nii.gz", "slice_labels": [0, 1, ...], "label"?: ..., "channel"?: 0}

`slice_labels[i]` says whether index i of the stored array along `slice_axis` shows the target. Paths are relative to
the folder that was searched. Cases without tags are listed under `untagged`: fit for inference, not for training.

    python -m custom_modules.data brats --root DIR --output DIR/datalist.json
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from custom_modules.data.geometry import UNREADABLE, one_line, read_geometry
from custom_modules.data.labels import check_label
from custom_modules.data.layouts import LAYOUTS, find_cases, name_apart
from custom_modules.data.splits import SECTIONS, Listed, same_images
from custom_modules.data.tags import tag_cases
from custom_modules.files import check_name, flat_name, read_json, stem_of

logger = logging.getLogger(__name__)
RULES: dict[str, tuple[str, Callable]] = {  # of a case's entries: in words, and whether a value (None: absent) fits
    "image": ("an image (a path)", lambda value: isinstance(value, str)),
    "label": ("a path as its label, or none", lambda value: isinstance(value, str | None)),
    "channel": ("a number from 0 as its channel, or none", lambda v: v is None or type(v) is int and v >= 0),
    "slice_labels": (
        "a list of numbers as its slice_labels, or none",
        lambda value: value is None or isinstance(value, list) and all(isinstance(tag, int | float) for tag in value),
    ),
}


def load_cases(
    datalist: str | Path | None,
    dataset_dir: str | Path,
    section: str | Sequence[str] | None = None,
    with_label: bool = False,
    discover: bool = False,
    allow_empty: bool = False,
    output_dir: str | Path | None = None,
) -> list[dict]:
    """Read the cases of a datalist.

    Args:
        datalist: JSON file; None: `datalist.json` in `dataset_dir`.
        dataset_dir: folder that the paths are relative to; a file that is not there is looked for beside the datalist.
        section: section or sections to read; None or "all": all.
        with_label: keep the key `label`; without it, as in training, nothing can see a mask.
        discover: without a datalist, take what `find_cases` finds in `dataset_dir`.
        allow_empty: accept sections that exist but are empty (validation is, with folds), and a `dataset_dir` without a
            datalist (MONAI Label trains without one).
        output_dir: folder of the results, in which no case is looked for; None: nothing is written.

    Returns:
        `{"case", "image", "slice_labels"?, "label"?, "channel"?, "error"?}`, with unique names (`flat_name`) and
        absolute paths; an "error" says why the case cannot be done.

    Raises:
        FileNotFoundError: the folder, the datalist or all of its images do not exist.
        ValueError: a section is missing, or all are empty (without `allow_empty`).
    """
    if not os.path.exists(dataset_dir):
        raise FileNotFoundError(f"dataset_dir {dataset_dir} does not exist.")
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    build = f"Build one: python -m custom_modules.data {'|'.join(LAYOUTS)} --root {dataset_dir} --output {path}"
    if path.is_file():
        folders = [Path(os.path.abspath(folder)) for folder in (dataset_dir, path.parent)]
        items = [_absolute(item, folders) for item in _read_sections(path, section, build, folders)]
        if not items and not allow_empty:
            raise ValueError(f"no case in section {section or 'any'} of {path}: all asked for are empty. {build}")
        if items and not any(os.path.exists(item["image"]) for item in items):
            raise FileNotFoundError(f"none of the images of {path} exists, for example {items[0]['image']}. Set "
                                    f"dataset_dir to the folder that it was built with (--root). {build}")  # fmt: skip
        items = name_apart(items, folders[0])
    elif datalist is None and discover:
        items = find_cases(dataset_dir, output_dir=output_dir)
    elif datalist is None and allow_empty:
        items = []
    else:
        raise FileNotFoundError(f"datalist {path} does not exist. {build}")
    for item in items:
        if output_dir and os.path.isdir(item["image"]) and _same(Path(output_dir) / item["case"], item["image"]):
            item["error"] = "its results would be written among the files of its DICOM series; give another output_dir."
    return [{key: value for key, value in item.items() if with_label or key != "label"} for item in items]


def labelled_cases(
    datalist: str | Path | None,
    dataset_dir: str | Path,
    section: str | Sequence[str] | None = None,
    target_labels: Sequence[int] | None = None,
    slice_axis: int = 2,
    allow_empty: bool = False,
    output_dir: str | Path | None = None,
) -> list[dict]:
    """Read the cases with a label, for evaluation: all with `slice_labels`, `image_file`, `label_file` and `group`.

    A case without tags (there is no datalist) gets those of its label. `group` is the data set's name (`_groups`). A
    case whose image or label is gone or unreadable has an "error", so that it is named and not lost; with
    `allow_empty`, where masks are only watched, it is left out.

    Raises:
        ValueError: no case has a label on disk (without `allow_empty`).
        FileNotFoundError, ValueError: as in `load_cases`.
    """
    discover = not allow_empty
    cases = load_cases(datalist, dataset_dir, section, True, discover, allow_empty, output_dir)
    n_cases, cases = len(cases), [case for case in cases if "label" in case]
    for case in cases:
        if gone := [case[key] for key in ("image", "label") if not os.path.exists(case[key])]:
            case["error"] = f"{' and '.join(gone)} does not exist; bring it back, or take the case out of the datalist."
    if not any(os.path.exists(case["label"]) for case in cases) and not allow_empty:
        raise ValueError(f"none of the {n_cases} cases in {dataset_dir} has a label to be compared with.")
    untagged = [case for case in cases if not {"slice_labels", "error"} & set(case)]
    usable, skipped, _ = tag_cases(untagged, target_labels=target_labels, slice_axis=slice_axis)
    tagged = {case["case"]: case for case in usable} | {name: {"error": why} for name, why in skipped.items()}
    return [
        {key: value for key, value in case.items() if key != "label"}
        | {"image_file": case["image"], "label_file": case["label"], "group": group}
        for case, group in zip((case | tagged.get(case["case"], {}) for case in cases), _groups(cases, dataset_dir))
        if "error" not in case or not allow_empty
    ]


def _groups(cases: Sequence[dict], dataset_dir: str | Path) -> list[str]:
    """Name the data set of each case: the folder in `dataset_dir` that holds several, else `dataset_dir` itself."""
    root = os.path.abspath(dataset_dir)
    places = [Path(os.path.relpath(case["image"], root)).parts for case in cases]
    folders = [place[0] if len(place) > 2 and place[0] != ".." else "" for place in places]
    several = 1 < len(set(folders)) < len(folders)
    return [folder if folder and several else os.path.basename(root) for folder in folders]


def _same(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _check_lists(path: Path, content: Mapping, lists: Mapping[str, list], folders: Sequence[Path]) -> None:
    """Logs what would be lost or counted twice: lists under another name, and images that are listed more than once."""
    others = {key: value for key, value in content.items() if key not in lists and isinstance(value, list)}
    others = sorted(key for key, value in others.items() if any(isinstance(item, dict) for item in value))
    items = [(key, item if isinstance(item, dict) else {"image": item}) for key in lists for item in lists[key]]
    listed = (
        Listed(flat_name(item.get("case", stem_of(item["image"]))), item["image"], key, str(item.get("channel")))
        for key, item in items if isinstance(item.get("image"), str)
    )  # fmt: skip
    _warn_once(path, tuple(others), tuple(listed), tuple(folders))


@cache  # a run reads its datalist several times
def _warn_once(path: Path, others: Sequence[str], listed: Sequence[Listed], folders: Sequence[Path]) -> None:
    for key in others:
        logger.warning("%s: %r is no section, its cases are left out; sections are %s.", path, key, ", ".join(SECTIONS))
    twice = [", ".join(f"{one.case} ({one.section})" for one in same) for same in same_images(listed, folders)]
    if twice:
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        logger.warning(
            "%s: an image is listed more than once, or a link or a copy of it is: %s%s. It counts as often, and in "
            "training and test it makes results too good; keep one.", path, "; ".join(twice[:3]), more
        )  # fmt: skip


def _read_sections(path: Path, section: str | Sequence[str] | None, build: str, folders: Sequence[Path]) -> list[dict]:
    asked = [section] if isinstance(section, str) else list(section or ())
    asked = [] if asked == ["all"] else asked
    content = read_json(path)
    lists = {key: content[key] for key in dict.fromkeys([*SECTIONS, "untagged", *asked]) if key in content}
    if bad := [key for key, items in lists.items() if not isinstance(items, list)]:
        raise ValueError(f"datalist {path}: {bad[0]} must be a list of cases; got {lists[bad[0]]!r:.40}.")
    held = ", ".join(f"{key} ({len(items)} cases)" for key, items in lists.items()) or "none"
    if missing := [key for key in asked if key not in lists]:
        raise ValueError(f"datalist {path} has no section {', '.join(missing)}; its sections: {held}. {build}")
    _check_lists(path, content, lists, folders)
    # a decathlon list may hold bare paths
    items = [item if isinstance(item, dict) else {"image": item} for key in asked or lists for item in lists[key]]
    items = [{key: value for key, value in item.items() if value is not None} for item in items]
    for item in items:
        for key, (rule, fits) in RULES.items():
            if not fits(item.get(key)):
                raise ValueError(f"every case of {path} must have {rule}; got {item.get(key)!r:.40} in {item!r:.200}.")
    return items


def _absolute(item: dict, folders: Sequence[Path]) -> dict:
    """Join the paths to the first folder in which they exist (else to the first), and name a case without a name."""
    item = item | {"case": flat_name(item.get("case", stem_of(item["image"])))}
    for key in {"image", "label"} & set(item):
        paths = [os.path.normpath(folder / item[key]) for folder in folders]
        item[key] = next((path for path in paths if os.path.exists(path)), paths[0])
    return item


def check_cases(
    items: Sequence[dict], require_labels: bool = True, with_label: bool = False, slice_axis: int = 2
) -> dict[str, int]:
    """Check a data set before the work: images are readable and 3D, tags fit the slices, masks fit the images.

    Args:
        items: cases as from `load_cases`.
        require_labels: every case must have `slice_labels`, and all together both tags.
        with_label: the `label` of a case that has one must agree with the image in shape and affine.
        slice_axis: stored axis that the tags index.

    Returns:
        `{"n_cases", "n_slices", "n_positive"}`; slices of tagged cases.

    Raises:
        ValueError: some cases have problems; the message lists 20 of them, and how many more there are.
    """
    problems = []
    for item in items:
        try:
            _check_case(item, require_labels, with_label, slice_axis)
        except UNREADABLE as error:
            problems.append(f"{item['case']}: {one_line(error)} ({item['image']})")
    tags = [tag for item in items for tag in item.get("slice_labels", ())]
    if require_labels and not problems and set(tags) != {0, 1}:
        problems.append(f"slice_labels must hold both 0 and 1; got {sum(tags)} ones in {len(tags)} slices.")
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("\n  ".join([f"{len(problems)} problem(s) in the data set:", *problems[:20], *more]))
    return {"n_cases": len(items), "n_slices": len(tags), "n_positive": sum(tags)}


def _check_case(item: dict, require_labels: bool, with_label: bool, slice_axis: int) -> None:
    check_name(item["case"])
    if "error" in item:
        raise ValueError(item["error"])
    if missing := [key for key in ("image", "label") if key in item and not os.path.exists(item[key])]:
        if with_label or "image" in missing:
            raise FileNotFoundError(f"the {missing[0]} {item[missing[0]]} does not exist.")
    shape, _ = read_geometry(item["image"], item.get("channel"))
    tags = item.get("slice_labels")
    if tags is None and require_labels:
        raise ValueError("it has no slice_labels.")
    if tags is not None and len(tags) != shape[slice_axis]:
        raise ValueError(f"it has {len(tags)} slice_labels, but axis {slice_axis} of its shape {shape} differs.")
    if not set(tags or ()) <= {0, 1}:
        raise ValueError(f"slice_labels must be 0 or 1; got {sorted(set(tags))}.")
    if with_label and "label" in item:
        check_label(item["label"], item["image"])
