"""A mask comes back from its DICOM Segmentation as it went in; codes, refusals, and the command that writes it."""

from __future__ import annotations

import re

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import ITKReader, MetaTensor
from monai.transforms import LoadImage
from pydicom.sr.codedict import codes

from custom_modules.data.dicom import read_series
from custom_modules.inference.dicom_seg import SaveDicomSegd, mask_frames
from tests.helpers.bundles import BUNDLES, REPO, TINY, config, head, monai_bundle, save_nifti
from tests.helpers.series import OBLIQUE, as_nifti, assert_same, nifti, read_image, save_enhanced, save_series

VOLUME = np.random.default_rng(0).integers(0, 1000, (7, 5, 4)).astype(np.int16)  # (W, H, D)
SEGMENTS = {bundle: ConfigParser.load_config_file(REPO / config(bundle, "inference"))["segment"] for bundle in BUNDLES}


def save_mask(folder, out, array=None, segment=None, **facts):
    """Runs `SaveDicomSegd` on a mask (random by default) of the series in `folder`: the mask and the file."""
    image = LoadImage(reader=ITKReader, image_only=True, ensure_channel_first=True)(str(folder))
    array = np.random.default_rng(1).random(image.shape) > 0.5 if array is None else array
    mask = MetaTensor(torch.as_tensor(array).to(torch.uint8), affine=image.affine)
    save = SaveDicomSegd(str(out), segment or SEGMENTS["brats_flair"], "brats_flair (cdm)")
    save({"image": image, "pred": mask, "stem": "p7", "case": "p7", **facts})
    return mask, out / "p7" / "p7_seg.dcm"


# ---- the segmentation


@pytest.mark.parametrize("flip", [1, -1], ids=["up", "down"])
def test_a_mask_comes_back_as_it_went_in(flip, tmp_path):
    affine = OBLIQUE @ np.diag([1, 1, flip, 1])
    mask, path = save_mask(save_series(tmp_path / "in", VOLUME, affine), tmp_path / "out")
    assert_same(as_nifti(path), nifti(mask[0]))
    assert_same(read_image(tmp_path / "in"), nib.Nifti1Image(VOLUME, affine))
    assert [file.name for file in path.parent.iterdir()] == ["p7_seg.dcm"]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]], ids=["up", "down"])
def test_enhanced_frames_in_order_are_a_volume(order, tmp_path):
    mask, path = save_mask(save_enhanced(tmp_path / "in", VOLUME, order=order), tmp_path / "out")
    assert_same(as_nifti(path), nifti(mask[0]))
    assert_same(read_image(tmp_path / "in"), nib.Nifti1Image(VOLUME, OBLIQUE))


def test_frames_refer_to_the_slices_that_they_lie_on(tmp_path):
    folder = save_series(tmp_path / "in", VOLUME)
    _, path = save_mask(folder, tmp_path / "out")
    seg, sources = pydicom.dcmread(path), {h.SOPInstanceUID: h for h in map(pydicom.dcmread, folder.iterdir())}
    assert (seg.Modality, seg.SegmentationType, seg.NumberOfFrames) == ("SEG", "BINARY", 4)
    assert (seg.PatientID, seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("P7", "1.2.3", "1.2.3.5")
    (reference,) = seg.ReferencedSeriesSequence
    assert reference.SeriesInstanceUID == "1.2.3.4"
    assert {item.ReferencedSOPInstanceUID for item in reference.ReferencedInstanceSequence} == set(sources)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        source = sources[image.ReferencedSOPInstanceUID]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    (shared,) = seg.SharedFunctionalGroupsSequence
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == source.ImageOrientationPatient
    assert shared.PixelMeasuresSequence[0].PixelSpacing == source.PixelSpacing


@pytest.mark.parametrize(
    ("bundle", "names"),
    [
        ("brats_flair", ("MorphologicallyAbnormalStructure", "Neoplasm", "Brain")),
        ("chaos_kidney", ("AnatomicalStructure", "Kidney", "Abdomen")),
    ],
)
def test_segments_are_coded_as_dicom_knows_them(bundle, names, tmp_path):
    folder = save_series(tmp_path / "in", VOLUME)
    _, path = save_mask(folder, tmp_path, segment=SEGMENTS[bundle])
    (segment,) = pydicom.dcmread(path).SegmentSequence
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    sequences = (
        segment.SegmentedPropertyCategoryCodeSequence,
        segment.SegmentedPropertyTypeCodeSequence,
        segment.AnatomicRegionSequence,
        algorithm.AlgorithmFamilyCodeSequence,
    )
    known = (*(getattr(codes.SCT, name) for name in names), codes.DCM.ArtificialIntelligence)
    for (item,), code in zip(sequences, known, strict=True):
        assert (item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning) == code[:3]
    assert segment.SegmentLabel == SEGMENTS[bundle]["label"] and segment.SegmentAlgorithmType == "AUTOMATIC"
    assert algorithm.AlgorithmName == "brats_flair (cdm)"
    assert algorithm.AlgorithmVersion == pydicom.dcmread(path).SoftwareVersions


def test_an_empty_mask_is_a_segmentation_of_empty_frames(tmp_path, caplog):
    caplog.set_level("INFO")
    _, path = save_mask(save_series(tmp_path / "in", VOLUME), tmp_path, np.zeros((1, *VOLUME.shape)))
    assert not as_nifti(path).get_fdata().any() and as_nifti(path).shape == VOLUME.shape
    assert "case p7: nothing was found" in caplog.text


def test_a_series_unlike_those_of_training_is_described_as_such(tmp_path):
    folder, segment = save_series(tmp_path / "in", VOLUME), SEGMENTS["brats_flair"] | {"label": "A" * 40}
    for unlike, ending in ((0.9, "for research only"), (1.1, "for research only; UNLIKE TRAINING VOLUMES")):
        _, path = save_mask(folder, tmp_path / "out", segment=segment, unlike_proportions=unlike)
        description = pydicom.dcmread(path).ContentDescription
        assert description.endswith(ending) and len(description) <= 64  # of an LO


def test_anonymous_series_do(tmp_path):
    folder = save_series(tmp_path / "in", VOLUME, PatientID=None, PatientName=None, SeriesNumber=None)
    _, path = save_mask(folder, tmp_path)
    assert not pydicom.dcmread(path).PatientID


def test_a_mask_off_its_series_is_refused(tmp_path):
    headers = read_series(save_series(tmp_path / "in", VOLUME))
    affine = torch.as_tensor(OBLIQUE @ np.diag([1, 1, -1, 1]))  # upside down
    with pytest.raises(ValueError, match="is not on its series"):
        mask_frames(MetaTensor(torch.ones(1, *VOLUME.shape), affine=affine), headers)
    with pytest.raises(ValueError, match="is not on its series"):
        mask_frames(MetaTensor(torch.ones(1, 5, 7, 4), affine=torch.as_tensor(OBLIQUE)), headers)
    transposed = torch.as_tensor(OBLIQUE[:, [1, 0, 2, 3]].copy())  # of the right size, with rows for columns
    with pytest.raises(ValueError, match="is not on its series"):
        mask_frames(MetaTensor(torch.ones(1, *VOLUME.shape), affine=transposed), headers)


def test_a_failed_segmentation_leaves_nothing(tmp_path, monkeypatch):
    def half_written(self, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", half_written)
    with pytest.raises(OSError, match="No space left"):
        save_mask(save_series(tmp_path / "in", VOLUME), tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": [108369006, "SCT", "Neoplasm"]}, r'type must be a code, \["value", scheme, .*got \[108369006'),
        ({"family": "AI"}, "family must be a code"),
        ({"region": None}, "region must be a code"),
        ({"colour": "red"}, "got or lacks colour"),
    ],
)
def test_a_wrong_code_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        SaveDicomSegd("out", SEGMENTS["brats_flair"] | change, "x")


# ---- the command


@pytest.fixture
def infer(trained, tmp_path):
    """Runs brats_flair's inference on tmp_path / "in", results in tmp_path / "out"."""

    def run(*more):
        where = ["--dataset_dir", tmp_path / "in", "--output_dir", tmp_path / "out", "--ckpt_path", trained.weights]
        fast = ["--gate=all", "--method=intensity"]  # a network of two epochs would find nothing
        monai_bundle("run", "--config_file", config("brats_flair", "inference"), *where, *TINY, *fast, *more)

    return run


def test_the_command_writes_the_mask_as_dicom(infer, tmp_path):
    save_series(tmp_path / "in" / "PAT1" / "SER2", head()[0])
    infer("--output_format=dicom_seg")
    out = tmp_path / "out" / "SER2"
    files = {path.name.removeprefix("SER2_"): path for path in out.iterdir()}
    assert files.keys() == {"mask.nii.gz", "saliency.nii.gz", "provenance.json", "seg.dcm"}
    mask = nib.load(files["mask.nii.gz"])
    assert mask.get_fdata().any()
    np.testing.assert_allclose(mask.affine, read_image(tmp_path / "in" / "PAT1" / "SER2").affine, atol=1e-4)
    assert_same(as_nifti(files["seg.dcm"]), mask)

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    infer("--output_format=dicom_seg")
    infer()  # the NIfTI files are asked for, and there
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    files["seg.dcm"].unlink()
    infer("--output_format=dicom_seg")
    assert files["seg.dcm"].is_file()
    infer("--seed=1")
    assert not files["seg.dcm"].exists(), "it would be of an earlier mask"


def test_a_nifti_file_is_named_and_stops_no_series(infer, tmp_path):
    save_nifti(head()[0], tmp_path / "in" / "p1.nii.gz")
    save_series(tmp_path / "in" / "ser", head()[0])
    with pytest.raises(RuntimeError) as caught:
        infer("--output_format=dicom_seg")
    assert re.search(r"1 of 2 cases failed:\n  p1: .*case 'p1': .*--output_format nifti", str(caught.value.__cause__))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "ser"]
