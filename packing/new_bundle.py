"""Makes a bundle for another target: everything but the weights, which training puts into its models/.

    python -m packing.new_bundle liver --from chaos_kidney [--target_labels 1]

docs/new_target.md goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from custom_modules import __version__
from custom_modules.files import read_json
from packing import configs

README = """# {name}

Made from {source} of version {version}; no weights yet. State here what it segments, what it was trained on, and its
results on patients that took no part in training.
"""
DATA_LICENSE = "State here the licence of the data that the weights (models/*.pt) are trained on; it is theirs, too.\n"


def metadata(source: dict, name: str) -> dict:
    """Returns the content of a new bundle's metadata.json: that of `source` without what was claimed for its target."""
    target = f"{name}: edit metadata.json"
    new = {key: value for key, value in source.items() if key not in ("eval_metrics", "data_source")}
    texts = {key: target for key in ("task", "description", "authors")}
    texts |= {key: target for key in ("image_classes", "label_classes", "pred_classes")}
    new |= {"name": name, "version": __version__, "changelog": {__version__: "first version"}, **texts}
    new["copyright"] = "Code: Apache-2.0. Weights: docs/data_license.txt."
    new["references"] = source["references"][:1]  # the method's; the others are of the data
    for kind in ("outputs", "post_processed_outputs"):
        new["network_data_format"][kind]["pred"]["channel_def"] = {"0": "background", "1": name}
    return new


def bundle_text(source: str, name: str, target_labels: Sequence[int]) -> str:
    """Returns a new bundle.yaml: that of `source` but for its name, its labels and the DICOM codes of its target."""
    lines = {
        r"  target_labels: ": f"{list(target_labels)}",
        r"  name: ": name,
        r"    label: ": name,
        r"    type: ": "null",  # an error where it is needed, rather than masks with the name of another target
    }
    text = re.sub(r"^# [^:\n]*:", f"# {name}:", source)
    for start, value in lines.items():
        text = re.sub(rf"^{start}([^#\n]*[^# \n]) *", f"{start}{value}".ljust(45), text, count=1, flags=re.MULTILINE)
    text = re.sub(r"(target_labels: .*#).*", r"\1 label values of the target in masks; []: all above 0", text)
    return re.sub(" +\n", "\n", text)


def new_bundle(name: str, source: Path, folder: Path, target_labels: Sequence[int] = ()) -> Path:
    """Makes the bundle `<folder>/<name>` like the bundle `source`; returns its folder.

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
    (bundle / configs.BUNDLE).write_text(bundle_text(text, name, target_labels), encoding="utf-8")
    shutil.copy(source / "LICENSE", bundle)
    (bundle / "custom_modules").symlink_to(os.path.relpath(configs.REPO / "custom_modules", bundle.resolve()))
    content = metadata(read_json(source / "configs" / "metadata.json"), name)
    (bundle / "configs" / "metadata.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    readme = README.format(name=name, source=source.name, version=__version__)
    (bundle / "docs" / "README.md").write_text(readme, encoding="utf-8")
    (bundle / "docs" / "data_license.txt").write_text(DATA_LICENSE, encoding="utf-8")
    configs.write(bundle)
    return bundle


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m packing.new_bundle", description="Make a bundle for a new target.")
    parser.add_argument("name", help="of the bundle and its folder, such as liver")
    parser.add_argument("--from", dest="source", required=True, help="bundle to start from: chaos_kidney, brats_flair")
    parser.add_argument("--target_labels", type=int, nargs="*", default=(), help="values in masks; default: above 0")
    parser.add_argument("--folder", type=Path, default=configs.REPO / "bundles", help="gets the bundle's folder")
    options = parser.parse_args(arguments)
    try:
        source = configs.REPO / "bundles" / options.source
        bundle = new_bundle(options.name, source, options.folder, options.target_labels)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{bundle}: edit {configs.BUNDLE}, then run python -m packing.configs {bundle}")


if __name__ == "__main__":
    main()
