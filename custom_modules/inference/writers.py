"""NIfTI files that are either whole or absent."""

from __future__ import annotations

from monai.data import NibabelWriter

from custom_modules.files import atomic_path


class AtomicNibabelWriter(NibabelWriter):
    """Writes by MONAI's NIfTI writer through `atomic_path`.

    A volume of one slice stays a volume: MONAI's writer would drop its last axis together with the channel's.
    """

    def set_data_array(self, data_array, *args, **kwargs) -> None:
        super().set_data_array(data_array, *args, **kwargs)
        while self.data_obj.ndim < 3:
            self.data_obj = self.data_obj[..., None]

    def write(self, filename, verbose: bool = False, **kwargs) -> None:
        with atomic_path(filename) as aside:
            super().write(aside, verbose=verbose, **kwargs)
