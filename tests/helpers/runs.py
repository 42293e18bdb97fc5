"""A bundle's inference and evaluation on four small heads, and the comparison of their results."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import torch

from tests.helpers.bundles import TAGS, TINY, config, head, save_nifti

CASES = ("p0", "p1", "p2", "p3")
TIMES_AND_PLACES = ("seconds_per_slice", "image", "label", "finished", "command")
QUICK = [*TINY, "--method=cdm", "--num_draws=1", "--gate_threshold=0"]  # the gate lets all slices pass


def save_random_weights(trained: Path, path: Path) -> Path:
    """Saves random weights in the shapes of `trained`: a network of two epochs has empty maps."""
    generator = torch.Generator().manual_seed(0)
    state = torch.load(trained, weights_only=True)
    torch.save({name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in state.items()}, path)
    return path


def save_heads(root: Path) -> Path:
    """Saves four labelled heads as `test`, and as `validation` one whose image is broken."""
    lists = {"validation": [], "test": []}
    for seed, case in enumerate(("bad", *CASES)):
        image, lesion = head(seed)
        save_nifti(image, root / case / f"{case}_flair.nii.gz")
        save_nifti(lesion, root / case / f"{case}_seg.nii.gz")
        item = {"case": case, "image": f"{case}/{case}_flair.nii.gz", "label": f"{case}/{case}_seg.nii.gz"}
        lists["test" if case in CASES else "validation"].append(item | {"slice_labels": TAGS})
    (root / "bad" / "bad_flair.nii.gz").write_bytes(b"no volume")
    (root / "datalist.json").write_text(json.dumps(lists))
    return root


def command(data, out, weights, *more, overlays=("evaluate",)) -> list[str]:
    files = [config("brats_flair", "inference"), *(config("brats_flair", name) for name in overlays)]
    where = ["--dataset_dir", data, "--output_dir", out, "--ckpt_path", weights]
    return [str(word) for word in ("run", "--config_file", f"{files}", *where, *QUICK, *more)]


def lasting(value):
    """Leaves out what may differ: the seconds that the method took, and where the data are."""
    if isinstance(value, list):
        return [lasting(part) for part in value]
    if isinstance(value, dict):
        return {k: lasting(part) for k, part in value.items() if k not in TIMES_AND_PLACES}
    return value


def without_times(path: Path) -> object:
    """The content of a file that a run wrote, without times and places; bytes where there are none."""
    if path.suffix == ".json":
        return lasting(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return lasting(list(csv.DictReader(file)))
    if path.suffix in (".md", ".html"):
        text = path.read_text(encoding="utf-8")
        if "data-key" in text:  # the report of the cases: the key is a hash of places and seconds, too
            return re.sub(r'data-key="\w+"|\d{4}-\d\d-\d\d \d\d:\d\d', "", text)
        return len(text) > 0  # pages of a study have seconds all over
    return path.read_bytes()


def table(out: Path, name: str) -> list[dict]:
    with (out / "metrics" / name).open(newline="") as file:
        return lasting(list(csv.DictReader(file)))


def assert_same_results(out: Path, expected: Path) -> None:
    """Compares volumes and slice tables byte for byte, the rest except for times and places."""
    files = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == files
    for name in files:
        if name.endswith((".nii.gz", "per_slice.csv")):
            assert (out / name).read_bytes() == (expected / name).read_bytes(), name
        elif name.endswith(".json"):
            assert lasting(json.loads((out / name).read_text())) == lasting(json.loads((expected / name).read_text()))
    assert table(out, "per_volume.csv") == table(expected, "per_volume.csv")


def written(out: Path) -> dict[str, int]:
    """Tells when each case was finished: its provenance comes last."""
    found = out.glob("*/*_provenance.json")
    return {path.parent.name.removesuffix("_flair"): path.stat().st_mtime_ns for path in found}
