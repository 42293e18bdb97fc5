"""Datalists: how one is built from folders of volumes, read for training and inference, and checked before the work.

A datalist is MONAI's decathlon JSON: lists of cases under `training`, `validation` and `test`,

    {"case": "p1", "image": "p1/p1_flair.nii.gz", "slice_labels": [0, 1, ...], "label"?: ..., "channel"?: 0}

`slice_labels[i]` says whether index i of the stored array along `slice_axis` shows the target. Paths are relative to
the folder that was searched. Cases without tags stand under `untagged`: good for inference, of no use for training.

    python -m custom_modules.data brats --root DIR --output DIR/datalist.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from custom_modules.layouts import (
    CHAOS_KIDNEYS,
    LAYOUTS,
    UNREADABLE,
    check_label,
    find_cases,
    in_a_line,
    load_label,
    name_apart,
    read_geometry,
    read_tags,
    stem_of,
    tag_cases,
)
from custom_modules.splits import SECTIONS, expand_splits, read_json, read_splits, split_cases
from custom_modules.writers import whole

logger = logging.getLogger(__name__)


def load_cases(
    datalist: str | Path | None,
    dataset_dir: str | Path,
    section: str | Sequence[str] | None = None,
    with_label: bool = False,
    discover: bool = False,
    allow_empty: bool = False,
) -> list[dict]:
    """Read the cases of a datalist.

    Args:
        datalist: JSON file; None: `datalist.json` in `dataset_dir`.
        dataset_dir: folder that the paths are relative to; what is not there is sought beside the datalist.
        section: section or sections to read; None: all.
        with_label: keep the key `label`. Training does without, so that it cannot see a mask.
        discover: where there is no datalist, take what `find_cases` finds in `dataset_dir`.
        allow_empty: sections that are there but empty are no error (the validation of folds is), nor is no datalist
            at all in `dataset_dir` (MONAI Label trains without).

    Returns:
        `{"case", "image", "slice_labels"?, "label"?, "channel"?}`, with unique names and absolute paths.

    Raises:
        FileNotFoundError: no such folder, no datalist, or none of its images exists.
        ValueError: a section is missing, or all are empty (without `allow_empty`).
    """
    if not os.path.exists(dataset_dir):
        raise FileNotFoundError(f"dataset_dir {dataset_dir} does not exist.")
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    build = f"Build one: python -m custom_modules.data {'|'.join(LAYOUTS)} --root {dataset_dir} --output {path}"
    if path.is_file():
        folders = [Path(os.path.abspath(folder)) for folder in (dataset_dir, path.parent)]
        items = [_absolute(item, folders) for item in _read_sections(path, section, build)]
        if not items and not allow_empty:
            raise ValueError(f"no case in section {section or 'any'} of {path}: all asked for are empty. {build}")
        if items and not any(os.path.exists(item["image"]) for item in items):
            raise FileNotFoundError(f"none of the images of {path} exists, for example {items[0]['image']}. Set "
                                    f"dataset_dir to the folder that it was built with (--root). {build}")  # fmt: skip
        items = name_apart(items, folders[0])
    elif datalist is None and discover:
        items = find_cases(dataset_dir)
    elif datalist is None and allow_empty:
        items = []
    else:
        raise FileNotFoundError(f"datalist {path} does not exist. {build}")
    return [{key: value for key, value in item.items() if with_label or key != "label"} for item in items]


def labelled_cases(
    datalist: str | Path | None,
    dataset_dir: str | Path,
    section: str | Sequence[str] | None = None,
    target_labels: Sequence[int] | None = None,
    slice_axis: int = 2,
    allow_empty: bool = False,
) -> list[dict]:
    """Read the cases for evaluation: those with a label, all with `slice_labels`, `image_file` and `label_file`.

    A case that comes without tags (no datalist) gets those of its label. `group` is the folder above the case's own.

    Raises:
        ValueError: no case has a label on disk (without `allow_empty`); and what `load_cases` raises.
    """
    cases = load_cases(datalist, dataset_dir, section, True, discover=not allow_empty, allow_empty=allow_empty)
    with_label = [case for case in cases if "label" in case and os.path.exists(case["label"])]
    if not with_label and not allow_empty:
        raise ValueError(f"none of the {len(cases)} cases in {dataset_dir} has a label to be compared with.")
    tagged = [case for case in with_label if "slice_labels" in case]
    untagged = [case for case in with_label if "slice_labels" not in case]
    usable, skipped, _ = tag_cases(untagged, target_labels=target_labels, slice_axis=slice_axis)
    for case, why in skipped.items():
        logger.warning("case %s is left out: %s", case, why)
    return [
        {key: value for key, value in case.items() if key != "label"}
        | {"image_file": case["image"], "label_file": case["label"], "group": Path(case["image"]).parent.parent.name}
        for case in tagged + usable
    ]


def _read_sections(path: Path, section: str | Sequence[str] | None, build: str) -> list[dict]:
    asked = [section] if isinstance(section, str) else list(section or ())
    content = read_json(path)
    lists = {key: content[key] for key in dict.fromkeys([*SECTIONS, "untagged", *asked]) if key in content}
    held = ", ".join(f"{key} ({len(items)} cases)" for key, items in lists.items()) or "none"
    if missing := [key for key in asked if key not in lists]:
        raise ValueError(f"datalist {path} has no section {', '.join(missing)}; its sections: {held}. {build}")
    # a decathlon list may hold bare paths
    items = [item if isinstance(item, dict) else {"image": item} for key in asked or lists for item in lists[key]]
    if bad := [item for item in items if not isinstance(item.get("image"), str)]:
        raise ValueError(f"every case of {path} must have an image (a path); got {bad[0]}.")
    return items


def _absolute(item: dict, folders: Sequence[Path]) -> dict:
    """Join the paths to the first folder in which they exist (else the first), and name the case if it has no name."""
    item = {"case": stem_of(Path(item["image"]))} | item
    for key in {"image", "label"} & set(item):
        paths = [os.path.normpath(folder / item[key]) for folder in folders]
        item[key] = next((path for path in paths if os.path.exists(path)), paths[0])
    return item


def check_cases(
    items: Sequence[dict], require_labels: bool = True, with_label: bool = False, slice_axis: int = 2
) -> dict[str, int]:
    """Check a data set before the work: images readable and 3D, tags that fit the slices, masks that fit the images.

    Args:
        items: cases as from `load_cases`.
        require_labels: every case must have `slice_labels`, and the list both classes.
        with_label: a `label`, where a case has one, must agree with the image in shape and affine.
        slice_axis: the axis that the tags speak of.

    Returns:
        `{"n_cases", "n_slices", "n_positive"}`; slices of tagged cases.

    Raises:
        ValueError: lists the problems of all cases (20, and how many more).
    """
    problems = []
    for item in items:
        try:
            _check_case(item, require_labels, with_label, slice_axis)
        except UNREADABLE as error:
            problems.append(f"{item['case']}: {in_a_line(error)} ({item['image']})")
    tags = [tag for item in items for tag in item.get("slice_labels", ())]
    if require_labels and not problems and set(tags) != {0, 1}:
        problems.append(f"slice_labels must hold both 0 and 1; got {sum(tags)} ones in {len(tags)} slices.")
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("\n  ".join([f"{len(problems)} problem(s) in the data set:", *problems[:20], *more]))
    return {"n_cases": len(items), "n_slices": len(tags), "n_positive": sum(tags)}


def _check_case(item: dict, require_labels: bool, with_label: bool, slice_axis: int) -> None:
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
        label = item["label"]
        check_label(item, read_geometry(label)[0] if os.path.isfile(label) else load_label(label, item["image"]).shape)


# Command line


def _write_datalist(path: Path, split: dict[str, list[dict]], root: Path, settings: dict) -> None:
    """Write a datalist, a case per line, whole or not at all; paths become relative to `root`."""

    def line(item: dict) -> str:
        paths = {key: Path(os.path.relpath(item[key], root)).as_posix() for key in ("image", "label") if key in item}
        return "\n  " + json.dumps(item | paths)

    entries = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in settings.items()]
    entries += [f" {json.dumps(name)}: [{','.join(map(line, items))}]" for name, items in split.items()]
    with whole(path) as aside:
        aside.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m custom_modules.data", description="Build a datalist.")
    layouts = parser.add_subparsers(dest="layout", required=True, metavar="|".join(LAYOUTS))
    for layout, patterns in LAYOUTS.items():
        sub = layouts.add_parser(layout, help=f"images at {', '.join(patterns)}")
        target = CHAOS_KIDNEYS if layout == "chaos" else ()
        sub.add_argument("--root", type=Path, required=True, help="folder (or one volume) to search")
        sub.add_argument("--output", type=Path, required=True, help="datalist to write (.json)")
        sub.add_argument("--glob", help=f"pattern of the images, relative to root (default: {' '.join(patterns)})")
        sub.add_argument("--tags", type=Path, help="CSV case,slice,label in place of masks")
        sub.add_argument("--target_labels", type=int, nargs="+", default=target, metavar="VALUE",
                         help=f"mask values that make the target (default: {target or 'all above 0'})")  # fmt: skip
        sub.add_argument("--slice_axis", type=int, default=2, choices=(0, 1, 2), help="axis of slices (default: 2)")
        sub.add_argument("--min_area", type=int, default=0, help="pixels that a positive slice exceeds (default: 0)")
        sub.add_argument("--folds", type=int, default=0, help="write N datalists, each with one fold as its test")
        sub.add_argument("--seed", type=int, default=0, help="of the random split (default: 0)")
        sub.add_argument("--splits", type=Path, help="JSON of given splits or folds, by case name")
    args = parser.parse_args(argv)
    if args.min_area < 0:
        parser.error(f"--min_area must be 0 or more; got {args.min_area}")
    if args.splits and args.folds:
        parser.error("give --splits or --folds, not both: a file of splits has its own folds")
    return args


def _report(title: str, lines: Sequence[str], limit: int = 20) -> None:
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    if lines:
        print("\n  ".join([f"{title} ({len(lines)}):", *lines[:limit], *more]))


def _build(args: argparse.Namespace) -> None:
    """Find the cases, tag their slices, split them by patient, write the datalist (one per fold) and report."""
    rule = {key: getattr(args, key) for key in ("target_labels", "slice_axis", "min_area")}
    cases = find_cases(args.root, args.layout, args.glob)
    usable, skipped, notes = tag_cases(cases, read_tags(args.tags) if args.tags else None, **rule)
    if not usable:
        raise ValueError("no usable case. " + " ".join(f"{case}: {why}" for case, why in skipped.items()))
    tagged = [item for item in usable if "slice_labels" in item]
    untagged = [item for item in usable if "slice_labels" not in item]
    left_out: list[str] = []
    if args.splits:
        place = read_splits(args.splits)
        left_out = [item["case"] for item in tagged if item["case"] not in place]
        tagged = [item for item in tagged if item["case"] in place]
        if not tagged:
            raise ValueError(f"{args.splits} names none of the cases found: {', '.join(left_out[:5])} ...")
        splits = expand_splits(tagged, place)
    else:
        splits = split_cases(tagged, args.seed, folds=args.folds)

    target = f"label in {list(args.target_labels)}" if args.target_labels else "label > 0"
    source = args.tags or f"{target} on more than {args.min_area} pixels"
    print(f"{len(cases)} cases found in {args.root} ({args.layout}); a slice is positive by: {source}")
    for k, split in enumerate(splits):
        path = args.output if len(splits) == 1 else args.output.with_stem(f"{args.output.stem}_fold{k}")
        split |= {"untagged": untagged} if untagged else {}
        _write_datalist(path, split, args.root if args.root.is_dir() else args.root.parent, rule)
        print(f"{path}\n  {'section':<12}{'cases':>7}{'slices':>8}{'positive':>10}")
        for name, items in split.items():
            tags = [tag for item in items for tag in item.get("slice_labels", ())]
            print(f"  {name:<12}{len(items):>7}{len(tags):>8}{sum(tags):>10}")
    _report("skipped", [f"{case}: {why}" for case, why in skipped.items()])
    _report("left out, not named in the splits", left_out)
    _report("notes", [f"{case}: {note}" for case, note in notes.items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error ends it with a message and exit code 1."""
    try:
        _build(_parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
