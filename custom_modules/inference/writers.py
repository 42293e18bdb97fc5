"""NIfTI files that are either whole or absent."""

from __future__ import annotations

import gzip
import zlib

import nibabel as nib
import numpy as np
from monai.data import NibabelWriter

from custom_modules.data.reader import lay_out
from custom_modules.files import atomic_path


class RunLengthImage(nib.Nifti1Image):
    """A NIfTI image whose `.nii.gz` is compressed by run lengths, as any reader of gzip understands.

    A map is 0 outside of the body, and inside it is noise to a compressor: to look for more than runs takes twice as
    long, and the file is no smaller.
    """

    def to_filename(self, filename, **kwargs) -> None:
        if not str(filename).endswith(".gz"):
            return super().to_filename(filename, **kwargs)
        with open(filename, "wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as stream:
            stream.compress = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
            self.to_stream(stream, **kwargs)


class AtomicNibabelWriter(NibabelWriter):
    """Writes by MONAI's NIfTI writer through `atomic_path`.

    A volume of one slice stays a volume: MONAI's writer would drop its last axis together with the channel's. It would
    also turn a mask to float32 and back where nothing is resampled.
    """

    def set_data_array(self, data_array, *args, **kwargs) -> None:
        super().set_data_array(data_array, *args, **kwargs)
        while self.data_obj.ndim < 3:
            self.data_obj = self.data_obj[..., None]

    def set_metadata(self, meta_dict, resample: bool = True, **options) -> None:
        if resample or self.output_dtype is None:
            super().set_metadata(meta_dict, resample, **options)
        else:
            self.affine = self.get_meta_info(meta_dict)[1]

    @classmethod
    def create_backend_obj(cls, *args, **kwargs) -> RunLengthImage:
        image = super().create_backend_obj(*args, **kwargs)
        return RunLengthImage(lay_out(np.asarray(image.dataobj), "F"), image.affine, image.header)  # as in the file

    def write(self, filename, verbose: bool = False, **kwargs) -> None:
        with atomic_path(filename) as aside:
            super().write(aside, verbose=verbose, **kwargs)
