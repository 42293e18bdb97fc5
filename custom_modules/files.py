"""Writing results so that a file is either whole or absent: a full disk or a kill never leaves half a mask."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path


def read_json(path: str | Path) -> dict:
    """Content of a JSON file; a ValueError names the file that is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, or of the files of a folder (a DICOM series) one after the other by name, in hexadecimal."""
    path, digest = Path(path), hashlib.sha256()
    for part in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


DAY = 24 * 60 * 60  # s


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; when that went well, it is renamed to `path`, and else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_partial(folder: str | Path) -> None:
    """Removes what a killed process left of `atomic_path` in a folder more than a day ago.

    What is younger may be of a process that still writes, on this machine or another.
    """
    for aside in Path(folder).glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):  # its process, or another that cleans up, was faster
            if time.time() - aside.stat().st_mtime > DAY:
                aside.unlink()


def result_file(output_dir: str | Path, stem: str, ending: str) -> Path:
    """Where a file of one case's result stands: `<output_dir>/<stem>/<stem>_<ending>`."""
    return Path(output_dir) / stem / f"{stem}_{ending}"


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` as indented JSON, lists of numbers in one line; NaN is an error."""
    text = json.dumps(content, indent=2, allow_nan=False)
    text = re.sub(r"\[\n[^]\[{}\"]*\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text)
    with atomic_path(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def read_record(path: str | Path) -> dict:
    """What `write_json` wrote; {} where that is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
