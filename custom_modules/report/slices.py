"""Slices the way they are viewed: from the stored grid to the radiological convention, and as small pictures."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from custom_modules.data.reader import open_nifti

QUALITY = 80  # of JPEG


@dataclass(frozen=True)
class View:
    """How the slices of a stored volume are turned to be viewed.

    Rows run towards the feet (in axial slices: the back), columns towards the patient's left (in sagittal: the back).

    Args:
        affine: (4, 4), to RAS mm.
        axis: stored axis along which the slices are counted.
    """

    affine: np.ndarray
    axis: int

    def plane(self, volume: np.ndarray, index: int) -> np.ndarray:
        """Returns slice `index` of a stored volume (H, W, D) as (rows, columns)."""
        (rows, down), (columns, right) = self._in_plane()
        plane = np.moveaxis(volume, (self.axis, rows, columns), (0, 1, 2))[index]
        return plane[::down, ::right]

    @property
    def pixel(self) -> tuple[float, float]:
        """Distance in mm between the rows and between the columns of a `plane`."""
        spacing = nib.affines.voxel_sizes(self.affine)
        return tuple(float(spacing[axis]) for axis, _ in self._in_plane())

    @property
    def sides(self) -> dict[str, str]:
        """The side of the patient (R, L, A, P, S, I) at the `left`, `right`, `top` and `bottom` of a `plane`."""
        down, right = (nib.io_orientation(self.affine)[axis, 0].astype(int) for axis, _ in self._in_plane())
        return {"left": "RAS"[right], "right": "LPI"[right], "top": "RAS"[down], "bottom": "LPI"[down]}

    def _in_plane(self) -> list[tuple[int, int]]:
        """Returns (stored axis, step) of the rows, then of the columns; the step leads towards L, P or I."""
        world = nib.io_orientation(self.affine).astype(int)  # a row a stored axis: which of x, y, z, and +1 for R, A, S
        axes = sorted((axis for axis in range(3) if axis != self.axis), key=lambda axis: -world[axis, 0])
        return [(axis, -int(world[axis, 1])) for axis in axes]


def is_placed(image: str | Path) -> bool:
    """Says whether a volume states where it lies in the patient: a DICOM series does, a NIfTI file may not.

    A header without sform and qform has voxel sizes in name only, and its left and right are unknown.
    """
    if os.path.isdir(image):
        return True
    header = open_nifti(image).header
    return bool(header["sform_code"] or header["qform_code"])


def picture_size(shape: Sequence[int], pixel: Sequence[float], limit: int) -> tuple[int, int]:
    """Returns (height, width) of a picture with square pixels: the longer side has `limit`, or no more than stored."""
    extent = np.multiply(shape, pixel)  # mm
    scale = min(limit / extent.max(), 1 / min(pixel))
    return tuple(max(1, round(float(side * scale))) for side in extent)


def jpeg(plane: np.ndarray, size: tuple[int, int]) -> str:
    """Encodes a slice (rows, columns), real in [0, 1], as a grey JPEG of `size` (height, width), in Base64."""
    grey = Image.fromarray(np.rint(255 * np.clip(plane, 0, 1)).astype(np.uint8))
    stream = io.BytesIO()
    grey.resize(size[::-1], Image.Resampling.BICUBIC).save(stream, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
