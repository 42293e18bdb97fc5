"""DICOM series of any geometry, classic (a file a slice) or enhanced (one file), written on the spot and read back."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from pathlib import Path

import highdicom
import itk
import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, MetaTensor
from monai.transforms import LoadImage
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

OBLIQUE = np.eye(4)  # RAS, mm: turned about all three axes, voxels of 0.9 x 1.4 x 4.5 mm, off the origin
OBLIQUE[:3, :3] = np.array([[0.0, -0.8, 0.6], [-0.96, 0.168, 0.224], [-0.28, -0.576, -0.768]]) * [0.9, 1.4, 4.5]
OBLIQUE[:3, 3] = [12.5, -31.25, 140.0]


def save_series(folder: Path, volume: np.ndarray, affine: np.ndarray = OBLIQUE, names: Iterable = (), **tags) -> Path:
    """Writes a volume (W, H, D) with a RAS affine as an MR series, slice i to the file `names[i]`.

    By default the names have no ending and run in another order than the slices. `tags` go into every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shuffled = np.random.default_rng(0).permutation(volume.shape[2])
    for i, name in enumerate(names or [f"IM{number:04d}" for number in shuffled]):
        header = _header(MRImageStorage, volume, affine) | _plane(affine, i)
        header |= {"InstanceNumber": i + 1, **tags}
        _save(header, volume[..., i], folder / str(name))
    return folder


def save_edited(folder: Path, volume: np.ndarray, edit: Callable[[Dataset, int], object], **tags) -> Path:
    """Writes a series, slice i to the file i, and then each header once more after `edit(header, i)`."""
    save_series(folder, volume, names=range(volume.shape[2]), **tags)
    for i in range(volume.shape[2]):
        header = dcmread(folder / str(i))
        edit(header, i)
        header.save_as(folder / str(i))
    return folder


def only(slices: Container[int], name: str, value) -> Callable[[Dataset, int], object]:
    """An edit that gives the tag `name` of some slices another value, or with None takes it away."""

    def edit(header: Dataset, i: int) -> None:
        if i in slices:
            setattr(header, name, value) if value is not None else delattr(header, name)

    return edit


def save_enhanced(folder: Path, volume: np.ndarray, affine: np.ndarray = OBLIQUE, order: Iterable = ()) -> Path:
    """Writes a volume (W, H, D) with a RAS affine as one enhanced MR file, its frames in `order`."""
    folder.mkdir(parents=True, exist_ok=True)
    order = list(order or range(volume.shape[2]))
    header = _header(EnhancedMRImageStorage, volume, affine)
    measures = {key: header.pop(key) for key in ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")}
    plane = _plane(affine, 0)
    orientation = {"ImageOrientationPatient": plane["ImageOrientationPatient"]}
    header["SharedFunctionalGroupsSequence"] = [
        _dataset(PixelMeasuresSequence=[_dataset(**measures)], PlaneOrientationSequence=[_dataset(**orientation)])
    ]
    positions = [_dataset(ImagePositionPatient=_plane(affine, i)["ImagePositionPatient"]) for i in order]
    header["PerFrameFunctionalGroupsSequence"] = [_dataset(PlanePositionSequence=[position]) for position in positions]
    _save(header | {"NumberOfFrames": len(order)}, volume[..., order], folder / "enhanced.dcm")
    return folder


def _header(sop_class: str, volume: np.ndarray, affine: np.ndarray) -> dict:
    width, height, thickness = np.linalg.norm(affine[:3, :3], axis=0)
    return {
        "SOPClassUID": sop_class,
        "Modality": "MR",
        "PatientID": "P7",
        "PatientName": "Doe^Jo",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.3.5",
        "SeriesNumber": 3,
        "Rows": volume.shape[1],
        "Columns": volume.shape[0],
        "PixelSpacing": [height, width],  # between rows, between columns
        "SliceThickness": 2,  # a gap between the slices
        "SpacingBetweenSlices": thickness,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
    }


def _plane(affine: np.ndarray, i: int) -> dict:
    """Position and orientation of slice i, in LPS."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    x, y = (lps[:3, axis] / np.linalg.norm(lps[:3, axis]) for axis in (0, 1))
    position = lps[:3, 3] + i * lps[:3, 2]
    return {"ImagePositionPatient": _decimal(position), "ImageOrientationPatient": _decimal([*x, *y])}


def _decimal(values: Iterable[float]) -> list[str]:
    return [f"{value:.8f}"[:16] for value in values]  # DS: at most 16 characters


def _dataset(**entries) -> Dataset:
    dataset = Dataset()
    for key, value in entries.items():
        if value is not None:
            setattr(dataset, key, value)
    return dataset


def _save(header: dict, pixels: np.ndarray, path: Path) -> None:
    dataset = _dataset(SOPInstanceUID=generate_uid(entropy_srcs=[str(path)]), **header)
    dataset.PixelData = np.ascontiguousarray(pixels.T.astype("<u2")).tobytes()  # (W, H[, D]) -> ([D,] rows, columns)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)


def save_chaos(root, descending, n_slices=3):
    """Published CHAOS: a series whose files are named along or against the position, and its PNGs.

    Slice i (in order of names) holds i + 1 at row 1, column 2; there the PNG holds a kidney in slice 0 only.
    """
    series, ground = root / "DICOM_anon", root / "Ground"
    for folder in (series, ground):
        folder.mkdir(parents=True)
    for i in range(n_slices):
        pixels, label = np.zeros((5, 4), np.int16), np.zeros((5, 4), np.uint8)
        pixels[1, 2], label[1, 2], label[4, 0] = i + 1, 126 if i == 0 else 63, 252
        image = itk.image_from_array(pixels)
        position = (n_slices - i if descending else i) * 7.7
        tags = {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4", "0020|0037": "1\\0\\0\\0\\1\\0",
                "0020|0032": f"-10\\-20\\{position}", "0020|0013": str(i + 1)}  # fmt: skip
        for key, value in tags.items():
            image.GetMetaDataDictionary()[key] = value
        io = itk.GDCMImageIO.New()
        io.KeepOriginalUIDOn()
        file = str(series / f"IMG-0004-{i + 1:05d}.dcm")
        itk.ImageFileWriter[type(image)].New(Input=image, FileName=file, ImageIO=io).Update()
        itk.imwrite(itk.image_from_array(label), str(ground / f"IMG-0004-{i + 1:05d}.png"))


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
