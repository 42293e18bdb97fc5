"""Mask and saliency come back to the geometry of the input, whatever its orientation, spacing and slice count.

A bundle's own preprocessing and postprocessing run around a method that returns the slice as its map.
"""

from __future__ import annotations

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy import ndimage
from torch import nn

from custom_modules.inference.body import UPPER
from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.evaluator import VolumeBatch, VolumeEvaluator
from custom_modules.inference.inferer import SaliencyInferer
from tests.helpers.bundles import REPO, config

SHAPE, CENTRE = (40, 36, 12), (24, 14, 4)  # of the phantom in LPS; the blob is off the centre in all three directions
TISSUE, BRIGHT = 100, 250


def phantom(depth: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid of 100 with a ball of 250 in it, (40, 36, 12) float32, and the ball (bool); LPS."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    head = ((x - 20) / 17) ** 2 + ((y - 18) / 15) ** 2 + ((z - 5.5) / 9) ** 2 < 1
    ball = ((x - CENTRE[0]) / 6) ** 2 + ((y - CENTRE[1]) / 6) ** 2 + ((z - CENTRE[2]) / 2.5) ** 2 < 1
    image = np.where(ball, BRIGHT, np.where(head, TISSUE, 0)).astype(np.float32)
    return image[..., depth], ball[..., depth]


def stored_as(array: np.ndarray, codes: str, affine: np.ndarray) -> nib.Nifti1Image:
    """An LPS array, stored with other axis codes."""
    to = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    return nib.Nifti1Image(array.astype(np.float32), affine).as_reoriented(to)


def identity(x_0: torch.Tensor, network: nn.Module, slices: list[int]) -> torch.Tensor:
    return x_0


def segment(folder, codes="LPS", spacing=(1, 1, 4), turn=0.0, depth=slice(None), **knobs) -> SimpleNamespace:
    """Runs the phantom through brats_flair's preprocessing, `identity` and its postprocessing; reads the files back."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = 30, -12, 7
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    image, ball = (stored_as(array, codes, rotation @ affine) for array in phantom(depth))
    nib.save(image, folder / "scan.nii.gz")
    axis = next(i for i, code in enumerate(codes) if code in "SI")
    tags = np.asarray(ball.dataobj).any(axis=tuple({0, 1, 2} - {axis}))
    case = {"case": "p1", "image": str(folder / "scan.nii.gz"), "slice_labels": tags.astype(int).tolist()}

    parser = ConfigParser()
    parser.read_config(str(REPO / config("brats_flair", "inference")))
    settings = {"output_dir": str(folder / "out"), "slice_axis": axis, "image_size": 48, "method": "cdm"} | knobs
    for name, value in settings.items():
        parser[name] = value
    inferer = SaliencyInferer(identity, gate="tags", erosion=parser.get_parsed_content("erosion"), amp=False)
    VolumeEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CaseDataset([case], parser.get_parsed_content("preprocessing")), batch_size=1),
        network=nn.Identity(),
        inferer=inferer,
        prepare_batch=VolumeBatch(),
        postprocessing=parser.get_parsed_content("postprocessing"),
    ).run()
    mask, saliency = (nib.load(folder / "out" / "scan" / f"scan_{kind}.nii.gz") for kind in ("mask", "saliency"))
    return SimpleNamespace(image=image, ball=np.asarray(ball.dataobj) > 0, mask=mask, saliency=saliency, axis=axis)


def check_geometry(found: SimpleNamespace) -> None:
    for result in (found.mask, found.saliency):
        assert result.shape == found.image.shape
        np.testing.assert_allclose(result.affine, found.image.affine, atol=1e-4)
        assert nib.aff2axcodes(result.affine) == nib.aff2axcodes(found.image.affine)
    assert found.mask.get_data_dtype() == np.uint8 and found.saliency.get_data_dtype() == np.float32


def dice(found: SimpleNamespace) -> float:
    mask = np.asarray(found.mask.dataobj)
    return 2 * (mask & found.ball).sum() / (mask.sum() + found.ball.sum())


GEOMETRIES = [
    {"codes": "LPS"},
    {"codes": "RAS"},
    {"codes": "SPL"},
    {"codes": "ARI"},
    {"codes": "PIR"},
    {"spacing": (0.6, 1.4, 7.0)},
    {"codes": "RSA", "spacing": (0.6, 1.4, 7.0), "turn": 0.3},
    {"depth": slice(4, 5)},
    {"codes": "SPL", "depth": slice(4, 5)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_mask_and_saliency_come_back_to_the_input(tmp_path, geometry):
    found = segment(tmp_path, **geometry)
    check_geometry(found)
    # 48 pixels for 40 voxels: only the rim of the ball, one voxel of a radius of six, is uncertain; a flipped or
    # permuted mask would miss the ball, which is off the centre
    assert dice(found) > 0.9
    saliency, image = (np.asarray(volume.dataobj) for volume in (found.saliency, found.image))
    inside = ndimage.binary_erosion(found.ball, np.moveaxis(np.ones((5, 5, 1)), -1, found.axis))
    r = BRIGHT / (UPPER * (BRIGHT if "depth" in geometry else TISSUE))  # the ball fills a tenth of its own slice's body
    np.testing.assert_allclose(saliency[inside], 2 * r * (1 + r**8) ** (-1 / 8) - 1, atol=0.1)  # identity, in [-1, 1]
    untagged = ~found.ball.any(axis=tuple({0, 1, 2} - {found.axis}), keepdims=True)
    assert not (saliency * untagged).any() and not saliency[image == 0].any()


@pytest.mark.parametrize("knobs", [{"threshold": "average_otsu"}, {"threshold": 0.7, "num_components": 0}], ids=str)
def test_other_thresholds_find_the_ball_too(tmp_path, knobs):
    found = segment(tmp_path, codes="ARI", **knobs)
    check_geometry(found)
    assert dice(found) > 0.9
