"""NIfTI files that hold the head of `bright` in an odd way, and files that hold no volume."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import struct

import nibabel as nib
import numpy as np
from nibabel import cifti2

from tests.helpers.bundles import LPS, head


def bright(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A head as of `head(seed)`, of 30 on one side to 100 on the other, with a lesion of 140; and the lesion's mask."""
    image, lesion = head(seed)
    tissue = np.rint(np.linspace(30, 100, len(image)))[:, None, None]
    return np.where(lesion, 140, np.where(image, tissue, 0)).astype(np.float32), lesion


HEAD, LESION = bright(0)
RAW = nib.Nifti1Image(HEAD, LPS).to_bytes()  # header of 348 bytes, 4 of extension, voxels float32
PACKED = gzip.compress(RAW)
SHEARED = LPS + np.array([[0, 0.1, 0, 0], [0, 0, 0.2, 0], [0] * 4, [0] * 4])


def volume(array, affine=LPS, kind=nib.Nifti1Image) -> bytes:
    return kind(array, affine).to_bytes()


def patched(offset: int, form: str, *values, raw: bytes = RAW) -> bytes:
    """A volume with other values in its header."""
    content = bytearray(raw)
    struct.pack_into(form, content, offset, *values)
    return bytes(content)


def with_voxel(value: float) -> bytes:
    array = HEAD.copy()
    array[0, 0, 0] = value
    return volume(array)


def two_forms() -> bytes:
    image = nib.Nifti1Image(HEAD, LPS)
    image.set_qform(np.diag([1, 1, 2, 1]), 1)
    image.set_sform(LPS, 2)
    return image.to_bytes()


def surfaces() -> bytes:
    """A CIFTI file, which is a NIfTI-2 file to other readers."""
    brain = cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2)), affine=np.eye(4), name="thalamus_left")
    file = nib.FileHolder(fileobj=io.BytesIO())
    cifti2.Cifti2Image(np.ones((1, 8), np.float32), (cifti2.ScalarAxis(["a"]), brain)).to_file_map({"image": file})
    return file.fileobj.getvalue()


def with_extension() -> bytes:
    image = nib.Nifti1Image(HEAD, LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"scanned at dawn"))
    return image.to_bytes()


def qform_alone() -> bytes:
    image = nib.Nifti1Image(HEAD, None)
    image.set_qform(LPS, 1)
    return image.to_bytes()


DAMAGED, HEADER = "is damaged .*; copy or export it again", r"no valid NIfTI header \(.*\); export it again"
GRID, BODY = "affine that is no grid, .*; correct its header", "shows no body, .* leave the case out"
BAD_FILES = {  # content, and what the report has to say
    "empty.nii.gz": (b"", HEADER),
    "empty_raw.nii": (b"", HEADER),
    "text.nii.gz": (b"no volume", DAMAGED),
    "text_raw.nii": (b"no volume", HEADER),
    "text_inside.nii.gz": (gzip.compress(b"no volume"), HEADER),
    "half.nii.gz": (PACKED[: len(PACKED) // 2], DAMAGED),
    "half_raw.nii": (RAW[: len(RAW) // 2], r"is damaged \(23216 bytes, of 46432 by its header\)"),
    "half_inside.nii.gz": (gzip.compress(RAW[: len(RAW) // 2]), r"is damaged \(23216 bytes, of 46432 by its header\)"),
    "without_checksum.nii.gz": (PACKED[:-8], DAMAGED),
    "flipped_bit.nii.gz": (PACKED[:-9] + bytes([PACKED[-9] ^ 1]) + PACKED[-8:], DAMAGED),
    "wrong_checksum.nii.gz": (PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:], "CRC check failed"),
    "rubbish_behind.nii.gz": (PACKED + b"rubbish", DAMAGED),
    "header_alone.nii": (RAW[:348], DAMAGED),
    "bzip2.nii.gz": (bz2.compress(RAW), DAMAGED),
    "not_packed.nii.gz": (RAW, DAMAGED),
    "picture.nii": (b"\x89PNG\r\n\x1a\n" + bytes(400), HEADER),
    "one_d.nii": (volume(HEAD[:, 0, 0]), "must be one 3D volume; got 1 dimensions"),
    "two_d.nii": (volume(HEAD[..., 2]), "must be one 3D volume; got 2 dimensions"),
    "four_d.nii": (volume(np.stack([HEAD, HEAD], 3)), "4D with 2 channels or time points; split it"),
    "five_d.nii": (volume(np.stack([HEAD, HEAD], 3)[..., None, :]), "4D with 2 channels or time points; split it"),
    "six_d.nii": (volume(np.ones((4, 3, 2, 2, 1, 2), np.int16)), "must be one 3D volume; got 4 dimensions"),
    "surfaces.dscalar.nii": (surfaces(), "is no volume .nibabel reads it as Cifti2Image.; give one"),
    "nan.nii": (with_voxel(np.nan), "holds 1 NaN or infinite voxels; replace them"),
    "infinite.nii": (with_voxel(np.inf), "holds 1 NaN or infinite voxels; replace them"),
    "constant.nii": (volume(np.full_like(HEAD, 7)), r"constant \(7 everywhere\), .*; export it again"),
    "zeros.nii": (volume(np.zeros_like(HEAD)), r"constant \(0 everywhere\), .*; export it again"),
    "one_voxel_bright.nii": (volume(np.pad(np.ones((1, 1, 1), np.float32), 9)), BODY),
    "two_pixels.nii": (volume(np.float32([[[1]], [[2]]])), BODY),
    "one_pixel.nii": (volume(np.float32([[[1]]])), r"constant \(1 everywhere\)"),
    "complex.nii": (volume(HEAD.astype(np.complex64)), "complex64 .complex or colour.; save one real number"),
    "colour.nii": (
        volume(np.zeros(HEAD.shape, [(c, "u1") for c in "RGB"])),
        "complex or colour.; save one real number",
    ),
    "no_type.nii": (patched(70, "<h", 0), "data code 0 not supported"),
    "unknown_type.nii": (patched(70, "<h", 999), "data code 999 not recognized"),
    "bits.nii": (patched(70, "<h", 1), "data code 1 not supported"),
    "no_dimensions.nii": (patched(40, "<h", 0), "no voxels; export it again"),
    "negative_size.nii": (patched(42, "<h", -5), r"shape \(-5, 40, 6\), no voxels; export it again"),
    "size_of_0.nii": (patched(42, "<h", 0), r"shape \(0, 40, 6\), no voxels; export it again"),
    "too_large.nii": (patched(42, "<h", 30000), r"is damaged \(46432 bytes, of 28800352 by its header\)"),
    "far_too_large.nii.gz": (gzip.compress(patched(42, "<3h", 30000, 30000, 30000)), DAMAGED),
    "singular.nii": (patched(312, "<4f", 0, 0, 0, 0), GRID),
    "flat_affine.nii": (patched(296, "<4f", -1, 0, 0, 0), GRID),
    "nan_affine.nii": (patched(280, "<f", np.nan), GRID),
    "infinite_affine.nii": (patched(280, "<f", np.inf), GRID),
    "magic.nii": (patched(344, "<4s", b"abcd"), HEADER),
    "voxels_beyond.nii": (patched(108, "<f", 1e7), DAMAGED),
    "voxels_in_header.nii": (patched(108, "<f", 16), "vox offset 16 too low"),
    "voxels_at_0.nii": (patched(108, "<f", 0), "voxels at byte 0, in its header; export it again"),
    "packed_twice.nii.gz": (gzip.compress(PACKED), HEADER),
    "intercept_nan.nii": (patched(112, "<ff", 1, np.nan), HEADER),
    "mixed_case.NiI.gZ": (PACKED, "ending of mixed case; rename it"),
    "nul.nii": (RAW, "'nul' of a case is reserved"),
    "com1.nii": (RAW, "'com1' of a case is reserved"),
    "COM¹.nii": (RAW, "'COM¹' of a case is reserved"),
    " space.nii": (RAW, "must neither be empty nor begin or end"),
    "dot..nii": (RAW, "must neither be empty nor begin or end"),
    "new\nline.nii": (RAW, r"must not hold '\\n'"),
    "bell\x07.nii": (RAW, r"must not hold '\\x07'"),
    f"{'x' * 240}.nii": (RAW, "has 240 bytes, but at most"),
}
ODD_FILES = {  # all of them hold `HEAD`
    "big_endian.nii": nib.Nifti1Image(HEAD, LPS, nib.Nifti1Header(endianness=">")).to_bytes(),
    "nifti2.nii": volume(HEAD, kind=nib.Nifti2Image),
    "header_size.nii": patched(0, "<i", 540),
    "UPPER.NII": RAW,
    "UPPER_PACKED.NII.GZ": PACKED,
    "two_members.nii.gz": gzip.compress(RAW[:5000]) + gzip.compress(RAW[5000:]),
    "doubles.nii": volume(HEAD.astype(np.float64)),
    "integers.nii": volume(np.rint(HEAD).astype(np.int32)),
    "integers_of_64_bits.nii": (
        nib.Nifti1Image(np.rint(HEAD).astype(np.uint64) + 2**60, LPS, dtype=np.uint64).to_bytes()
    ),
    "bytes.nii": volume(np.rint(HEAD).clip(0, 255).astype(np.uint8)),
    "offset.nii": volume(HEAD.astype(np.float64) + 1e8),
    "offset_100.nii": volume(HEAD + 100),
    "below_zero.nii": volume(HEAD - 4096),
    "times_1e12.nii": volume(HEAD * np.float32(1e12)),
    "times_1e-6.nii": volume(HEAD * np.float32(1e-6)),
    "times_1e298.nii": volume(HEAD.astype(np.float64) * 1e298),
    "times_1e-42.nii": volume(HEAD * np.float32(1e-42)),
    "slope_infinite.nii": patched(112, "<f", np.inf),
    "slope_below_0.nii": patched(112, "<ff", -1, 140, raw=volume(140 - HEAD)),
    "extension.nii": with_extension(),
    "five_d_of_ones.nii": volume(HEAD[..., None, None]),
    "in_metres.nii": patched(123, "<B", 1, raw=volume(HEAD, LPS @ np.diag([4e-4, 4e-4, 2.5e-4, 1]))),
    "-dash 100%20 🧠.nii": RAW,
    "slope.nii": patched(112, "<ff", 3, -7),
    "no_slope.nii": patched(112, "<ff", 0, -7),
    "slope_nan.nii": patched(112, "<f", np.nan),
    "hot_voxel.nii": with_voxel(1e9),
    "cold_voxel.nii": with_voxel(-1e6),
    "padding.nii": volume(np.where(HEAD == 0, np.float32(-1024), HEAD)),
    "four_d_of_one.nii": volume(HEAD[..., None]),
    "two_forms.nii": two_forms(),
    "qform_alone.nii": qform_alone(),
    "no_form.nii": volume(HEAD, None),
    "microns.nii": patched(123, "<B", 3),
    "sizes_below_0.nii": patched(80, "<fff", -1, -1, -4),
    "sizes_of_0.nii": patched(80, "<fff", 0, 0, 0),
    "sheared.nii": volume(HEAD, SHEARED),
    "spaces and ü, 脳.nii": RAW,
    os.fsdecode(b"not_utf8_\xff.nii"): RAW,
    "$__import__('os').abort().nii": RAW,
    "@device.nii": RAW,
    "%dataset_dir.nii": RAW,
}
