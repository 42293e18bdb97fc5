"""DICOM: the one series of a folder, checked slice by slice before it is read as a volume.

MONAI's `ITKReader` makes a volume of whatever a folder holds: it takes the first of several series, stretches the other
slices over a missing one, and loses the geometry of frames out of order, all with a warning at most.

pydicom and itk are imported where they are used: NIfTI data and the hosts of a bundle do without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

OUTPUT_FORMATS = ("nifti", "dicom_seg")
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"  # SOP class of DICOM Segmentations
RESCALE = ("RescaleSlope", "RescaleIntercept")
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
    """List the files of the series in `folder` by position, in the order in which they are stacked.

    Raises:
        ValueError: there is no series, or there are several (by UID or size).
    """
    return [Path(header.filename) for header in _one_series(folder)]


def patient_id(folder: str | Path) -> str:
    """Read the PatientID of the series in `folder`; empty where there is none."""
    return str(_one_series(folder)[0].get("PatientID") or "").strip()


def _one_series(folder: str | Path) -> list[Dataset]:
    import itk  # slow to import
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(False)  # they part slices whose thickness or date differs
    names.SetDirectory(str(folder))
    series: dict[tuple, list[Dataset]] = {}
    for uid in names.GetSeriesUIDs():
        for name in names.GetFileNames(uid):
            try:
                header = dcmread(name, stop_before_pixels=True)
            except InvalidDicomError:  # old files, which GDCM lists and does not read
                raise ValueError(f"{name} lacks the preamble of DICOM; convert the series, as by dcm2niix.") from None
            # reports, and what we write, may lie there
            if "Rows" in header and header.get("SOPClassUID") != SEGMENTATION:
                series.setdefault((uid, header.Rows, header.Columns), []).append(header)
    if not series:
        raise ValueError(f"{folder} holds no DICOM series; an image is a NIfTI file, or the folder of one series.")
    if len(series) > 1:
        listed = "; ".join(sorted(map(_summary, series.values())))
        raise ValueError(
            f"{folder} holds {len(series)} DICOM series, but a case is one: {listed}. Give each a folder of its own."
        )
    return next(iter(series.values()))


def _summary(headers: Sequence[Dataset]) -> str:
    first = headers[0]
    name = first.get("SeriesDescription") or first.get("SeriesInstanceUID")
    size = f"{first.Columns} x {first.Rows}"
    return f"{name} ({first.get('Modality')}, {size}, {len(headers)} files, such as {Path(first.filename).name})"


def read_series(folder: str | Path) -> list[Dataset]:
    """Read the headers of the series in `folder`: one per slice, by position, or one of all frames.

    Raises:
        ValueError: there is not exactly one series, its slices are not parallel and evenly spaced, or their headers do
            not say how large a pixel is and what its value means.
    """
    from pydicom.errors import InvalidDicomError

    headers = _one_series(folder)
    try:
        _check_complete(Path(folder), headers)
        check_planes(*slice_planes(headers))
        _check_pixels(headers)
    except (ValueError, InvalidDicomError) as error:
        raise ValueError(f"the DICOM series in {folder} is not a volume: {error}") from None
    return headers


def _check_complete(folder: Path, headers: Sequence[Dataset]) -> None:
    """Check that `folder` holds no further file of the series: itk silently leaves out broken ones.

    Raises:
        ValueError: it does; the message names them.
    """
    from pydicom import dcmread
    from pydicom.misc import is_dicom

    known, uid = {Path(header.filename).name for header in headers}, headers[0].get("SeriesInstanceUID")
    others = [file for file in folder.iterdir() if file.is_file() and file.name not in known]
    others = [file for file in others if file.name != "DICOMDIR" and is_dicom(file)]
    broken = [f.name for f in others if dcmread(f, stop_before_pixels=True).get("SeriesInstanceUID") in (None, uid)]
    if broken:
        raise ValueError(f"{', '.join(sorted(broken)[:5])} cannot be read (cut short?); copy the series again.")


def _check_pixels(headers: Sequence[Dataset]) -> None:
    """Check that all slices have one size of pixels in mm, and values that can be compared.

    Raises:
        ValueError: they have not; the message says what is missing or differs.
    """
    spacings = np.array(_complete(headers, "PixelMeasuresSequence", "PixelSpacing"), float)
    if spacings.min() <= 0 or np.ptp(spacings, axis=0).max() > 1e-3 * spacings.min():
        raise ValueError(f"its PixelSpacing is {_texts(spacings)}; it must be above 0, and the same in all slices.")
    if len({header.get("PatientID") for header in headers}) > 1:
        raise ValueError("its slices have several PatientIDs; give the slices of each patient a folder of their own.")
    if any("MOSAIC" in (header.get("ImageType") or ()) for header in headers):
        raise ValueError("its images are mosaics, each of all slices; convert it, for example by dcm2niix.")
    if any(header.get("SpacingBetweenSlices") == 0 for header in headers):
        raise ValueError("its SpacingBetweenSlices is 0, which ITK refuses; remove that tag.")
    kinds = {header.get("PhotometricInterpretation") for header in headers}
    if kinds not in ({"MONOCHROME1"}, {"MONOCHROME2"}):
        raise ValueError(
            f"its PhotometricInterpretation is {_texts(kinds)}; it must be MONOCHROME1 or 2 in all slices."
        )
    scales = list(zip(*(per_slice(headers, "PixelValueTransformationSequence", name) for name in RESCALE)))
    if bad := [scale for scale in scales if scale[0] is not None and not (np.isfinite(scale[0]) and scale[0])]:
        raise ValueError(f"its RescaleSlope is {bad[0][0]}; export the series again with the right one.")
    lacking = scales.count((None, None))
    if lacking and any(slope not in (None, 1) or intercept not in (None, 0) for slope, intercept in scales):
        raise ValueError(
            f"{lacking} of its {len(scales)} slices lack {' and '.join(RESCALE)}, which the others have, so their "
            "values cannot be compared; export the series again, with those tags in all slices or in none."
        )


def _texts(values: Iterable) -> str:
    """List up to three different values."""
    return ", ".join(sorted({str(value) for value in values})[:3])


def per_slice(headers: Sequence[Dataset], sequence: str, name: str) -> list:
    """Read numbers of every slice from its header, or of every frame from its functional groups; None if missing.

    Raises:
        ValueError: they are none.
    """
    values: list = []
    for header in headers:
        shared = [*header.get("SharedFunctionalGroupsSequence", ())]
        frames = header.get("PerFrameFunctionalGroupsSequence")
        values += [_in_groups([frame, *shared], sequence, name) for frame in frames] if frames else [header.get(name)]
    try:
        return [None if value in (None, "") else np.array(value, float).tolist() for value in values]
    except (TypeError, ValueError):  # a comma, for example
        raise ValueError(f"its {name} is {_texts(values)}, which is no number; export it again.") from None


def _in_groups(groups: Sequence[Dataset], sequence: str, name: str):
    """Find an entry in a frame's functional groups, its own or those shared by all; None if it is in neither."""
    return next((group[sequence][0].get(name) for group in groups if sequence in group), None)


def _complete(headers: Sequence[Dataset], sequence: str, name: str) -> list:
    values = per_slice(headers, sequence, name)
    if missing := [i for i, value in enumerate(values) if not value]:
        file = Path(headers[min(missing[0], len(headers) - 1)].filename).name
        raise ValueError(
            f"{file} lacks {name} ({len(missing)} of {len(values)} slices do); export it again with that tag."
        )
    return values


def slice_planes(headers: Sequence[Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Read ImagePositionPatient (D, 3) in mm and ImageOrientationPatient (D, 6) of all slices or frames; float, LPS.

    Raises:
        ValueError: a slice lacks one of them.
    """
    entries = (
        ("PlanePositionSequence", "ImagePositionPatient"),
        ("PlaneOrientationSequence", "ImageOrientationPatient"),
    )
    return tuple(np.array(_complete(headers, *entry), float) for entry in entries)


def check_planes(positions: np.ndarray, orientations: np.ndarray) -> None:
    """Check that slices at `positions` (D, 3) in mm with `orientations` (D, 6) stack to a volume, in this order.

    Raises:
        ValueError: they do not; the message says why, and what to do.
    """
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise ValueError("its slices differ in orientation (a localizer?); keep those of one orientation.")
    row, column = orientations[0].reshape(2, 3)
    if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > 1e-2:
        raise ValueError(
            f"its ImageOrientationPatient is {orientations[0].tolist()}; it must be two unit vectors at a right angle."
        )
    if len(positions) < 2:
        return
    normal = np.cross(row, column)
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
