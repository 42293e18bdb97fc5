"""The one way in which volumes are read: NIfTI files and DICOM series, whole, and placed where viewers place them.

A NIfTI file may hold two affines, the sform and the qform. nibabel and the viewers take the sform where there is one;
MONAI's `NibabelReader` takes the qform where the voxel sizes in the header fit that one only. Everything here takes the
sform, so image, label, tags and result are on one grid.
"""

from __future__ import annotations

import gzip
import logging
import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.data import ImageReader, NibabelReader
from monai.utils import ensure_tuple
from nibabel.spatialimages import HeaderDataError

from custom_modules.data.dicom import read_series, series_affine
from custom_modules.files import NIFTI

logger = logging.getLogger(__name__)


class VolumeReader(ImageReader):
    """Reads a NIfTI file or the folder of a DICOM series; `LoadImaged(reader=...)` leaves other files to MONAI.

    Raises:
        ValueError: the file is damaged, its voxels are not real numbers, or its affine is singular.
    """

    def verify_suffix(self, filename) -> bool:
        return all(NIFTI.search(str(path)) or os.path.isdir(path) for path in ensure_tuple(filename))

    def read(self, data, **kwargs) -> str:
        """Returns the path itself: `LoadImage` tries its other readers after an error here, but not in `get_data`."""
        (path,) = ensure_tuple(data)
        if not self.verify_suffix(path):
            raise ValueError(f"{path} is neither a NIfTI file nor a folder.")
        return os.fspath(path)

    def get_data(self, img: str) -> tuple[np.ndarray, dict]:
        if os.path.isdir(img):
            return _read_folder(img)
        reader = NibabelReader()
        reader.filenames = (img,)
        return reader.get_data(load_nifti(img))


def _read_folder(folder: str) -> tuple[np.ndarray, dict]:
    from monai.data import ITKReader

    headers = read_series(folder)  # raises where ITKReader would read what is not a volume, with a warning at most
    reader = ITKReader()
    array, meta = reader.get_data(reader.read(folder))
    meta["affine"] = series_affine(headers, meta["affine"])
    meta["original_affine"] = meta["affine"].copy()
    return array, meta


def open_nifti(path: str | Path) -> nib.Nifti1Image:
    """Opens a NIfTI file and checks its header.

    Raises:
        ValueError: its voxels are not real numbers, or its affine is singular.
    """
    try:
        image = nib.load(path)
        kind = image.get_data_dtype()
    except HeaderDataError as error:
        raise ValueError(f"{path} has no valid NIfTI header: {error}.") from None
    if kind.kind not in "biuf":
        raise ValueError(f"{path} holds voxels of type {kind} (complex or colour); save one real number per voxel.")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path} has an affine that is no grid, {image.affine[:3].tolist()}; correct its header.")
    return image


def load_nifti(path: str | Path) -> nib.Nifti1Image:
    """Opens a NIfTI file, reads a compressed one into memory, and logs where sform and qform disagree.

    The checksum is the last thing in a `.nii.gz`: nibabel stops before it, and a flipped bit goes unnoticed.

    Raises:
        ValueError: the file is damaged; see also `open_nifti`.
    """
    content = None
    if str(path).lower().endswith(".gz"):
        try:
            content = gzip.decompress(Path(path).read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}); copy or export it again.") from None
    image = open_nifti(path)
    image = image if content is None else image.from_bytes(content)  # of its class
    if image.header["sform_code"] and image.header["qform_code"]:
        try:
            apart = np.abs(image.get_qform() - image.get_sform()).max()
        except (ValueError, HeaderDataError):  # a qform that is no rotation
            apart = np.inf
        if apart > 1e-2:
            logger.warning("%s: its sform and qform disagree (by %.4g); the sform is used.", path, apart)
    return image
