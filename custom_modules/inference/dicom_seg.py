"""A mask as a DICOM Segmentation that refers to its series."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from custom_modules import __version__
from custom_modules.data.dicom import TOLERANCE, read_series, slice_planes
from custom_modules.files import atomic_path, result_file
from custom_modules.inference.appearance import unlike_training

if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom import Dataset

logger = logging.getLogger(__name__)
UNLIKE_NOTE = "; UNLIKE TRAINING VOLUMES"  # a description has at most 64 characters (LO)
CODES = ("category", "type", "region", "family")
# highdicom needs them in the source, if only empty; anonymisation often removes them
MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                "StudyDate", "StudyTime")  # fmt: skip


class SaveDicomSegd(MapTransform):
    """Writes the mask as `<output_dir>/<stem>/<stem>_seg.dcm`: a binary DICOM Segmentation, whole or not at all.

    It has one frame for each slice of the source series, at that slice's own position and voxel for voxel; empty frames
    are written too, so the file is valid where nothing was found. `keys` hold a mask MetaTensor (1, W, H, D) of 0 and 1
    on the grid of the series; its case has "stem", and as "image" a MetaTensor whose meta data name the folder of the
    series (`filename_or_obj`).

    Args:
        output_dir: folder of the results.
        segment: what the mask shows: "label" (text), and "category", "type", "region" (of the body) and "family" (of
            the algorithm), codes as [value, coding scheme, meaning].
        algorithm: its name.

    Raises:
        ValueError: `segment` lacks one of these, has others, or a code is not three texts; or the mask is not on the
            grid of the series.
    """

    def __init__(self, output_dir: str, segment: Mapping, algorithm: str, keys="pred") -> None:
        super().__init__(keys)
        for name in CODES:
            code = segment.get(name)
            if not (isinstance(code, Sequence) and len(code) == 3 and all(isinstance(part, str) for part in code)):
                raise ValueError(
                    f'segment: {name} must be a code, ["value", scheme, meaning], with the value in quotes; got {code}.'
                )
        if unknown := set(segment) ^ {"label", *CODES}:
            raise ValueError(f"segment must have label, {', '.join(CODES)}; got or lacks {', '.join(sorted(unknown))}.")
        self.output_dir, self.segment, self.algorithm = output_dir, dict(segment), algorithm

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        for key in self.key_iterator(data):
            headers = read_series(data["image"].meta["filename_or_obj"])
            frames = mask_frames(data[key], headers)
            if not frames.any():
                logger.info("case %s: nothing was found; the frames of its DICOM Segmentation are empty", data["case"])
            with atomic_path(result_file(self.output_dir, data["stem"], "seg.dcm")) as aside:
                unlike = bool(unlike_training(data))
                segmentation(headers, frames, self.segment, self.algorithm, unlike).save_as(aside)
        return dict(data)


def mask_frames(mask: MetaTensor, headers: Sequence[Dataset]) -> np.ndarray:
    """Turns the mask (1, W, H, D) into frames (D, rows H, columns W) bool, in the order of the slices of its series.

    Raises:
        ValueError: the mask's slices are not where those of the series are.
    """
    frames = np.asarray(mask[0].as_tensor().cpu().to(torch.bool)).T
    positions, orientations = slice_planes(headers)
    size = (len(positions), headers[0].Rows, headers[0].Columns)
    affine = np.diag([-1, -1, 1, 1]) @ np.asarray(mask.affine.cpu())  # RAS -> LPS
    own = affine[:3, 3] + np.arange(len(frames))[:, None] * affine[:3, 2]
    axes = affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0)  # of a row, and of a column
    turned = np.abs(axes.T.ravel() - orientations[0]).max() > 1e-2
    if frames.shape != size or turned or np.abs(own - positions).max() > TOLERANCE * np.linalg.norm(affine[:3, 2]):
        raise ValueError(f"the mask, {frames.shape} from {own[0]}, is not on its series, {size} from {positions[0]}.")
    return frames


def segmentation(
    headers: Sequence[Dataset], frames: np.ndarray, segment: Mapping, algorithm: str, unlike: bool = False
) -> Segmentation:
    """Makes the DICOM Segmentation of the series with `headers`; `frames` (D, H, W) bool are its slices in order.

    `unlike` says that the series is unlike the training volumes; the description of the content tells.
    """
    import highdicom
    from pydicom.uid import ExplicitVRLittleEndian

    for header in headers:
        for name in MAY_BE_EMPTY:
            header.setdefault(name, None)
    _complete_thickness(headers)
    return highdicom.seg.Segmentation(
        source_images=headers,
        pixel_array=frames,
        segmentation_type="BINARY",
        segment_descriptions=[describe_segment(segment, algorithm)],
        series_instance_uid=highdicom.UID(),
        series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
        series_description=f"{segment['label']}, {algorithm}",
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="weak-diffusion-segmentation",
        manufacturer_model_name=algorithm,
        software_versions=__version__,
        device_serial_number="0",  # required, and software has none
        content_description=f"{segment['label'][:20]}, for research only{UNLIKE_NOTE if unlike else ''}",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=False,
    )


def _complete_thickness(headers: Sequence[Dataset]) -> None:
    """Gives classic slices the thickness and spacing that highdicom needs, if absent or below 0: from positions."""
    positions, _ = slice_planes(headers)
    gap = np.linalg.norm(positions[-1] - positions[0]) / max(len(positions) - 1, 1) or 1.0  # of one slice it is unknown
    for header in headers if "SharedFunctionalGroupsSequence" not in headers[0] else ():
        for name in ("SliceThickness", "SpacingBetweenSlices"):
            if not (header.get(name) or 0) > 0:
                setattr(header, name, round(float(gap), 6))


def describe_segment(segment: Mapping, algorithm: str) -> SegmentDescription:
    """Describes segment 1, made by this version of `algorithm`; `segment` as in `SaveDicomSegd`."""
    import highdicom
    from pydicom.sr.coding import Code

    codes = {name: Code(*segment[name]) for name in CODES}
    return highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label=segment["label"],
        segmented_property_category=codes["category"],
        segmented_property_type=codes["type"],
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=algorithm, family=codes["family"], version=__version__, source="weak-diffusion-segmentation"
        ),
        anatomic_regions=[codes["region"]],
    )
