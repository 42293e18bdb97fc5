"""Inference and evaluation, with the weights of a bundle or of a training of one's own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom_modules.files import read_json
from weakseg.bundles import bundle_folder, checked_knobs, config_files, next_command, read_record, run_bundle

RESERVED = {"dataset_dir": "DIR", "output_dir": "--out", "bundle_root": "--bundle"}
HELD_OUT = ("test", "untagged", "validation")  # sections that take no part in training
SHARED = ("image_size", "segmenter_size", "orientation", "slice_axis", "network_def", "target_labels")


def predict(options: Namespace, knobs: Mapping[str, list[str]]) -> None:
    """Segments the volumes of a folder, and prints what was written."""
    _run(options, knobs, ["inference"])
    masks = sorted(options.out.glob("*/*_mask.nii.gz"))
    print(f"\nmasks      {options.out}/CASE/CASE_mask.nii.gz ({len(masks)} cases), the saliency maps beside them")
    _print_report(options)
    weights = ("--model", options.model) if options.model else ("--bundle", options.bundle)
    next_command("evaluate", options.folder, *weights, "--out", f"{options.out}_evaluation", note="where masks exist")


def evaluate(options: Namespace, knobs: Mapping[str, list[str]]) -> None:
    """Segments the labelled volumes of a folder and compares, and prints what was written."""
    _run(options, knobs, ["inference", "evaluate"], evaluation=True)
    print(f"\nmeasures   {options.out}/metrics: summary.json, per_volume.csv, per_slice.csv")
    _print_report(options)


def _run(options: Namespace, knobs: Mapping[str, list[str]], names: Sequence[str], evaluation: bool = False) -> None:
    from monai.bundle import ConfigParser

    record = read_record(options.model) if options.model else None
    bundle = bundle_folder(record["bundle"] if record else options.bundle)
    files = config_files(bundle, *names)
    fixed = {"bundle_root": bundle, "dataset_dir": options.folder.absolute(), "output_dir": options.out.absolute()}
    values = checked_knobs(knobs, ConfigParser.load_config_files(files), RESERVED)
    own = _of_training(options, record) if record else {}
    if evaluation:
        own |= _cases(options, record, values)
    run_bundle(files, "run", fixed | own | values, options.debug)


def _of_training(options: Namespace, record: Mapping) -> dict[str, Any]:
    """Returns the knobs that follow from a training: weights, settings of slices and network."""
    knobs = {name: value for name, value in record["knobs"].items() if name.replace("::", "#").split("#")[0] in SHARED}
    return knobs | {"ckpt_path": options.model.absolute() / record["weights"]}


def _cases(options: Namespace, record: Mapping | None, given: Mapping[str, str]) -> dict[str, Any]:
    """Chooses what is evaluated, where the command line does not say it, and prints it.

    Of a datalist that is given, the first section in which a case has a mask; of the training's own, one that was held
    out. Without either, all volumes of the folder.
    """
    if "datalist" in given:
        datalist, sections = Path(given["datalist"]), (*HELD_OUT, "training")
    else:
        datalist = options.model.absolute() / record["datalist"] if record else Path()
        sections = (*HELD_OUT, "training") if "section" in given else HELD_OUT
    if not datalist.is_file():  # which the bundle says
        return {}
    content, own = read_json(datalist), {} if "datalist" in given else {"datalist": datalist}
    counts = {section: _masks(content.get(section), (options.folder, datalist.parent)) for section in sections}
    if "section" in given:
        return own if any(counts.values()) else {}
    for section, count in counts.items():
        if count:
            print(f"evaluates  section {section} of {datalist}, {count} cases with a mask (another: --section NAME)")
            return own | {"section": section}
    return {}


def _masks(items: Any, folders: Sequence[Path]) -> int:
    """Counts the cases of a section whose mask is in one of `folders`."""
    labels = [item["label"] for item in items or () if isinstance(item, dict) and isinstance(item.get("label"), str)]
    return sum(any((folder / label).exists() for folder in folders) for label in labels)


def _print_report(options: Namespace) -> None:
    if (options.out / "report.html").is_file():
        print(f"report     {options.out / 'report.html'}")
