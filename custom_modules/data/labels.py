"""Label volumes: read as stored, checked against their images, and reduced to their target."""

from __future__ import annotations

import filecmp
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from custom_modules.data.dicom import series_files
from custom_modules.data.geometry import stored_geometry
from custom_modules.data.reader import load_nifti, open_nifti
from custom_modules.files import read_json

logger = logging.getLogger(__name__)


def choose_target(
    datalist: str | Path | None, dataset_dir: str | Path, given: Sequence[int] | int | None, default: Sequence[int]
) -> list[int]:
    """Chooses the label values of the target: those that the datalist was built with, or else `given`, or `default`.

    Args:
        datalist: JSON file; None: `datalist.json` in `dataset_dir`. It need not exist, nor name a target: one that was
            built from a CSV of tags names none unless it was told.
        dataset_dir: folder of the volumes.
        given: the knob `target_labels`; one value, or several; None: not given.
        default: the bundle's own. A datalist that names other values is believed, with a warning.

    Returns:
        Label values; empty: all above 0.

    Raises:
        ValueError: `given` differs from the datalist's, or holds anything but whole numbers.
    """
    values = [given] if isinstance(given, int) else given
    if values is not None and (isinstance(values, str) or not all(isinstance(value, int) for value in values)):
        raise ValueError(f'target_labels must be label values, such as --target_labels "[1,4]"; got {given!r}.')
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    named = read_json(path).get("target_labels") if path.is_file() else None
    if named is None:
        return list(default if values is None else values)
    if not isinstance(named, list) or not all(isinstance(value, int) for value in named):
        raise ValueError(f"target_labels of {path} must be a list of whole numbers; got {named!r:.40}.")
    if values is not None and set(values) != set(named):
        raise ValueError(
            f"target_labels must be those of {path}, whose tags are of {named or 'all values above 0'}; got {values}. "
            "Leave the knob out, or build a datalist of the other target (python -m custom_modules.data)."
        )
    if set(named) != set(default):
        logger.warning("the target is that of %s, label values %s, not the bundle's own, %s", path,
                       named or "above 0", list(default) or "above 0")  # fmt: skip
    return list(named)


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
    """Read a label volume on the grid of its image: a NIfTI file, or a folder of PNGs (CHAOS) of a DICOM series.

    A NIfTI file that is stored in another orientation than its image is turned. PNG i in the order of names belongs to
    DICOM file i in the order of names. The slices are then put into the order in which MONAI's `ITKReader` stacks the
    series: by position, which may be the reverse of the names.

    Args:
        path: NIfTI file or folder of PNGs.
        image: its image; None: the label is read as stored, PNGs for the series in `DICOM_anon` beside them.

    Returns:
        (H, W, D) int32, aligned with the stored array of the image.

    Raises:
        ValueError: the label is not 3D, holds other values than whole numbers from 0, or does not fit the image
            (`check_label`); there is not one grey PNG of one size per DICOM file.
    """
    path = Path(path)
    if path.is_dir() and image is not None and not os.path.isdir(image):
        raise ValueError(f"label {path} is a folder, but {image} is no DICOM series; give a NIfTI file as the label.")
    if path.is_dir():
        array = _load_pngs(path, Path(image or path.with_name("DICOM_anon")))
        if image is not None:
            _check_shape(array.shape, stored_geometry(image)[0])
        return array
    label = load_nifti(path)
    array = np.asanyarray(label.dataobj)
    array = array.reshape(array.shape[:3]) if math.prod(array.shape[3:]) == 1 else array
    if array.ndim != 3 or not np.isfinite(array).all():
        raise ValueError(f"label {path} must be a 3D volume of finite values; got shape {array.shape}.")
    if image is not None:
        array = nib.apply_orientation(array, _turn(label, path, image))
    whole = np.rint(array, dtype=np.float64)
    wrong = (np.abs(array - whole) > 0.01) | (whole < 0) | (whole >= 2**31)
    if wrong.any():  # a probability, a mask that was interpolated, 255 as int8
        raise ValueError(f"label {path} must hold whole numbers from 0; got {array[wrong][0]:g}; save it as uint8.")
    return whole.astype(np.int32)


def check_label(path: str | Path, image: str | Path) -> None:
    """Check that a label has the shape of its image and, between NIfTI files, its affine (to 0.01 mm), once turned.

    Raises:
        ValueError: it has not.
    """
    if os.path.isdir(path):
        load_label(path, image)
    else:
        _turn(open_nifti(path), path, image)


def _turn(label: nib.Nifti1Image, path: str | Path, image: str | Path) -> np.ndarray:
    """Find the flips and the order of axes (3, 2), as nibabel has them, that bring a label onto its image."""
    if os.path.isfile(image) and filecmp.cmp(path, image, shallow=False):
        raise ValueError(f"label {path} is its image, or a copy of it; name the mask.")
    shape, affine = stored_geometry(image)
    own, wanted = nib.io_orientation(label.affine), nib.io_orientation(affine)
    turn = nib.orientations.ornt_transform(own, wanted)
    turned = label.affine @ nib.orientations.inv_ornt_aff(turn, label.shape[:3])
    _check_shape(tuple(np.array(label.shape[:3])[np.argsort(turn[:, 0])].tolist()), shape)
    if not np.allclose(turned, affine, atol=1e-2):
        raise ValueError("the label's affine differs from the image's.")
    return turn


def _check_shape(label: Sequence[int], image: Sequence[int]) -> None:
    if tuple(label) != tuple(image[:3]):
        raise ValueError(f"the label's shape {tuple(label)} differs from the image's {tuple(image[:3])}.")


def _load_pngs(folder: Path, series: Path) -> np.ndarray:
    import itk  # slow to import, and NIfTI data do without

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
    """Give a sort key that puts slice 2 before slice 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
