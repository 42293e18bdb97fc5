"""The one way in which volumes are read: NIfTI files and DICOM series, whole, and placed where viewers place them.

A NIfTI file may hold two affines, the sform and the qform. nibabel and the viewers take the sform where there is one;
MONAI's `NibabelReader` takes the qform where the voxel sizes in the header fit that one only. Everything here takes the
sform, so image, label, tags and result are on one grid.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from monai.data import ImageReader, NibabelReader
from monai.utils import ensure_tuple
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from custom_modules.data.dicom import RESCALE, per_slice, read_series, slice_planes
from custom_modules.files import NIFTI

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


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
        reader = NibabelReader(squeeze_non_spatial_dims=True)
        reader.filenames = (img,)
        array, meta = reader.get_data(load_nifti(img))
        return _near_zero(lay_out(array, "C")), meta


def lay_out(array: np.ndarray, order: str) -> np.ndarray:
    """Copies a volume (H, W, D) to `order` in memory, C or F, plane by plane, which stays in the cache: twice as fast
    as NumPy's own copy. Other arrays stay as they are."""
    if array.ndim != 3:
        return array
    out = np.empty(array.shape, array.dtype, order)
    for k in range(array.shape[1]):
        out[:, k] = array[:, k]
    return out


def _near_zero(array: np.ndarray) -> np.ndarray:
    """Takes off voxels what 32 bits cannot hold: an offset (near 1e8 they are multiples of 8), a tiny or huge unit."""
    low, high = array.min().item(), array.max().item()  # integers of 64 bits as such: they have more digits
    if 0 < high - low < 1e-30 or 1e30 < high - low < np.inf:
        return (array.astype(np.float64) - low) / (high - low)
    if high > low and np.spacing(np.float32(max(-low, high))) > 1e-3 * (high - low):
        array = array if array.dtype.kind in "iu" else array.astype(np.float64)
        return (array - low).astype(np.float64)
    return array


def _read_folder(folder: str) -> tuple[np.ndarray, dict]:
    import itk
    from monai.data import ITKReader

    headers = read_series(folder)  # raises where ITK would read what is not a volume, with a warning at most
    files = [header.filename for header in headers]
    # as real numbers: by default all slices get the type of the first
    try:
        array, meta = ITKReader().get_data(itk.imread(files if len(files) > 1 else files[0], pixel_type=itk.F))
    except RuntimeError as error:  # of ITK: lines of where and, last, what
        why = str(error).strip().splitlines()[-1]
        raise ValueError(f"ITK cannot read the series in {folder} ({why}); export it again, uncompressed.") from None
    meta["affine"] = _series_affine(headers, meta["affine"])
    meta["original_affine"] = meta["affine"].copy()
    return _real_values(array, headers), meta


def _series_affine(headers: Sequence[Dataset], affine: np.ndarray) -> np.ndarray:
    """Puts the slices of a series where its headers say: ITK believes SpacingBetweenSlices, even below 0.

    Args:
        headers: of the slices in order, or of all frames.
        affine: (4, 4) as ITK has it, RAS in mm.

    Returns:
        (4, 4), the third axis of which runs from the first position to the last.
    """
    positions, _ = slice_planes(headers)
    affine = np.array(affine)
    if len(positions) > 1:
        affine[:3, 2] = [-1, -1, 1] * (positions[-1] - positions[0]) / (len(positions) - 1)  # LPS -> RAS
        affine[:3, 3] = [-1, -1, 1] * positions[0]
    return affine


def _real_values(array: np.ndarray, headers: Sequence[Dataset]) -> np.ndarray:
    """Gives voxels (W, H, D), as ITK reads them, their values.

    ITK scales all frames of a file like the first, keeps padding as it is, and inverts MONOCHROME1 before the slopes.

    Raises:
        ValueError: there is not one slice or frame for each position, or all voxels are padding.
    """
    import itk

    scales = [per_slice(headers, "PixelValueTransformationSequence", name) for name in RESCALE]
    slopes, intercepts = (
        np.array([v if v is not None else n for v in values], float) for values, n in zip(scales, (1, 0))
    )
    if array.ndim != 3 or array.shape[2] != len(slopes):
        raise ValueError(f"{headers[0].filename} has {len(slopes)} positions for an image of shape {array.shape}.")
    if "PerFrameFunctionalGroupsSequence" in headers[0]:
        io = itk.GDCMImageIO.New(FileName=headers[0].filename)
        io.ReadImageInformation()
        array = (array - io.GetRescaleIntercept()) / io.GetRescaleSlope() * slopes + intercepts
    if inverted := headers[0].PhotometricInterpretation == "MONOCHROME1":
        greatest = -1 if headers[0].PixelRepresentation else 2 ** headers[0].BitsStored - 1  # of the stored values
        array = slopes * greatest + 2 * intercepts - array  # x = (greatest - stored) * slope + intercept
    ranges = np.array([_padding(header) for header in headers] * (len(slopes) // len(headers)))  # (D, 2)
    low, high = np.sort(slopes * ranges.T + intercepts, axis=0) + np.abs(slopes) / 2 * [[-1], [1]]
    padded = (array > low) & (array < high)
    if padded.all():
        raise ValueError(f"all voxels of {headers[0].filename} are padding by its PixelPaddingValue; remove that tag.")
    nothing = array[~padded].max() if inverted else min(array[~padded].min(), intercepts.min())  # of a stored 0
    array = np.where(padded, nothing, array)
    return (array.max() + array.min() - array if inverted else array).astype(np.float32)


def _padding(header: Dataset) -> tuple[float, float]:
    """Reads the least and the greatest stored value that mean: no image here. NaN where none does."""
    value = header.get("PixelPaddingValue")
    if value is None:
        return np.nan, np.nan
    kind = np.int16 if header.PixelRepresentation else np.uint16  # some exports write one as the other
    limits = (np.int64(v).astype(kind) for v in (value, header.get("PixelPaddingRangeLimit", value)))
    return tuple(sorted(map(float, limits)))


def open_nifti(path: str | Path) -> nib.Nifti1Image:
    """Opens a NIfTI file and checks its header.

    Raises:
        ValueError: it is no NIfTI file, has no voxels, they are not real numbers, or its affine is singular.
    """
    try:
        image = nib.load(path)
        kind = image.get_data_dtype()
    except FileNotFoundError:
        if os.path.exists(path):  # nibabel looks for it in lower case
            raise ValueError(f"{path} has an ending of mixed case; rename it to .nii or .nii.gz.") from None
        raise
    except (*DAMAGED, ImageFileError, HeaderDataError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} has no valid NIfTI header ({' '.join(str(error).split())}); export it again."
        ) from None
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"{path} is no volume (nibabel reads it as {type(image).__name__}); give one.")
    if image.dataobj.offset < image.header.sizeof_hdr:  # 0: nibabel would take the header for voxels
        raise ValueError(f"{path} has its voxels at byte {image.dataobj.offset}, in its header; export it again.")
    if min(image.shape, default=0) < 1:
        raise ValueError(f"{path} has the shape {image.shape}, no voxels; export it again.")
    if kind.kind not in "biuf":
        raise ValueError(f"{path} holds voxels of type {kind} (complex or colour); save one real number per voxel.")
    grid = image.affine[:3, :3]
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(grid)) <= 1e-6 * np.linalg.norm(grid, axis=0).prod():
        raise ValueError(f"{path} has an affine that is no grid, {image.affine[:3].tolist()}; correct its header.")
    return image


def load_nifti(path: str | Path) -> nib.Nifti1Image:
    """Opens a NIfTI file, reads a compressed one into memory, and logs where sform and qform disagree,
    or lengths are not in mm.

    The checksum is the last thing in a `.nii.gz`: nibabel stops before it, and a flipped bit goes unnoticed.

    Raises:
        ValueError: the file is damaged; see also `open_nifti`.
    """
    content = None
    if str(path).lower().endswith(".gz"):
        try:
            content = gzip.decompress(Path(path).read_bytes())
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged ({error}); copy or export it again.") from None
    image = open_nifti(path)
    size = os.path.getsize(path) if content is None else len(content)
    needed = image.dataobj.offset + math.prod(image.shape) * image.dataobj.dtype.itemsize
    if size < needed:
        raise ValueError(f"{path} is damaged ({size} bytes, of {needed} by its header); copy or export it again.")
    image = image if content is None else image.from_bytes(content)  # of its class
    unit = {1: "metres", 3: "microns"}.get(int(image.header["xyzt_units"]) & 7)
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    if unit or sizes.min() < 0.01 or sizes.max() > 100:
        lengths = f"lengths in {unit}" if unit else f"voxels of {' x '.join(f'{size:.3g}' for size in sizes)}"
        logger.warning("%s: its header gives %s; they are read as mm, so ml and mm may be wrong.", path, lengths)
    if image.header["sform_code"] and image.header["qform_code"]:
        try:
            apart = np.abs(image.get_qform() - image.get_sform()).max()
        except (ValueError, HeaderDataError):  # a qform that is no rotation
            apart = np.inf
        if apart > 1e-2:
            logger.warning("%s: its sform and qform disagree (by %.4g); the sform is used.", path, apart)
    return image
