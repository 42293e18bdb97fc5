"""`export.json`: what the files of an export were made from, so that a bundle is packed with its own ones only.

{"version": "0.5.0",
 "knobs": {},                                        those given to packing.export
 "from": {"models/model.pt": "<SHA-256>", ...},      the weights (of `ckpt_path`, where it was given), the configs
 "made": {"model.ts": "<SHA-256>", ...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from custom_modules.files import read_json, sha256

RECORD = "export.json"


def exported_files(folder: Path) -> list[Path]:
    """Lists the files in an export's folder without its record and hidden ones; none where there is no folder."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_file() and path.name != RECORD)


def describe(folder: Path, config: Path, weights: Path, knobs: Mapping) -> dict:
    """Returns the record of the export in `folder` from the bundle's inference `config`, `weights` and `knobs`."""
    metadata = config.with_name("metadata.json")
    sources = {"models/model.pt": weights, **{f"configs/{path.name}": path for path in (config, metadata)}}
    return {
        "version": read_json(metadata)["version"],
        "knobs": json.loads(json.dumps(knobs, default=str)),
        "from": {name: sha256(path) for name, path in sources.items()},
        "made": {path.name: sha256(path) for path in exported_files(folder)},
    }


def check(folder: Path, bundle: Path) -> list[Path]:
    """Lists the exported files in `folder`, made from `bundle` as it is now.

    Raises:
        ValueError: if some were made from anything else, or there is no record: what differs, and what to do.
    """
    files = exported_files(folder)
    if not files:
        return []
    remedy = f"Export {bundle.name} again (make export), or remove {folder}."
    try:
        record = read_json(folder / RECORD)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder} has no {RECORD} that says what its files were made from. {remedy}") from error
    now = describe(folder, bundle / "configs" / "inference.yaml", bundle / "models" / "model.pt", {})
    if problems := _differences(record, now):
        raise ValueError(f"{folder} holds no export of {bundle} as it is: {'; '.join(problems)}. {remedy}")
    return files


def _differences(record: Mapping, now: Mapping) -> list[str]:
    """Says where `record` and `now` differ; values of knobs, such as paths, are left out."""
    problems = []
    if knobs := record.get("knobs"):
        problems.append(f"it was made with --{' --'.join(knobs)}")
    if record.get("version") != now["version"]:
        problems.append(f"it is of version {record.get('version')}, the bundle of {now['version']}")
    for part, what in (("from", "{} was another file"), ("made", "{} was not made then, or differs")):
        then = record.get(part, {})
        names = sorted(name for name in {*then, *now[part]} if then.get(name) != now[part].get(name))
        problems += [what.format(name) for name in names]
    return problems
