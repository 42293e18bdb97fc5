"""Writing results so that a file is either whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

from monai.data import NibabelWriter


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer, writing aside and renaming: a full disk or a kill never leaves half a mask.

    A volume of one slice stays a volume; MONAI's writer drops its last axis together with the channel's.
    """

    def set_data_array(self, data_array, *args, **kwargs) -> None:
        super().set_data_array(data_array, *args, **kwargs)
        while self.data_obj.ndim < 3:
            self.data_obj = self.data_obj[..., None]

    def write(self, filename, verbose: bool = False, **kwargs) -> None:
        target = Path(filename)
        aside = target.with_name(f".partial-{target.name}")
        try:
            super().write(aside, verbose=verbose, **kwargs)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` as indented JSON, aside first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{path.name}")
    try:
        aside.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
