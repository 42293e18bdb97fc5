"""DICOM: the one series of a folder, checked slice by slice before it is read as a volume.

MONAI's `ITKReader` makes a volume of whatever a folder holds: it takes the first of several series, stretches the other
slices over a missing one, and loses the geometry of frames out of order, all with a warning at most.

pydicom and itk are imported where they are used: NIfTI data and the hosts of a bundle do without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset


OUTPUT_FORMATS = ("nifti", "dicom_seg")
TOLERANCE = 0.1  # allowed deviation of a slice from its evenly spaced place, in slice spacings


def check_source(case: Mapping, output_format: str) -> None:
    """Check the image of a case {"case", "image"} before it is read: a sound series, or a file if that is enough.

    Raises:
        ValueError: `output_format` is `dicom_seg` and the image is not a DICOM series, or has no frame of reference;
            the series is not a volume (`read_series`).
    """
    if Path(case["image"]).is_dir():
        headers = read_series(case["image"])
        if output_format == "dicom_seg" and not all(header.get("FrameOfReferenceUID") for header in headers):
            raise ValueError(
                f"case {case['case']!r}: the series in {case['image']} has no FrameOfReferenceUID, which a DICOM "
                "Segmentation needs; export it again with that tag, or give --output_format nifti."
            )
    elif output_format == "dicom_seg":
        raise ValueError(
            f"case {case['case']!r}: a DICOM Segmentation refers to a DICOM series, but {case['image']} is not one; "
            "give the folder of the series as dataset_dir, or --output_format nifti."
        )


def series_files(folder: str | Path) -> list[Path]:
    """List the files of the series in `folder`, in the order in which MONAI's `ITKReader` stacks them: by position.

    Raises:
        ValueError: there is no series, or there are several (by UID, size, slice thickness, ...).
    """
    import itk  # slow to import

    names = itk.GDCMSeriesFileNames.New()  # the calls of MONAI's ITKReader, hence its order of slices
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(str(folder))
    series = [[Path(name) for name in names.GetFileNames(uid)] for uid in names.GetSeriesUIDs()]
    if not series:
        raise ValueError(f"{folder} holds no DICOM series.")
    if len(series) > 1:
        listed = "; ".join(sorted(map(_summary, series)))
        raise ValueError(
            f"{folder} holds {len(series)} DICOM series, but a case is one: {listed}. Give each a folder of its own."
        )
    return series[0]


def _summary(files: Sequence[Path]) -> str:
    from pydicom import dcmread

    header = dcmread(files[0], stop_before_pixels=True)
    size = f"{header.get('Columns')} x {header.get('Rows')}, " if "Rows" in header else ""
    name = header.get("SeriesDescription") or header.get("SeriesInstanceUID")
    return f"{name} ({header.get('Modality')}, {size}{len(files)} files, such as {files[0].name})"


def read_series(folder: str | Path) -> list[Dataset]:
    """Read the headers of the series in `folder`: one per slice, in the order of `ITKReader`, or one of all frames.

    Raises:
        ValueError: there is not exactly one series, or its slices are not parallel and evenly spaced.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    files = series_files(folder)
    try:
        headers = [dcmread(file, stop_before_pixels=True) for file in files]
        _check_complete(Path(folder), files, headers[0].get("SeriesInstanceUID"))
        check_planes(*slice_planes(headers))
        if any(header.get("SpacingBetweenSlices") == 0 for header in headers):
            raise ValueError("its SpacingBetweenSlices is 0, which ITK refuses; remove that tag.")
    except (ValueError, InvalidDicomError) as error:
        raise ValueError(f"the DICOM series in {folder} is not a volume: {error}") from None
    return headers


def _check_complete(folder: Path, files: Sequence[Path], uid: str) -> None:
    """Check that `folder` holds no further file of the series `uid`: itk silently leaves out broken ones.

    Raises:
        ValueError: it does; the message names them.
    """
    from pydicom import dcmread
    from pydicom.misc import is_dicom

    others = [file for file in folder.iterdir() if file.is_file() and file.name not in {f.name for f in files}]
    others = [file for file in others if file.name != "DICOMDIR" and is_dicom(file)]
    broken = [f.name for f in others if dcmread(f, stop_before_pixels=True).get("SeriesInstanceUID") in (None, uid)]
    if broken:
        raise ValueError(f"{', '.join(sorted(broken)[:5])} cannot be read (cut short?); copy the series again.")


def slice_planes(headers: Sequence[Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Read ImagePositionPatient (D, 3) in mm and ImageOrientationPatient (D, 6) of all slices or frames; float, LPS.

    Raises:
        ValueError: a slice lacks one of them.
    """
    planes = []
    for header in headers:
        frames = header.get("PerFrameFunctionalGroupsSequence")
        shared = [*header.get("SharedFunctionalGroupsSequence", ())]
        for groups in [[frame, *shared] for frame in frames] if frames else [None]:
            plane = [
                header.get(name) if groups is None else _in_groups(groups, sequence, name)
                for sequence, name in (
                    ("PlanePositionSequence", "ImagePositionPatient"),
                    ("PlaneOrientationSequence", "ImageOrientationPatient"),
                )
            ]
            if not all(plane):
                where = Path(header.filename).name
                raise ValueError(f"{where} lacks ImagePositionPatient or ImageOrientationPatient.")
            planes.append(np.concatenate(plane).astype(float))
    return np.split(np.stack(planes), [3], axis=1)


def series_affine(headers: Sequence[Dataset], affine: np.ndarray) -> np.ndarray:
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


def _in_groups(groups: Sequence[Dataset], sequence: str, name: str):
    """Find an entry in a frame's functional groups, its own or those shared by all; None if it is in neither."""
    return next((group[sequence][0].get(name) for group in groups if sequence in group), None)


def check_planes(positions: np.ndarray, orientations: np.ndarray) -> None:
    """Check that slices at `positions` (D, 3) in mm with `orientations` (D, 6) stack to a volume, in this order.

    Raises:
        ValueError: they do not; the message says why, and what to do.
    """
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise ValueError("its slices differ in orientation (a localizer?); keep those of one orientation.")
    if len(positions) < 2:
        return
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    depths = (positions - positions[0]) @ normal  # mm
    gaps = np.diff(np.sort(depths))
    step = np.median(gaps)
    if (repeated := int((gaps < 1e-3).sum())) > 0:
        raise ValueError(
            f"{repeated} of its {len(depths)} slices lie where another one does (echoes, time points or copies?); keep "
            "one per position."
        )
    if np.abs(np.sort(depths) - np.linspace(depths.min(), depths.max(), len(depths))).max() > TOLERANCE * step:
        worst = int(np.abs(gaps - step).argmax())
        raise ValueError(
            f"slices are missing or unevenly spaced: {gaps[worst]:.2f} mm between slices {worst} and {worst + 1}, "
            f"{step:.2f} mm in the median."
        )
    if len(set(np.sign(np.diff(depths)))) > 1:
        raise ValueError("its frames are not stored in the order of their positions; convert it to single frames.")
    if np.linalg.norm(positions - positions[0] - depths[:, None] * normal, axis=1).max() > TOLERANCE * step:
        raise ValueError("its slices are shifted against each other (a tilted gantry?); resample it to a volume.")
