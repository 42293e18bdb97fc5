"""Shape and affine of a stored volume."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from custom_modules.data.dicom import read_series

UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, ImageFileError)


def read_geometry(image: str | Path, channel: int | None = None) -> tuple[tuple[int, ...], np.ndarray]:
    """Read shape (H, W, D) and affine (4, 4), RAS in mm, of a stored volume; of a NIfTI file only the header.

    Raises:
        ValueError: the volume is neither 3D nor 4D with that `channel`; the folder is not one DICOM series.
    """
    if os.path.isdir(image):
        from monai.data import ITKReader

        read_series(image)  # raises where ITKReader would read what is not a volume, with a warning at most
        reader = ITKReader()
        array, meta = reader.get_data(reader.read(image))
        shape, affine = tuple(array.shape), np.asarray(meta["affine"])
    else:
        header = nib.load(image)
        shape, affine = tuple(header.shape), header.affine
    if len(shape) == 4 and (shape[3] == 1 or (channel is not None and 0 <= channel < shape[3])):
        shape = shape[:3]
    if len(shape) != 3:
        wanted = "a 3D volume" if channel is None else f"a 3D volume, or 4D with channel {channel}"
        raise ValueError(f"the volume must be {wanted}; got shape {shape}.")
    return shape, affine


def one_line(error: Exception) -> str:
    """Put the message of an error on one line; an error without a message gives its type."""
    return " ".join(str(error).split()) or type(error).__name__
