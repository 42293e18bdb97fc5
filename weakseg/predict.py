"""Inference and evaluation, with the weights of a bundle or of a training of one's own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom_modules.files import read_json
from weakseg.bundles import bundle_folder, checked_knobs, config_files, next_command, run_bundle
from weakseg.train import read_record

RESERVED = {"dataset_dir": "DIR", "output_dir": "--out", "bundle_root": "--bundle"}
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
    own = _of_training(options, record, evaluation) if record else {}
    values = checked_knobs(knobs, ConfigParser.load_config_files(files), RESERVED)
    run_bundle(files, "run", fixed | own | values, options.debug)


def _of_training(options: Namespace, record: Mapping, evaluation: bool) -> dict[str, Any]:
    """Returns the knobs that follow from a training: weights, settings of slices and network, cases held out."""
    knobs = {name: value for name, value in record["knobs"].items() if name.replace("::", "#").split("#")[0] in SHARED}
    datalist = options.model.absolute() / record["datalist"]
    if evaluation and datalist.is_file() and (section := _held_out(read_json(datalist), options.folder)):
        knobs |= {"datalist": datalist, "section": section}
    return knobs | {"ckpt_path": options.model.absolute() / record["weights"]}


def _held_out(datalist: Mapping, folder: Path) -> str | None:
    """Returns the section of a datalist whose cases, in `folder`, have a mask and took no part in training."""
    for section in ("test", "untagged"):
        if any("label" in case and (folder / case["label"]).exists() for case in datalist.get(section, ())):
            return section
    return None


def _print_report(options: Namespace) -> None:
    if (options.out / "report.html").is_file():
        print(f"report     {options.out / 'report.html'}")
