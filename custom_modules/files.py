"""Files: written whole or not at all, read as JSON, hashed, and named by their stems."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

DAY = 24 * 60 * 60  # s


def stem_of(path: str | Path) -> str:
    """Returns the name of a NIfTI file without `.nii` or `.nii.gz`, and that of anything else as it is."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(path).name)


def result_file(output_dir: str | Path, stem: str, ending: str) -> Path:
    """Returns the path of one file of a case's result: `<output_dir>/<stem>/<stem>_<ending>`."""
    return Path(output_dir) / stem / f"{stem}_{ending}"


def sha256(path: str | Path) -> str:
    """Hashes a file, or the files of a folder (a DICOM series) one after the other by name; hexadecimal SHA-256."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def read_json(path: str | Path) -> dict:
    """Reads a JSON file; a ValueError names the file that is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def read_json_or_empty(path: str | Path) -> dict:
    """Reads a JSON file that an interrupted run may not have written: {} where it is missing or broken."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` as indented JSON, lists of numbers on one line; NaN is an error."""
    text = json.dumps(content, indent=2, allow_nan=False)
    text = re.sub(r"\[\n[^]\[{}\"]*\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text)
    with atomic_path(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to and renames it to `path` at the end, or removes it after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_partial(folder: str | Path) -> None:
    """Removes what killed processes left of `atomic_path` in a folder more than a day ago.

    A younger file may belong to a process that is still writing, on this machine or another.
    """
    for aside in Path(folder).glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):  # its process, or another that cleans up, was faster
            if time.time() - aside.stat().st_mtime > DAY:
                aside.unlink()
