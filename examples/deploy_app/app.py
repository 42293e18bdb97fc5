"""MONAI Deploy: a DICOM series in, the mask of a bundle as a DICOM Segmentation out.

    examples/deploy_app/run.sh -i SERIES -o OUT -m dist/brats_flair-<version>

The operators are the SDK's. Two of them are mended here, so that the mask is voxel for voxel that of the command line
(`python -m monai.bundle run`), and a series that is no volume is refused and not bent into one.

The bundle's `configs/inference.json` says what to segment, how, and under which codes; the app knows none of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application
from monai.deploy.core.domain import Image
from monai.deploy.core.io_type import IOType
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_seg_writer_operator import DICOMSegmentationWriterOperator, SegmentDescription
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
from monai.deploy.operators.dicom_utils import ModelInfo
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_rescale
from pydicom.sr.coding import Code

CONFIG, METADATA = "configs/inference.json", "configs/metadata.json"
SERIES = "study_selected_series_list"  # the SDK's name of the port
RULES = {"selections": [{"name": "MR", "conditions": {"Modality": "MR"}}]}


class SeriesToVolume(DICOMSeriesToVolumeOperator):
    """The SDK's operator, for one series that is a volume, with its intensities as they are.

    The SDK takes the first series of several, one of the slices that share a position (echoes, time points), stretches
    the others where slices are missing, and stores all of them in the data type that suits the first one: where
    intensities are rescaled by a fraction, the others may be cut to integers.
    """

    def convert_to_image(self, study_selected_series_list):
        """As the base class, which says what it takes and returns.

        Raises:
            ValueError: there is not one MR series, or it is not one volume of evenly spaced slices.
        """
        selected = [one.series for study in study_selected_series_list for one in study.selected_series]
        if len(selected) != 1:
            listed = "; ".join(f"{s.SeriesDescription or 'no description'} ({s.SeriesInstanceUID})" for s in selected)
            raise ValueError(f"the input must hold one MR series; got {len(selected)}. {listed}".strip())
        return super().convert_to_image(study_selected_series_list)

    def prepare_series(self, series) -> None:
        """Sorts the slices along their normal, as the command line does, and checks that they stack to a volume."""
        from custom_modules.data.dicom import check_planes, slice_planes
        from custom_modules.inference.dicom_seg import MAY_BE_EMPTY

        super().prepare_series(series)
        headers = [instance.get_native_sop_instance() for instance in series.get_sop_instances()]
        if any("NumberOfFrames" in header for header in headers):
            raise ValueError("the SDK reads single-frame DICOM only; convert the series, or use the command line.")
        if (stored := count_files(headers)) > len(headers):
            raise ValueError(
                f"the series has {stored} slices at {len(headers)} positions (echoes, time points or copies?); "
                "keep one a position."
            )
        positions, orientations = slice_planes(headers)
        check_planes(positions, orientations)
        series.nifti_affine_transform = ras_affine(positions, orientations[0], headers[0].PixelSpacing)
        for name in MAY_BE_EMPTY:  # anonymised away, but the writer copies them
            for header in headers:
                header.setdefault(name, None)

    def generate_voxel_data(self, series) -> np.ndarray:
        """Intensities (D, H, W) float32."""
        slices = [(one.get_pixel_array(), one.get_native_sop_instance()) for one in series.get_sop_instances()]
        return np.stack([apply_rescale(*one) for one in slices]).astype(np.float32)


def count_files(headers: Sequence[Dataset]) -> int:
    """How many files the series of `headers` has in its folders, those that the SDK's loader dropped among them."""
    folders = {Path(header.filename).parent for header in headers}
    files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
    uids = [dcmread(file, force=True, specific_tags=["SeriesInstanceUID"]).get("SeriesInstanceUID") for file in files]
    return uids.count(headers[0].SeriesInstanceUID)


def ras_affine(positions: np.ndarray, orientation: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Affine (4, 4) in mm of an array (column, row, slice) of DICOM slices, as NIfTI has it.

    The SDK's own takes the distance of rows for that of columns, and a single slice has none.

    Args:
        positions: ImagePositionPatient (D, 3) of the slices in order.
        orientation: ImageOrientationPatient (6,).
        spacing: PixelSpacing, the distance of rows and that of columns.
    """
    row, column = orientation.reshape(2, 3)
    step = (positions[-1] - positions[0]) / (len(positions) - 1) if len(positions) > 1 else np.cross(row, column)
    lps = np.column_stack([row * spacing[1], column * spacing[0], step, positions[0]])
    return np.vstack([np.diag([-1, -1, 1]) @ lps, [0, 0, 0, 1]])


class BundleInference(MonaiBundleInferenceOperator):
    """The SDK's operator, with the network of the bundle's config.

    Given a folder by `-m`, the SDK takes the folder itself for the network; and a trace in it (models/model.ts) before
    the weights, which computes in another precision than the command line.
    """

    def predict(self, data, *args, **kwargs):
        return self._inferer(data, self._parser.get_parsed_content("network").eval())


class SegmentationApp(Application):
    """Input, output and bundle are the SDK's arguments -i, -o and -m."""

    def compose(self) -> None:
        context = Application.init_app_context(self.argv)
        bundle = Path(context.model_path).resolve()
        if not (bundle / CONFIG).is_file():
            raise ValueError(f"-m must be the folder of a packed bundle (make dist); {bundle} has no {CONFIG}.")
        sys.path.insert(0, str(bundle))  # as the SDK does too, but only when it infers
        once = CountCondition(self, 1)
        load = DICOMDataLoaderOperator(self, once, input_folder=Path(context.input_path), name="load")
        select = DICOMSeriesSelectorOperator(self, rules=json.dumps(RULES), all_matched=True, name="select")
        to_volume = SeriesToVolume(self, name="to_volume")
        infer = BundleInference(
            self,
            app_context=context,
            bundle_path=bundle,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            name="infer",
        )
        write = DICOMSegmentationWriterOperator(
            self, output_folder=Path(context.output_path), omit_empty_frames=False, name="write", **describe(bundle)
        )
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(select, to_volume, {(SERIES, SERIES)})
        self.add_flow(to_volume, infer, {("image", "image")})
        self.add_flow(infer, write, {("pred", "seg_image")})
        self.add_flow(select, write, {(SERIES, SERIES)})


def describe(bundle: Path) -> dict:
    """What the writer says of the segment and of the algorithm that made it, from the bundle's config."""
    metadata = json.loads((bundle / METADATA).read_text(encoding="utf-8"))
    segment = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))["segment"]
    name, version, label = metadata["name"], metadata["version"], segment["label"]
    description = SegmentDescription(
        segment_label=label,
        segmented_property_category=Code(*segment["category"]),
        segmented_property_type=Code(*segment["type"]),
        anatomic_regions=[Code(*segment["region"])],
        algorithm_name=name,
        algorithm_version=version,
        algorithm_family=Code(*segment["family"]),
    )
    return {
        "segment_descriptions": [description],
        "model_info": ModelInfo(creator=metadata["authors"], name=name, version=version),
        "custom_tags": {"SeriesDescription": f"{label}, for research only"},
    }


if __name__ == "__main__":
    SegmentationApp().run()
