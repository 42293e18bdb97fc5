"""Label volumes: read as stored, and checked against their images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from custom_modules.data.dicom import series_files
from custom_modules.data.geometry import read_geometry


def target_mask(label: np.ndarray, target_labels: Sequence[int] | None) -> np.ndarray:
    """Marks where the values of `label` are among `target_labels` (None or empty: above 0).

    Args:
        label: label values, of any shape and real dtype; a tensor on the CPU will do.
        target_labels: label values that make the target.

    Returns:
        bool, the shape of `label`.
    """
    label = np.asarray(label)
    return np.isin(label, list(target_labels)) if target_labels else label > 0


def load_label(path: str | Path, image: str | Path | None = None) -> np.ndarray:
    """Read a label volume as stored: a NIfTI file, or a folder of PNGs (CHAOS) that belongs to a DICOM series.

    PNG i in the order of names belongs to DICOM file i in the order of names. The slices then take the order in which
    MONAI's `ITKReader` stacks the series: by position, which may be the reverse of the names.

    Args:
        path: NIfTI file or folder of PNGs.
        image: the DICOM folder that a folder of PNGs belongs to; default: `DICOM_anon` beside it.

    Returns:
        (H, W, D) int32, aligned with the stored array of the image.

    Raises:
        ValueError: not 3D or not finite; not one grey PNG of one size per DICOM file.
    """
    path = Path(path)
    if path.is_dir():
        return _load_pngs(path, Path(image or path.with_name("DICOM_anon")))
    array = np.asanyarray(nib.load(path).dataobj)
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    if array.ndim != 3 or not np.isfinite(array).all():
        raise ValueError(f"label {path} must be a 3D volume of finite values; got shape {array.shape}.")
    return (np.rint(array) if array.dtype.kind == "f" else array).astype(np.int32)


def _load_pngs(folder: Path, series: Path) -> np.ndarray:
    import itk  # slow to import, and NIfTI data need none of it

    files = series_files(series)
    pngs = [path for path in folder.glob("*.png") if not path.name.startswith(".")]
    if len(pngs) != len(files):
        raise ValueError(f"{folder} must hold a PNG per DICOM file; got {len(pngs)} PNGs, {len(files)} DICOM files.")
    png_of = dict(zip(sorted(files, key=_by_number), sorted(pngs, key=_by_number), strict=True))
    slices = [itk.array_from_image(itk.imread(str(png_of[file]))) for file in files]  # each (rows y, columns x)
    shapes = {s.shape for s in slices}
    if len(shapes) > 1 or slices[0].ndim != 2:
        raise ValueError(f"the PNGs of {folder} must be grey and of one size; got shapes {sorted(shapes)}.")
    return np.stack(slices).T.astype(np.int32)  # (z, y, x) -> (x, y, z), as ITKReader


def _by_number(path: Path) -> list:
    """Sort key that puts slice 2 before slice 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def check_label(item: dict, label_shape: Sequence[int]) -> None:
    """Raise ValueError where a label differs from its image in shape or, between NIfTI files, affine (0.01 mm)."""
    shape, affine = read_geometry(item["image"], item.get("channel"))
    if tuple(label_shape) != shape:
        raise ValueError(f"the label's shape {tuple(label_shape)} differs from the image's {shape}.")
    if os.path.isfile(item["label"]) and not np.allclose(nib.load(item["label"]).affine, affine, atol=1e-2):
        raise ValueError("the label's affine differs from the image's.")
