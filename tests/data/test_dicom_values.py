"""DICOM series: voxels have the values that the headers give them, in every slice and frame, or an error says why."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from custom_modules.data.dicom import read_series
from custom_modules.data.reader import VolumeReader
from custom_modules.inference.dicom_seg import segmentation
from tests.helpers.series import OBLIQUE, only, save_edited, save_enhanced, save_series
from tests.inference.test_dicom_seg import SEGMENTS, save_mask

VOLUME = np.random.default_rng(0).integers(1, 1000, (7, 5, 4)).astype(np.int16)  # (W, H, D)
SLOPES, INTERCEPTS = np.array([2, 0.37, 1.5, 1]), np.array([1, -3, 0.5, 0])  # the first are integers: itk's type


def save(folder, edit, volume=VOLUME):
    return str(save_edited(folder, volume, edit))


def scale(header, i):
    header.RescaleSlope, header.RescaleIntercept = float(SLOPES[i]), float(INTERCEPTS[i])


def read(folder):
    return VolumeReader().get_data(str(folder))[0]


def test_every_slice_has_its_own_slope(tmp_path):
    assert np.allclose(read(save(tmp_path, scale)), VOLUME * SLOPES + INTERCEPTS)


@pytest.mark.parametrize("shared", [False, True])
def test_every_frame_has_its_own_slope(tmp_path, shared):
    file = save_enhanced(tmp_path, VOLUME) / "enhanced.dcm"
    header = pydicom.dcmread(file)
    groups = header.SharedFunctionalGroupsSequence if shared else header.PerFrameFunctionalGroupsSequence
    for i, group in enumerate(groups):
        group.PixelValueTransformationSequence = [Dataset()]
        scale(group.PixelValueTransformationSequence[0], i)
    header.save_as(file)
    slopes, intercepts = (v[:1] if shared else v for v in (SLOPES, INTERCEPTS))
    assert np.allclose(read(tmp_path), VOLUME * slopes + intercepts, atol=1e-3)


@pytest.mark.parametrize("signed", [0, 1])
def test_low_values_are_bright_where_they_mean_white(tmp_path, signed):
    def edit(header, i):
        scale(header, i)
        header.PhotometricInterpretation, header.PixelRepresentation = "MONOCHROME1", signed
        header.add_new(0x00280120, "US", 2000)

    padded = VOLUME.copy()
    padded[:3] = 2000
    values = VOLUME * SLOPES + INTERCEPTS
    values[:3] = values[3:].max()  # black
    assert np.allclose(read(save(tmp_path, edit, padded)), values.max() + values.min() - values, atol=0.01)


@pytest.mark.parametrize(
    ("value", "limit", "kind"), [(-2000, None, "SS"), (63536, None, "US"), (-1990, -2010, "SS"), (-2010, -1990, "SS")]
)
def test_padding_is_background(tmp_path, value, limit, kind):
    def pad(header, i):
        scale(header, i)
        header.PixelRepresentation = 1
        header.add_new(0x00280120, kind, value)
        if limit is not None:
            header.add_new(0x00280121, kind, limit)

    padded = VOLUME.copy()
    padded[:3] = -2000
    expected = VOLUME * SLOPES + INTERCEPTS
    expected[:3] = INTERCEPTS.min()  # no signal
    assert np.allclose(read(save(tmp_path, pad, padded)), expected)


def test_nothing_but_padding_is_named(tmp_path):
    with pytest.raises(ValueError, match="all voxels of .*0 are padding by its PixelPaddingValue; remove that tag"):
        read(save(tmp_path, lambda header, i: header.add_new(0x00280120, "US", 7), np.full_like(VOLUME, 7)))


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (
            only([1, 2], "RescaleSlope", 2),
            "2 of its 4 slices lack RescaleSlope and RescaleIntercept.*cannot be compared",
        ),
        (only([1], "RescaleSlope", 0), "RescaleSlope is 0"),
        (only([0, 1, 2, 3], "PixelSpacing", None), r"lacks PixelSpacing \(4 of 4 slices do\); export it again"),
        (only([2], "PixelSpacing", [1.4, 1.9]), r"PixelSpacing is \[1.4 0.9\], \[1.4 1.9\]; .* the same in all"),
        (only([2], "PhotometricInterpretation", "MONOCHROME1"), "Interpretation is MONOCHROME1, MONOCHROME2; it must"),
    ],
)
def test_values_that_cannot_be_known_are_named(tmp_path, edit, why):
    with pytest.raises(ValueError, match=f"{tmp_path} is not a volume: .*{why}"):
        read(save(tmp_path, edit))


def test_slopes_of_1_in_some_slices_change_nothing(tmp_path):
    assert np.array_equal(read(save(tmp_path, only([1], "RescaleSlope", 1))), VOLUME)


@pytest.mark.parametrize(
    "edit",
    [
        only([0, 1, 2, 3], "SliceThickness", None),
        only([2], "SliceThickness", "2.0001"),
        only([2], "SliceThickness", ""),
        only([0, 1, 2, 3], "SpacingBetweenSlices", -4.5),
        only([0, 1, 2, 3], "SpacingBetweenSlices", None),
        only([3], "SeriesDate", "20260101"),
    ],
)
def test_odd_thickness_and_spacing_change_nothing(tmp_path, edit):
    folder = save(tmp_path / "odd", edit)
    good = VolumeReader().get_data(save(tmp_path / "good", lambda header, i: None))
    odd = VolumeReader().get_data(folder)
    assert np.array_equal(odd[0], good[0]) and np.allclose(odd[1]["affine"], good[1]["affine"], atol=1e-4)
    frames = np.random.default_rng(1).random((4, 5, 7)) > 0.5
    written = segmentation(read_series(folder), frames, SEGMENTS["brats_flair"], "x")
    measures = written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SpacingBetweenSlices == 4.5 and measures.SliceThickness > 0
    assert written.NumberOfFrames == 4


@pytest.mark.parametrize("spacing", [-4.5, None, 0])
def test_frames_lie_where_their_positions_say(tmp_path, spacing):
    file = save_enhanced(tmp_path / "p7", VOLUME) / "enhanced.dcm"
    header = pydicom.dcmread(file)
    header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = spacing
    header.save_as(file)
    array, meta = VolumeReader().get_data(str(file.parent))
    assert np.array_equal(array, VOLUME) and np.allclose(meta["affine"], OBLIQUE, atol=1e-4)


def test_what_we_write_into_the_folder_of_a_series_is_no_part_of_it(tmp_path):
    folder = save_series(tmp_path / "p7", VOLUME)
    save_mask(folder, tmp_path)  # to p7/p7_seg.dcm
    (folder / "p7_provenance.json").write_text("{}")
    assert len(list(folder.iterdir())) == 6 and np.array_equal(read(folder), VOLUME)
