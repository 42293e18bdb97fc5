"""Training: a folder and its tags become weights in RUN, and the same command continues what was stopped."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from custom_modules.data.__main__ import build_datalist, label_values
from custom_modules.files import sha256, write_json
from weakseg.bundles import HOME, RECORD, bundle_folder, checked_knobs, config_files, read_record, run_bundle

RESERVED = {"dataset_dir": "DIR", "output_dir": "--out", "bundle_root": "--bundle", "datalist": "--datalist or --tags"}
PLACES = ("ckpt_dir", "model_path", "resume_dir")  # knobs of where weights are written
MACHINE = ("device", "num_workers", "amp")  # knobs that may differ when a training continues
CHECKPOINTS = "checkpoint_epoch=*.pt"


def train(options: Namespace, knobs: Mapping[str, list[str]]) -> tuple[Path, list[str]]:
    """Trains a bundle on the tagged volumes of a folder; returns the path of the weights, and the volumes left out.

    Raises:
        KeyboardInterrupt: it was stopped; the message says where.
        ValueError: RUN holds another training, or the weights would replace those of a bundle.
    """
    from monai.bundle import ConfigParser

    bundle, run = bundle_folder(options.bundle), options.out.resolve()
    config = ConfigParser.load_config_files(config_files(bundle, "train"))
    values = checked_knobs(knobs, config, RESERVED)
    if "annotated" in values or any(values.get(name, "").startswith(("$", "@", "%")) for name in PLACES):
        raise ValueError(f"{' and '.join(PLACES)} must be paths, and annotated is for MONAI Label alone.")
    checkpoints = Path(values.get("ckpt_dir", run / "models"))
    weights = Path(values.get("model_path", checkpoints / "model.pt")).resolve()
    _check_place(run, weights)
    name = bundle.name if bundle.parent == HOME else str(bundle)
    record = {"bundle": name, "weights": os.path.relpath(weights, run), "knobs": values}
    begun = any(checkpoints.rglob(CHECKPOINTS)) and (run / RECORD).is_file()  # else nothing was trained yet
    if begun:
        _check_same(run, record)
    datalist, skipped = run / "datalist.json", []
    if options.datalist:
        datalist = options.datalist.absolute()
    else:
        skipped = _build(options, datalist, checkpoints, values)
    record |= {"datalist": os.path.relpath(datalist, run), "datalist_sha256": sha256(datalist)}
    if begun and read_record(run).get("datalist_sha256", record["datalist_sha256"]) != record["datalist_sha256"]:
        raise ValueError(f"{run} holds a training with other tags or volumes; give another folder as --out.")
    write_json(run / RECORD, record)
    fixed = {"bundle_root": bundle, "dataset_dir": options.folder.absolute(), "output_dir": run, "datalist": datalist}
    fixed |= {"tracking": bundle / "configs" / f"{options.tracking}.yaml"} if options.tracking else {}
    try:
        run_bundle(config_files(bundle, "train"), "training", fixed | values, options.debug)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(stopped(checkpoints, config | values)) from None
    return weights, skipped


def stopped(checkpoints: Path, config: Mapping) -> str:
    """Says up to where a training has come, by the newest checkpoint below its folder."""
    found = sorted(checkpoints.rglob(CHECKPOINTS), key=lambda path: path.stat().st_mtime)
    if not found:
        return "stopped before the end of epoch 1"
    epoch, first = int(found[-1].stem.rpartition("=")[2]), found[-1].parent == checkpoints
    total = int(config["max_epochs"] if first else config["segmenter_epochs"])
    if epoch == total:
        return f"stopped after stage {'1' if first else '3'} of 3"
    return f"stopped after epoch {epoch} of {total} (stage {'1' if first else '3'} of 3)"


def _check_place(run: Path, weights: Path) -> None:
    """Checks that no weights are replaced but those of an earlier start of the same training."""
    if weights.parent.name == "models" and (weights.parents[1] / "configs" / "metadata.json").is_file():
        raise ValueError(f"{weights} is the place of a bundle's own weights, which are never overwritten; "
                         "give another folder as --out.")  # fmt: skip
    if weights.is_file() and not (run / RECORD).is_file():
        raise ValueError(f"{weights} exists and is of another training; give another folder as --out.")


def _check_same(run: Path, record: Mapping) -> None:
    """Checks that the training in `run` has the same bundle and knobs."""
    found = read_record(run)
    before, now = ({"bundle": r["bundle"]} | r["knobs"] for r in (found, record))
    differing = [
        f"{name} was {before.get(name, 'the default')} and is now {now.get(name, 'the default')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name) and name not in MACHINE
    ]
    if differing:
        raise ValueError(f"{run} holds a training with other settings: {'; '.join(differing)}. Repeat the command as "
                         "it was to continue, or give another folder as --out.")  # fmt: skip


def _build(options: Namespace, datalist: Path, checkpoints: Path, values: Mapping[str, str]) -> list[str]:
    """Writes the datalist; one that a training has begun with is not replaced by another. Returns cases left out."""
    before = datalist.read_bytes() if datalist.is_file() and any(checkpoints.rglob(CHECKPOINTS)) else None
    skipped = build_datalist(
        options.folder,
        datalist,
        tags=options.tags,
        first_slice=options.first_slice,
        target_labels=label_values(values["target_labels"]) if "target_labels" in values else None,
        slice_axis=int(values.get("slice_axis", 2)),
        hold_out=False,
        output_dir=datalist.parent,
    )
    if before not in (None, datalist.read_bytes()):
        datalist.write_bytes(before)
        raise ValueError(
            f"{datalist.parent} holds a training with other tags or volumes; give another folder as --out."
        )
    return list(skipped)
