"""DICOM: a series is one volume or a clear error, and a mask comes back from its DICOM Segmentation as it went in."""

from __future__ import annotations

import csv
import json
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
from PIL import Image
from pydicom.sr.codedict import codes

from custom_modules.data.__main__ import main
from custom_modules.data.datalist import check_cases
from custom_modules.data.dicom import check_source, read_series
from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.dicom_seg import SaveDicomSegd, mask_frames
from tests.helpers.bundles import BUNDLES, REPO, TAGS, TINY, config, head, monai_bundle, save_nifti
from tests.helpers.series import OBLIQUE, save_enhanced, save_series

VOLUME = np.random.default_rng(0).integers(0, 1000, (7, 5, 4)).astype(np.int16)  # (W, H, D)
SEGMENTS = {bundle: ConfigParser.load_config_file(REPO / config(bundle, "inference"))["segment"] for bundle in BUNDLES}


def save_mask(folder, out, array=None, segment=None):
    """Runs `SaveDicomSegd` on a mask (random by default) of the series in `folder`: the mask and the file."""
    image = LoadImage(reader=ITKReader, image_only=True, ensure_channel_first=True)(str(folder))
    array = np.random.default_rng(1).random(image.shape) > 0.5 if array is None else array
    mask = MetaTensor(torch.as_tensor(array).to(torch.uint8), affine=image.affine)
    save = SaveDicomSegd(str(out), segment or SEGMENTS["brats_flair"], "brats_flair (cdm)")
    save({"image": image, "pred": mask, "stem": "p7", "case": "p7"})
    return mask, out / "p7" / "p7_seg.dcm"


def nifti(volume: MetaTensor) -> nib.Nifti1Image:
    """A volume (W, H, D) as MONAI has it, RAS."""
    return nib.Nifti1Image(np.asarray(volume.as_tensor()), np.asarray(volume.affine))


def read_image(folder) -> nib.Nifti1Image:
    return nifti(LoadImage(reader=ITKReader, image_only=True)(str(folder)).to(torch.int16))


def as_nifti(path) -> nib.Nifti1Image:
    """The volume of a DICOM Segmentation, as highdicom reads it: indices (slice, row, column) in LPS."""
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
    affine = np.diag([-1, -1, 1, 1]) @ volume.affine[:, [2, 1, 0, 3]]
    return nib.Nifti1Image(volume.array.T.astype(np.uint8), affine)


def assert_same(one: nib.Nifti1Image, other: nib.Nifti1Image) -> None:
    """Equal voxel for voxel, whatever the order of their axes, and in the same place."""
    one, other = map(nib.as_closest_canonical, (one, other))
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-4)


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


# ---- folders that are no volume


def break_series(folder, kind: str) -> None:
    """Spoils a series of four slices in files 0 to 3."""
    file = folder / "1"
    header = pydicom.dcmread(file)
    position = np.array(header.ImagePositionPatient, float)
    if kind == "missing":
        return file.unlink()
    if kind == "repeated":
        header.ImagePositionPatient = pydicom.dcmread(folder / "2").ImagePositionPatient
    elif kind == "sheared":
        header.ImagePositionPatient = list(np.round(position + 2 * np.array(header.ImageOrientationPatient[:3]), 6))
    elif kind == "turned":
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    elif kind == "unplaced":
        del header.ImagePositionPatient
    elif kind == "cut short":
        file = folder / "3"  # at an end, so that the others are evenly spaced
        return file.write_bytes(file.read_bytes()[:-20])
    elif kind == "other series":
        header.SeriesInstanceUID, header.SeriesDescription = "1.2.3.99", "T1 DUAL"
    elif kind == "other size":  # a localizer under the same UID
        header.Rows, header.PixelData = 1, header.PixelData[: 2 * header.Columns]
    header.save_as(file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing or unevenly spaced: 9\.00 mm between slices \d and \d, .* in the median"),
        ("repeated", "1 of its 4 slices lie where another one does"),
        ("sheared", "shifted against each other"),
        ("turned", "differ in orientation"),
        ("cut short", r"3 cannot be read \(cut short\?\)"),
        ("unplaced", "1 lacks ImagePositionPatient"),
        ("other series", r"holds 2 DICOM series.* T1 DUAL \(MR, 7 x 5, 1 files, such as 1\).*folder of its own"),
        ("other size", r"holds 2 DICOM series.*MR, 7 x 1, 1 files.*MR, 7 x 5, 3 files"),
    ],
)
def test_what_is_no_volume_is_an_error(kind, message, tmp_path):
    folder = save_series(tmp_path, VOLUME, names=range(4))
    assert len(read_series(folder)) == 4
    break_series(folder, kind)
    with pytest.raises(ValueError, match=message):
        read_series(folder)
    with pytest.raises(ValueError, match=message):
        check_cases([{"case": "p7", "image": str(folder), "slice_labels": [0, 1, 1, 0]}])
    (item,) = CaseDataset([{"case": "p7", "image": str(folder)}], None)
    assert item["case"] == "p7" and re.search(message, item["error"])


def test_enhanced_frames_out_of_order_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="not stored in the order of their positions"):
        read_series(save_enhanced(tmp_path, VOLUME, order=[1, 0, 2, 3]))


def test_an_empty_folder_is_no_series(tmp_path):
    with pytest.raises(ValueError, match="holds no DICOM series"):
        read_series(tmp_path)


def test_a_single_slice_is_a_volume(tmp_path):
    assert len(read_series(save_series(tmp_path, VOLUME[..., :1]))) == 1


def test_only_a_series_can_be_referred_to(tmp_path):
    case = {"case": "p7", "image": str(tmp_path / "p7.nii.gz")}
    check_source(case, "nifti")
    with pytest.raises(ValueError, match=r"case 'p7': .*p7.nii.gz is none; .* or --output_format nifti"):
        check_source(case, "dicom_seg")
    case["image"] = str(save_series(tmp_path / "in", VOLUME, FrameOfReferenceUID=None))
    check_source(case, "nifti")
    with pytest.raises(ValueError, match=r"case 'p7': .* has no FrameOfReferenceUID"):
        check_source(case, "dicom_seg")
    with pytest.raises(ValueError, match=r"output_format must be one of \['nifti', 'dicom_seg'\]; got 'dicom'"):
        CaseDataset([], None, output_format="dicom")


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
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ser"]


# ---- CHAOS as published

ORGANS = {"liver": 63, "right kidney": 126, "left kidney": 189, "spleen": 252}
KIDNEYS = TAGS[1:]  # another order of slices gives other tags


def save_chaos_case(root, seed: int) -> None:
    """`<id>/T2SPIR/DICOM_anon/*.dcm` and `Ground/*.png`, paired by the order of their names, which is against z."""
    image, lesion = (volume[..., 1:] for volume in head(seed))
    names = [f"IMG-0004-{len(KIDNEYS) - z:05d}" for z in range(len(KIDNEYS))]
    folder = root / "MR" / str(seed + 1) / "T2SPIR"
    save_series(folder / "DICOM_anon", image, np.diag([-1.0, -1.0, 7.7, 1.0]), [f"{name}.dcm" for name in names])
    x = np.arange(image.shape[0])[:, None, None]
    label = np.where(lesion, np.where(x % 2, ORGANS["right kidney"], ORGANS["left kidney"]), 0)
    label[:2], label[-2:] = ORGANS["liver"], ORGANS["spleen"]
    (folder / "Ground").mkdir()
    for z, name in enumerate(names):
        Image.fromarray(label[..., z].T.astype(np.uint8)).save(folder / "Ground" / f"{name}.png")


def test_chaos_as_published_from_datalist_to_evaluation(tmp_path):
    root, listed = tmp_path / "CHAOS", tmp_path / "CHAOS" / "datalist.json"
    for seed in range(3):
        save_chaos_case(root, seed)
    splits = {"training": ["chaos_01", "chaos_02"], "test": ["chaos_03"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    main(["chaos", "--root", str(root), "--output", str(listed), "--splits", str(tmp_path / "splits.json")])
    sections = json.loads(listed.read_text())
    assert all(item["slice_labels"] == KIDNEYS for item in (*sections["training"], *sections["test"]))

    where = ["--dataset_dir", root, "--output_dir", tmp_path / "runs", "--ckpt_dir", tmp_path / "models"]
    short = ["--epoch_length=2", "--max_epochs=1"]
    monai_bundle("run", "training", "--config_file", config("chaos_kidney", "train"), *where, *TINY, *short)

    stages = f"['{config('chaos_kidney', 'inference')}','{config('chaos_kidney', 'evaluate')}']"
    kidneys = head(2)[1][..., 1:]  # liver and spleen are no target
    for method in ("cdm", "intensity"):  # a network of two iterations may find nothing
        out = tmp_path / method
        where = ["--dataset_dir", root, "--output_dir", out, "--ckpt_path", tmp_path / "models" / "model.pt"]
        more = ["--output_format=dicom_seg", f"--method={method}"]
        monai_bundle("run", "--config_file", stages, *where, *TINY, *more)
        mask = nib.load(out / "chaos_03" / "chaos_03_mask.nii.gz")
        assert_same(as_nifti(out / "chaos_03" / "chaos_03_seg.dcm"), mask)
        with (out / "metrics" / "per_slice.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["slice"]) for row in rows] == [z for z, tag in enumerate(KIDNEYS) if tag]
        for row in rows:
            found, true = (volume[..., int(row["slice"])] > 0 for volume in (mask.get_fdata(), kidneys))
            dice = 2 * (found & true).sum() / (found.sum() + true.sum())
            assert float(row["dice"]) == pytest.approx(dice, abs=1e-4)
    assert dice > 0
