"""DICOM series that hold the head of `bright` in an odd way, and folders that hold no volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from tests.helpers.series import OBLIQUE, only, save_edited, save_enhanced
from tests.odd.files import HEAD

VALUES = HEAD.astype(np.int16)
ALL = range(HEAD.shape[2])


def scale(header: Dataset, i: int) -> None:
    header.RescaleSlope, header.RescaleIntercept = SLOPES[i], 0


def moved(slices, step: np.ndarray):
    """An edit that moves some slices by `step` (LPS, mm)."""

    def edit(header: Dataset, i: int) -> None:
        if i in slices:
            position = np.add(header.ImagePositionPatient, step)
            header.ImagePositionPatient = [f"{p:.8f}"[:16] for p in position]

    return edit


def inverted(header: Dataset, i: int) -> None:
    header.PhotometricInterpretation = "MONOCHROME1"


SLOPES = [2, 0.25, 0.5, 1.25, 0.125, 1]  # the first is an integer
STEP = OBLIQUE[:3, 2] * [-1, -1, 1]  # from slice to slice
BAD_SERIES = {
    "gap": (moved([4, 5], STEP), "slices are missing or unevenly spaced: 9.00 mm between"),
    "copies": (moved([5], -STEP), "1 of its 6 slices lie where another one does.*; keep one per position"),
    "shifted": (moved([2], OBLIQUE[:3, 0] * [-2, -2, 2]), "shifted against each other .*; resample it"),
    "localizer": (only([2], "ImageOrientationPatient", [1, 0, 0, 0, 1, 0]), "differ in orientation.*keep those"),
    "no_position": (only([2], "ImagePositionPatient", None), "2 lacks ImagePositionPatient.*export it again"),
    "no_orientation": (only([2], "ImageOrientationPatient", None), "2 lacks ImageOrientationPatient.*export it again"),
    "no_spacing": (only(ALL, "PixelSpacing", None), "lacks PixelSpacing .*export it again"),
    "spacing_of_0": (only(ALL, "PixelSpacing", [0, 0]), "PixelSpacing is .*must be above 0"),
    "two_spacings": (only([1], "PixelSpacing", [1, 2]), "PixelSpacing is .*the same in all slices"),
    "zero_between": (only(ALL, "SpacingBetweenSlices", 0), "SpacingBetweenSlices is 0.*remove that tag"),
    "some_scaled": (only([1], "RescaleSlope", 2), "5 of its 6 slices lack RescaleSlope.*export the series again"),
    "slope_of_0": (only(ALL, "RescaleSlope", 0), "RescaleSlope is 0.*export the series again"),
    "colours": (only(ALL, "PhotometricInterpretation", "RGB"), "PhotometricInterpretation is RGB; it must"),
    "two_series": (only([1], "SeriesInstanceUID", "1.2.9"), "holds 2 DICOM series.*Give each a folder"),
    "two_patients": (only([4, 5], "PatientID", "P8"), "have several PatientIDs; give the slices of each"),
    "mosaic": (
        only(ALL, "ImageType", ["ORIGINAL", "PRIMARY", "MOSAIC"]),
        "are mosaics, each of all slices; convert it",
    ),
    "skewed": (only(ALL, "ImageOrientationPatient", [1, 0, 0, 0.5, 0.9, 0]), "must be two unit vectors at a right"),
    "two_sizes": (only([1], "Rows", 20), "holds 2 DICOM series.*48 x 20, 1 files.*Give each a folder"),
    "all_padding": (
        lambda h, i: h.add_new(0x00280120, "US", 0) or h.add_new(0x00280121, "US", 65535),
        "all voxels of .*; remove that tag",
    ),
}
BAD_FOLDERS = {
    "cut_short": r"5 cannot be read \(cut short\?\); copy the series again",
    "no_preamble": "lacks the preamble of DICOM; convert the series",
    "comma": "RescaleSlope is 1,5, which is no number; export it again",
    "frames_out_of_order": "its frames are not stored in the order .*; convert it",
}
ODD_SERIES = {  # stored values, and what happens to each header
    "plain": (VALUES, only([], "", None)),
    "thickness": (VALUES, only([2], "SliceThickness", "2.0001")),
    "no_thickness": (VALUES, only(ALL, "SliceThickness", None)),
    "negative_between": (VALUES, only(ALL, "SpacingBetweenSlices", -4.5)),
    "no_between": (VALUES, only(ALL, "SpacingBetweenSlices", None)),
    "two_dates": (VALUES, only([4, 5], "SeriesDate", "20260102")),
    "scaled": (np.rint(VALUES / SLOPES), scale),
    "ending": (VALUES, only([], "", None)),  # of its files: .bin
    "inverted": (1000 - VALUES, inverted),
    "padded": (np.where(VALUES, VALUES, 63000), lambda h, i: h.add_new(0x00280120, "US", 63000)),
}


def save_odd_series(root: Path) -> None:
    """Writes all of them, each to a folder of its own."""
    for name, (edit, _) in BAD_SERIES.items():
        save_edited(root / name, VALUES, edit)
    for name, (array, edit) in ODD_SERIES.items():
        save_edited(root / name, array, edit)
    save_edited(root / "comma", VALUES, only(ALL, "RescaleSlope", "1.5"))
    for file in (root / "comma").iterdir():
        file.write_bytes(file.read_bytes().replace(b"1.5 ", b"1,5 "))
    for file in list((root / "ending").iterdir()):
        file.rename(f"{file}.bin")
    for file in save_edited(root / "no_preamble", VALUES, only([], "", None)).iterdir():
        file.write_bytes(file.read_bytes()[132:])
    save_enhanced(root / "frames", VALUES)
    save_enhanced(root / "frames_out_of_order", VALUES, order=[1, 0, 2, 3, 4, 5])
    save_edited(root / "cut_short", VALUES, only([], "", None))
    (root / "cut_short" / "5").write_bytes((root / "cut_short" / "4").read_bytes()[:-20])
