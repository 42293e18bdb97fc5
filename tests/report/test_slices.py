"""Slices the way they are viewed: left and right are where the marks say, whatever the order on disk."""

from __future__ import annotations

import base64
import io

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from custom_modules.report.slices import View, is_placed, jpeg, picture_size

SHAPE = (10, 12, 6)  # along R, A, S


def stored(codes: str) -> nib.Nifti1Image:
    """A volume with one bright voxel on the patient's left, in front and near the feet, stored along `codes`."""
    volume = np.zeros(SHAPE, np.float32)
    volume[1, 10, 1] = 1  # R counts from the left, A from the back, S from the feet
    image = nib.Nifti1Image(volume, np.diag([1.0, 2.0, 5.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    return image.as_reoriented(turn)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PSR", "SLP", "IAL"])
@pytest.mark.parametrize(
    ("world", "sides", "place", "pixel"),
    [  # sagittal, coronal, axial: rows and columns of the voxel, counted from the patient's head, front and right
        ("RL", {"left": "A", "right": "P", "top": "S", "bottom": "I"}, (4, 1), (5.0, 2.0)),
        ("AP", {"left": "R", "right": "L", "top": "S", "bottom": "I"}, (4, 8), (5.0, 1.0)),
        ("SI", {"left": "R", "right": "L", "top": "A", "bottom": "P"}, (1, 8), (2.0, 1.0)),
    ],
)
def test_a_voxel_on_the_left_is_where_the_l_is(codes, world, sides, place, pixel):
    image = stored(codes)
    view = View(image.affine, next(axis for axis, code in enumerate(codes) if code in world))
    volume = np.asarray(image.dataobj)
    index = int(np.argwhere(volume)[0][view.axis])
    assert np.argwhere(view.plane(volume, index)).tolist() == [list(place)]
    assert (view.sides, view.pixel) == (sides, pixel)


def test_a_file_without_a_place_says_so(tmp_path):
    for name, affine in (("placed", np.eye(4)), ("nominal", None)):
        nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine), tmp_path / f"{name}.nii")
    assert is_placed(tmp_path / "placed.nii") and not is_placed(tmp_path / "nominal.nii")
    assert is_placed(tmp_path)  # the folder of a DICOM series


def test_pictures_have_square_pixels_and_no_more_than_are_stored():
    assert picture_size((31, 256), (7.7, 1.25), 128) == (95, 128)  # 238.7 x 320 mm
    assert picture_size((40, 48), (1.0, 1.0), 256) == (40, 48)
    picture = Image.open(io.BytesIO(base64.b64decode(jpeg(np.linspace(-1, 2, 48 * 40).reshape(40, 48), (20, 24)))))
    assert (picture.size, picture.mode) == ((24, 20), "L") and np.ptp(np.asarray(picture)) > 250
