"""The reader: one affine everywhere, whole files only, and the voxels where the file says."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage

from custom_modules.data.geometry import read_geometry
from custom_modules.data.labels import check_label, load_label
from custom_modules.data.reader import VolumeReader, lay_out
from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.writers import AtomicNibabelWriter
from tests.helpers.evaluators import PREPROCESSING
from tests.helpers.series import save_series
from tests.helpers.volumes import save_volume

VALUES = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
AFFINE = np.array([[0, 0, 2.2, -7], [-0.94, 0, 0, 8], [0, 1.03, 0, 9], [0, 0, 0, 1]])


def read(path):
    return LoadImage(VolumeReader, image_only=True)(str(path))


def edited(path, form, offset, *values):
    """Writes VALUES with AFFINE, and `values` into the header at `offset`."""
    save_volume(path, VALUES, AFFINE)
    content = bytearray(gzip.open(path).read())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def test_a_volume_is_laid_out_anew_without_a_change():
    values = np.arange(60, dtype=">i2").reshape(3, 4, 5)
    for order, flag in (("C", "c_contiguous"), ("F", "f_contiguous")):
        for array in (values, np.asfortranarray(values)):
            out = lay_out(array, order)
            assert np.array_equal(out, values) and out.dtype == values.dtype and getattr(out.flags, flag)
    assert np.array_equal(lay_out(values[0], "F"), values[0])  # a plane stays as it is


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0.94, 1.03, 2.2001)])
def test_the_sform_is_the_affine_whatever_the_voxel_sizes_in_the_header(tmp_path, sizes):
    path = edited(tmp_path / "a.nii.gz", "<fff", 80, *sizes)
    assert np.allclose(nib.load(path).affine, AFFINE)
    assert np.allclose(read(path).affine, AFFINE) and np.allclose(read_geometry(path)[1], AFFINE)


def test_where_two_forms_disagree_the_sform_is_used_and_the_log_says_so(tmp_path, caplog):
    image = nib.Nifti1Image(VALUES, np.eye(4))
    image.set_qform(np.diag([1, 1, 3, 1]), 1)
    image.set_sform(AFFINE, 4)
    image.header.set_zooms((1, 1, 3))  # as the qform has them
    nib.save(image, path := tmp_path / "a.nii.gz")
    volume = read(path)
    assert np.allclose(volume.affine, AFFINE) and "a.nii.gz: its sform and qform disagree" in caplog.text
    check_label(save_volume(tmp_path / "a_seg.nii.gz", VALUES, AFFINE), path)
    writer = AtomicNibabelWriter()
    writer.set_data_array(volume, channel_dim=None)
    writer.set_metadata(volume.meta, resample=False)
    writer.write(tmp_path / "out.nii.gz")
    assert np.allclose(nib.load(tmp_path / "out.nii.gz").affine, AFFINE)


def test_agreeing_forms_are_not_worth_a_word(tmp_path, caplog):
    image = nib.Nifti1Image(VALUES, AFFINE)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "A.NII.GZ")
    assert (read(tmp_path / "A.NII.GZ").numpy() == VALUES).all() and "disagree" not in caplog.text


@pytest.mark.parametrize("offset", [1e8, -3e9])
def test_a_large_offset_does_not_eat_the_values(tmp_path, offset):
    path = save_volume(tmp_path / "a.nii.gz", VALUES + offset, AFFINE)
    assert (read(path).numpy() == VALUES).all()
    assert (read(save_volume(path, VALUES + 1000.0, AFFINE)).numpy() == VALUES + 1000).all()


def test_integers_of_64_bits_keep_their_last_digits(tmp_path):
    values = VALUES.astype(np.uint64) + 2**60  # of which a real number of 64 bits keeps 53
    nib.save(nib.Nifti1Image(values, AFFINE, dtype=np.uint64), tmp_path / "a.nii")
    assert (read(tmp_path / "a.nii").numpy() == VALUES).all()


@pytest.mark.parametrize("unit", ["meter", "micron"])
def test_lengths_that_are_not_in_mm_are_named(tmp_path, caplog, unit):
    image = nib.Nifti1Image(VALUES, AFFINE)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    assert np.allclose(read(tmp_path / "a.nii").affine, AFFINE)
    assert f"a.nii: its header gives lengths in {unit.replace('er', 're')}s; they are read as mm" in caplog.text
    nib.save(nib.Nifti1Image(VALUES, np.diag([1e-3, 1e-3, 4e-3, 1])), tmp_path / "b.nii")  # and no word in the header
    read(tmp_path / "b.nii")
    assert "b.nii: its header gives voxels of 0.001 x 0.001 x 0.004; they are read as mm" in caplog.text


def test_one_flipped_bit_is_noticed(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", VALUES, AFFINE)
    content = path.read_bytes()
    for position in (len(content) - 8, len(content) // 2):  # the checksum; the voxels
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(ValueError, match="a.nii.gz is damaged .*copy or export it again"):
            read(path)
        with pytest.raises(ValueError, match="is damaged"):
            load_label(path)


@pytest.mark.parametrize(
    "form, offset, values, why",
    [
        ("<hh", 70, (32, 64), r"voxels of type complex64 \(complex or colour\)"),
        ("<hh", 70, (128, 24), r"voxels of type .*'R'.*\(complex or colour\)"),
        ("<h", 70, (0,), r"no valid NIfTI header \(.*code 0"),
        ("<ffff", 280, (0, 0, 0, 0), "an affine that is no grid"),
        ("<h", 42, (0,), r"shape \(0, 4, 5\), no voxels"),
    ],
)
def test_what_is_no_volume_of_real_numbers_is_named(tmp_path, form, offset, values, why):
    path = edited(tmp_path / "a.nii.gz", form, offset, *values)
    with pytest.raises(ValueError, match=f"a.nii.gz .*{why}"):
        read_geometry(path)
    (item,) = CaseDataset([{"case": "p1", "image": str(path)}], PREPROCESSING)
    assert item["error"].startswith("ValueError: ") and "a.nii.gz" in item["error"]


def test_a_spacing_of_zero_is_named(tmp_path):
    folder = save_series(tmp_path / "odd", np.arange(120).reshape(4, 5, 6), SpacingBetweenSlices=0)
    with pytest.raises(ValueError, match="odd is not a volume: its SpacingBetweenSlices is 0.*remove that tag"):
        read(folder)


@pytest.mark.parametrize("spacing", [-4.5, None])
def test_slices_are_where_their_positions_say(tmp_path, spacing):
    volume = np.arange(120).reshape(4, 5, 6)
    good = read(save_series(tmp_path / "good", volume))
    odd = save_series(tmp_path / "odd", volume, SpacingBetweenSlices=spacing)
    assert np.allclose(read(odd).affine, good.affine, atol=1e-4) and (read(odd).numpy() == good.numpy()).all()
    assert np.allclose(read_geometry(odd)[1], good.affine, atol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "SLA", "PIR"])
def test_a_label_in_another_orientation_is_turned_onto_its_image(tmp_path, codes):
    image = save_volume(tmp_path / "a.nii.gz", VALUES, AFFINE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    label = tmp_path / "a_seg.nii.gz"
    nib.save(nib.Nifti1Image(VALUES, AFFINE).as_reoriented(turn), label)
    assert (load_label(label, image) == VALUES).all()
    check_label(label, image)


def test_a_label_that_lies_elsewhere_or_has_another_shape_is_an_error(tmp_path):
    image = save_volume(tmp_path / "a.nii.gz", VALUES, AFFINE)
    moved = save_volume(tmp_path / "moved.nii.gz", VALUES, AFFINE + np.eye(4)[3] * [[0], [0], [3], [0]])
    other = save_volume(tmp_path / "other.nii.gz", VALUES[:2], AFFINE)
    for check in (load_label, check_label):
        with pytest.raises(ValueError, match="affine differs"):
            check(moved, image)
        with pytest.raises(ValueError, match=r"shape \(2, 4, 5\) differs from the image's \(3, 4, 5\)"):
            check(other, image)
