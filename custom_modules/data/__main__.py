"""The command that builds a datalist: `python -m custom_modules.data LAYOUT --root DIR --output datalist.json`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from custom_modules.data.layouts import CHAOS_KIDNEYS, LAYOUTS, find_cases
from custom_modules.data.splits import (
    Listed,
    expand_splits,
    read_splits,
    same_images,
    split_cases,
    warn_of_patients_apart,
)
from custom_modules.data.tags import read_tags, tag_cases
from custom_modules.files import atomic_path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error of the user ends it with a message and exit code 1."""
    args = vars(_parse_args(argv))
    try:
        build_datalist(args.pop("root"), args.pop("output"), **args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m custom_modules.data", description="Build a datalist.")
    layouts = parser.add_subparsers(dest="layout", required=True, metavar="|".join(LAYOUTS))
    for layout, patterns in LAYOUTS.items():
        sub = layouts.add_parser(layout, help=f"images at {', '.join(patterns)}")
        sub.add_argument("--root", type=Path, required=True, help="folder (or single volume) to search")
        sub.add_argument("--output", type=Path, required=True, help="datalist to write (.json)")
        sub.add_argument("--glob", help=f"pattern of the images, relative to root (default: {' '.join(patterns)})")
        sub.add_argument("--tags", type=Path, help="CSV with the columns case,slice,label, read instead of masks")
        sub.add_argument("--first_slice", type=int, choices=(0, 1), default=0, help="number of the first slice in it")
        target = CHAOS_KIDNEYS if layout == "chaos" else "all above 0"
        sub.add_argument("--target_labels", type=label_values, nargs="+", metavar="VALUE",
                         help=f"mask values that make the target (default: {target})")  # fmt: skip
        sub.add_argument("--slice_axis", type=int, default=2, choices=(0, 1, 2), help="axis of the slices (default: 2)")
        sub.add_argument("--min_area", type=int, default=0,
                         help="a slice is positive if its target has more pixels than this (default: 0)")  # fmt: skip
        sub.add_argument("--folds", type=int, default=0, help="write N datalists, each with another fold as its test")
        sub.add_argument("--seed", type=int, default=0, help="seed of the random split (default: 0)")
        sub.add_argument("--splits", type=Path, help="JSON file with the splits or folds to use, by case name")
    args = parser.parse_args(argv)
    if args.target_labels is not None:
        args.target_labels = [value for values in args.target_labels for value in values]
    if args.min_area < 0:
        parser.error(f"--min_area must be 0 or more; got {args.min_area}")
    if args.splits and args.folds:
        parser.error("give --splits or --folds, not both: a file of splits defines its own folds")
    return args


def build_datalist(
    root: Path,
    output: Path,
    layout: str = "auto",
    glob: str | None = None,
    tags: Path | None = None,
    first_slice: int = 0,
    target_labels: Sequence[int] | None = None,
    slice_axis: int = 2,
    min_area: int = 0,
    folds: int = 0,
    seed: int = 0,
    splits: Path | None = None,
    hold_out: bool = True,
    output_dir: Path | None = None,
) -> dict[str, str]:
    """Find the cases, tag their slices, split them by patient, write the datalist (one per fold) and report.

    Args:
        root, output, ...: the options of the command; `layout` may also be `auto`.
        hold_out: False: all tagged cases are for training.
        output_dir: folder of results, in which no case is looked for.

    Returns:
        {case: why it was skipped}.

    Raises:
        ValueError: no case is usable, or an option does not fit them.
    """
    if target_labels is None and not tags:
        target_labels = CHAOS_KIDNEYS if layout == "chaos" else ()
    rule = {"target_labels": target_labels, "slice_axis": slice_axis, "min_area": min_area}
    cases = find_cases(root, layout, glob, output_dir)
    usable, skipped, notes = tag_cases(cases, read_tags(tags, first_slice) if tags else None, **rule)
    usable = _without_copies(usable, skipped)
    if not usable:
        raise ValueError("no usable case. " + " ".join(f"{case}: {why}" for case, why in skipped.items()))
    untagged = [item for item in usable if "slice_labels" not in item]
    divided, left_out = _divide([item for item in usable if "slice_labels" in item], splits, folds, seed, hold_out)

    target = f"label in {list(target_labels)}" if target_labels else "label > 0"
    source = f"tagged 1 in {tags}" if tags else f"with {target} on more than {min_area} pixels"
    print(f"{len(cases)} cases found in {root} ({layout}); positive slices are those {source}")
    for k, split in enumerate(divided):
        path = output if len(divided) == 1 else output.with_stem(f"{output.stem}_fold{k}")
        split |= {"untagged": untagged} if untagged else {}
        _write_datalist(path, split, root if root.is_dir() else root.parent, rule)
        _print_sections(path, split)
    _report("skipped", [f"{case}: {why}" for case, why in skipped.items()])
    _report("left out, not named in the splits", left_out)
    _report("notes", [f"{case}: {note}" for case, note in notes.items()])
    return skipped


def _without_copies(cases: list[dict], skipped: dict[str, str]) -> list[dict]:
    """Keep one case of each image, with tags if one has them; the others are named in `skipped`."""
    tagged_first = sorted(cases, key=lambda item: "slice_labels" not in item)
    listed = [Listed(item["case"], item["image"], item["case"], item.get("channel")) for item in tagged_first]
    for first, *copies in same_images(listed):
        skipped |= {copy.case: f"its image is a copy of that of {first.case}; keep one." for copy in copies}
    return [item for item in cases if item["case"] not in skipped]


def _divide(
    tagged: list[dict], splits: Path | None, folds: int, seed: int, hold_out: bool
) -> tuple[list[dict[str, list[dict]]], list[str]]:
    """Divide the tagged cases into one split, or one per fold; the second value names cases that have no place."""
    if splits:
        place = read_splits(splits)
        left_out = [item["case"] for item in tagged if item["case"] not in place]
        tagged = [item for item in tagged if item["case"] in place]
        _report("named in the splits, but not found", sorted(set(place) - {item["case"] for item in tagged}))
        if not tagged:
            raise ValueError(f"{splits} names none of the cases found: {', '.join(left_out[:5])} ...")
        warn_of_patients_apart(tagged, place)
        return expand_splits(tagged, place), left_out
    if hold_out:
        return split_cases(tagged, seed, folds=folds), []
    return [{"training": tagged, "validation": [], "test": []}], []


def _print_sections(path: Path, split: dict[str, list[dict]]) -> None:
    print(f"{path}\n  {'section':<12}{'cases':>7}{'slices':>8}{'positive':>10}")
    for name, items in split.items():
        tags = [tag for item in items for tag in item.get("slice_labels", ())]
        print(f"  {name:<12}{len(items):>7}{len(tags):>8}{sum(tags):>10}")


def label_values(word: str) -> tuple[int, ...]:
    """Read the values of "1", "1,4" or "[1,4]", as the bundles take them."""
    return tuple(int(value) for value in word.strip("[]").split(",") if value)


def _write_datalist(path: Path, split: dict[str, list[dict]], root: Path, settings: dict) -> None:
    """Write a datalist, one case per line, whole or not at all; paths become relative to `root`."""

    def line(item: dict) -> str:
        paths = {key: Path(os.path.relpath(item[key], root)).as_posix() for key in ("image", "label") if key in item}
        return "\n  " + json.dumps(item | paths)

    known = {key: value for key, value in settings.items() if value is not None}  # tags do not tell values of masks
    entries = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in known.items()]
    entries += [f" {json.dumps(name)}: [{','.join(map(line, items))}]" for name, items in split.items()]
    with atomic_path(path) as aside:
        aside.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def _report(title: str, lines: Sequence[str], limit: int = 20) -> None:
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    if lines:
        print("\n  ".join([f"{title} ({len(lines)}):", *lines[:limit], *more]))


if __name__ == "__main__":
    main()
