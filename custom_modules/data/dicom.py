"""DICOM: the one series of a folder, checked slice by slice, and a mask as a DICOM Segmentation that refers to it.

MONAI's `ITKReader` makes a volume of whatever a folder holds: of several series it takes the first, a missing slice
stretches the others, and frames out of order lose their geometry, all with a warning at most. So a series is checked
before it is read (`read_series`). `SaveDicomSegd` then writes one frame for each of its slices, where that slice lies.

pydicom, highdicom and itk are imported where they are used: NIfTI data and the hosts of a bundle need none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset


OUTPUT_FORMATS = ("nifti", "dicom_seg")
TOLERANCE = 0.1  # by which slices may lie off their even spacing, in slice spacings


def check_source(case: Mapping, output_format: str) -> None:
    """Check the image of a case {"case", "image"} before it is read: a sound series, or a file where that will do.

    Raises:
        ValueError: `dicom_seg` is asked for and the image is no DICOM series, or one without a frame of reference;
            and what `read_series` raises.
    """
    if Path(case["image"]).is_dir():
        headers = read_series(case["image"])
        if output_format == "dicom_seg" and not all(header.get("FrameOfReferenceUID") for header in headers):
            raise ValueError(
                f"case {case['case']!r}: the series in {case['image']} has no FrameOfReferenceUID, which a DICOM "
                "Segmentation needs; export it anew without taking that away, or --output_format nifti."
            )
    elif output_format == "dicom_seg":
        raise ValueError(
            f"case {case['case']!r}: a DICOM Segmentation refers to a DICOM series, but {case['image']} is none; give "
            "the folder of the series as dataset_dir, or --output_format nifti."
        )


def series_files(folder: str | Path) -> list[Path]:
    """Files of the series in `folder`, in the order in which MONAI's `ITKReader` stacks them: by position.

    Raises:
        ValueError: there is none, or there are several (by UID, size, slice thickness, ...).
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
        listed = "; ".join(sorted(map(_describe, series)))
        raise ValueError(
            f"{folder} holds {len(series)} DICOM series, and a case is one: {listed}. Give each a folder of its own."
        )
    return series[0]


def _describe(files: Sequence[Path]) -> str:
    from pydicom import dcmread

    header = dcmread(files[0], stop_before_pixels=True)
    size = f"{header.get('Columns')} x {header.get('Rows')}, " if "Rows" in header else ""
    name = header.get("SeriesDescription") or header.get("SeriesInstanceUID")
    return f"{name} ({header.get('Modality')}, {size}{len(files)} files, such as {files[0].name})"


def read_series(folder: str | Path) -> list[Dataset]:
    """Headers of the series in `folder`: one a slice, in the order of `ITKReader`'s volume, or one of all frames.

    Raises:
        ValueError: there is not one series, or its slices are not the parallel, evenly spaced ones of a volume.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    files = series_files(folder)
    try:
        headers = [dcmread(file, stop_before_pixels=True) for file in files]
        _check_complete(Path(folder), files, headers[0].get("SeriesInstanceUID"))
        check_planes(*slice_planes(headers))
    except (ValueError, InvalidDicomError) as error:
        raise ValueError(f"the DICOM series in {folder} is no volume: {error}") from None
    return headers


def _check_complete(folder: Path, files: Sequence[Path], uid: str) -> None:
    """Raise ValueError if `folder` holds more files of the series `uid`: itk leaves out, silently, what is broken."""
    from pydicom import dcmread
    from pydicom.misc import is_dicom

    others = [file for file in folder.iterdir() if file.is_file() and file.name not in {f.name for f in files}]
    others = [file for file in others if file.name != "DICOMDIR" and is_dicom(file)]
    broken = [f.name for f in others if dcmread(f, stop_before_pixels=True).get("SeriesInstanceUID") in (None, uid)]
    if broken:
        raise ValueError(f"{', '.join(sorted(broken)[:5])} cannot be read (cut short?); copy the series anew.")


def slice_planes(headers: Sequence[Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """ImagePositionPatient (D, 3) in mm and ImageOrientationPatient (D, 6), float, of each slice or frame, in LPS.

    Raises:
        ValueError: a slice has none.
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


def _in_groups(groups: Sequence[Dataset], sequence: str, name: str):
    """An entry of a frame's functional groups, its own or shared by all; None where it is in neither."""
    return next((group[sequence][0].get(name) for group in groups if sequence in group), None)


def check_planes(positions: np.ndarray, orientations: np.ndarray) -> None:
    """Raise ValueError unless slices at `positions` (D, 3) with `orientations` (D, 6) stack to a volume, in order."""
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
            "one a position."
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
