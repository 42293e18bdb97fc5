"""Makes a bundle for another target: everything but the weights, which training puts into its models/.

    python -m packing.new_bundle liver --from chaos_kidney [--target_labels 1] [--label Liver] \\
      [--code 10200004 SCT Liver] [--description TEXT] [--authors TEXT] [--data_license TEXT]

What is not given is marked TODO: in the files, and `make dist` refuses the bundle until it is written.
docs/new_target.md goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from custom_modules import __version__
from custom_modules.files import read_json
from packing import configs
from packing.identity import TODO

README = f"""# {{name}}

{TODO} Made from {{source}} of version {{version}}; no weights yet. State here what it segments, what it was trained on,
and its results on patients that took no part in training.
"""
DATA_LICENSE = (
    f"{TODO} state here the licence of the data that the weights (models/*.pt) are trained on; it is theirs, too."
)


def metadata(source: dict, name: str, given: Mapping[str, str]) -> dict:
    """Returns the content of a new bundle's metadata.json: that of `source` without what was claimed for its target,
    with the texts `given`."""
    new = {key: value for key, value in source.items() if key not in ("eval_metrics", "data_source")}
    texts = {key: f"{TODO} {name}" for key in ("task", "description", "authors")}
    texts |= {key: f"{TODO} {name}" for key in ("image_classes", "label_classes", "pred_classes")}
    texts |= {key: value for key, value in given.items() if value}
    new |= {"name": name, "version": __version__, "changelog": {__version__: "first version"}, **texts}
    new["copyright"] = "Code: Apache-2.0. Weights: docs/data_license.txt."
    new["references"] = source["references"][:1]  # the method's; the others are of the data
    for kind in ("outputs", "post_processed_outputs"):
        new["network_data_format"][kind]["pred"]["channel_def"] = {"0": "background", "1": name}
    return new


def bundle_text(
    source: str, name: str, target_labels: Sequence[int], label: str | None = None, code: Sequence[str] | None = None
) -> str:
    """Returns a new bundle.yaml: that of `source` but for its name, its labels and the DICOM codes of its target."""
    lines = {
        r"  bundle_labels: ": f"{list(target_labels)}",
        r"  name: ": name,
        r"    label: ": label or name,
        # null: an error where it is needed, rather than masks with the name of another target
        r"    type: ": json.dumps(list(code)) if code else "null",
    }
    text = re.sub(r"^# [^:\n]*:", f"# {name}:", source)
    for start, value in lines.items():
        text = re.sub(rf"^{start}([^#\n]*[^# \n]) *", f"{start}{value}".ljust(45), text, count=1, flags=re.MULTILINE)
    text = re.sub(r"(bundle_labels: .*#).*", r"\1 mask values of the target, if no datalist names them", text)
    return re.sub(" +\n", "\n", text)


def new_bundle(
    name: str,
    source: Path,
    folder: Path,
    target_labels: Sequence[int] = (),
    label: str | None = None,
    code: Sequence[str] | None = None,
    data_license: str | None = None,
    **texts: str | None,
) -> Path:
    """Makes the bundle `<folder>/<name>` like the bundle `source`; returns its folder.

    Args:
        name: of the bundle.
        source: folder of another.
        folder: gets the bundle.
        target_labels: mask values of the target; empty: all above 0.
        label: the target in words, for DICOM Segmentations; None: `name`.
        code: the target's type as [value, coding scheme, meaning], likewise; None: to be written.
        data_license: terms of the data, for docs/data_license.txt; None: to be written.
        texts: of metadata.json, such as `description` and `authors`; None: to be written.

    Raises:
        ValueError: if the name does not suit a folder.
        FileNotFoundError: if `source` is no bundle.
        FileExistsError: if there is such a bundle.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"a bundle's name is letters, digits and underscores, a letter first; got {name!r}.")
    bundle, text = folder / name, (source / configs.BUNDLE).read_text(encoding="utf-8")
    if bundle.exists():
        raise FileExistsError(f"{bundle} already exists.")
    for part in ("configs", "docs", "models"):
        (bundle / part).mkdir(parents=True)
    (bundle / configs.BUNDLE).write_text(bundle_text(text, name, target_labels, label, code), encoding="utf-8")
    shutil.copy(source / "LICENSE", bundle)
    (bundle / "custom_modules").symlink_to(os.path.relpath(configs.REPO / "custom_modules", bundle.resolve()))
    content = metadata(read_json(source / "configs" / "metadata.json"), name, texts)
    (bundle / "configs" / "metadata.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    readme = README.format(name=name, source=source.name, version=__version__)
    (bundle / "docs" / "README.md").write_text(readme, encoding="utf-8")
    (bundle / "docs" / "data_license.txt").write_text(f"{data_license or DATA_LICENSE}\n", encoding="utf-8")
    configs.write(bundle)
    return bundle


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m packing.new_bundle", description="Make a bundle for a new target.")
    parser.add_argument("name", help="of the bundle and its folder, such as liver")
    parser.add_argument("--from", dest="source", required=True, help="bundle to start from: chaos_kidney, brats_flair")
    parser.add_argument("--target_labels", type=int, nargs="*", default=(), help="values in masks; default: above 0")
    parser.add_argument("--label", help="the target in words, for DICOM Segmentations; default: the name")
    parser.add_argument("--code", nargs=3, metavar=("VALUE", "SCHEME", "MEANING"), help="its type: 10200004 SCT Liver")
    parser.add_argument("--description", help="of the bundle, for metadata.json")
    parser.add_argument("--authors", help="of the bundle, for metadata.json")
    parser.add_argument("--data_license", help="terms of the data that the weights are trained on")
    parser.add_argument("--folder", type=Path, default=configs.REPO / "bundles", help="gets the bundle's folder")
    options = vars(parser.parse_args(arguments))
    try:
        bundle = new_bundle(source=configs.REPO / "bundles" / options.pop("source"), **options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{bundle}: edit {configs.BUNDLE}, then run python -m packing.configs {bundle}")


if __name__ == "__main__":
    main()
