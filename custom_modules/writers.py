"""Writing results so that a file is either whole or absent: a full disk or a kill never leaves half a mask."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from monai.data import NibabelWriter

DAY = 24 * 60 * 60  # s


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
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
    """Removes what a killed process left of `whole` in a folder more than a day ago.

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
    with whole(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def read_record(path: str | Path) -> dict:
    """What `write_json` wrote; {} where that is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer through `whole`.

    A volume of one slice stays a volume; MONAI's writer drops its last axis together with the channel's.
    """

    def set_data_array(self, data_array, *args, **kwargs) -> None:
        super().set_data_array(data_array, *args, **kwargs)
        while self.data_obj.ndim < 3:
            self.data_obj = self.data_obj[..., None]

    def write(self, filename, verbose: bool = False, **kwargs) -> None:
        with whole(filename) as aside:
            super().write(aside, verbose=verbose, **kwargs)
