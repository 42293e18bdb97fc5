"""Shape and affine of a stored volume."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
from nibabel.filebasedimages import ImageFileError

from custom_modules.data.reader import VolumeReader, open_nifti

UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, ImageFileError)


def stored_geometry(image: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Read shape (H, W, D[, C]) and affine (4, 4), RAS in mm, of a stored volume; of a NIfTI file only the header."""
    if os.path.isdir(image):
        array, meta = VolumeReader().get_data(os.fspath(image))
        return tuple(array.shape), np.asarray(meta["affine"])
    header = open_nifti(image)
    return header.shape[:3] + tuple(n for n in header.shape[3:] if n > 1), header.affine


def read_geometry(image: str | Path, channel: int | None = None) -> tuple[tuple[int, ...], np.ndarray]:
    """Read shape (H, W, D) and affine (4, 4), RAS in mm, of a stored volume; of a NIfTI file only the header.

    Raises:
        ValueError: the volume is neither 3D nor 4D with that `channel`; the folder is not one DICOM series.
    """
    shape, affine = stored_geometry(image)
    if len(shape) == 4 and channel is not None and 0 <= channel < shape[3]:
        shape = shape[:3]
    if len(shape) != 3:
        wanted = "a 3D volume" if channel is None else f"a 3D volume, or 4D with channel {channel}"
        raise ValueError(f"{image} must be {wanted}; got shape {shape}.")
    return shape, affine


def one_line(error: Exception) -> str:
    """Put the message of an error on one line; an error without a message gives its type."""
    return " ".join(str(error).split()) or type(error).__name__
