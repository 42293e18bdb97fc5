"""The volumes of one case: image, truth, saliency and mask on the stored grid, and slices the way they are viewed.

The provenance file beside a result says where its image is, and its label; otherwise the label is looked for where
`custom_modules.data.layouts` finds labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage

from custom_modules.data.labels import load_label, target_mask
from custom_modules.data.layouts import find_cases
from custom_modules.data.reader import VolumeReader
from custom_modules.files import read_json
from custom_modules.inference.mask import slice_axis_of
from custom_modules.report.slices import View


@dataclass(frozen=True)
class Case:
    """One case on its stored grid.

    Args:
        name: name of the case.
        image: (H, W, D), real.
        affine: (4, 4), to RAS mm.
        axis: stored axis along which the slices are counted.
        truth: (H, W, D), bool; None where there is no label.
        saliency: (H, W, D), real.
        mask: (H, W, D), binary.
    """

    name: str
    image: np.ndarray
    affine: np.ndarray
    axis: int
    truth: np.ndarray | None
    saliency: np.ndarray
    mask: np.ndarray

    def plane(self, volume: np.ndarray | None, index: int) -> np.ndarray | None:
        """Return slice `index` of a stored volume (H, W, D) as (rows, columns); see `View`."""
        return None if volume is None else View(self.affine, self.axis).plane(volume, index)

    @property
    def pixel(self) -> tuple[float, float]:
        """Distance in mm between the rows and between the columns of a `plane`."""
        return View(self.affine, self.axis).pixel

    def largest(self) -> int:
        """Return the slice with most of the truth, else of the mask, else of the saliency: the first that is not 0."""
        marked = (volume for volume in (self.truth, self.mask, self.saliency) if volume is not None and volume.any())
        return int(np.moveaxis(next(marked, self.image), self.axis, 0).sum(axis=(1, 2)).argmax())


def read_case(folder: Path, target_labels: Sequence[int] | None = None, slice_axis: int | None = None) -> Case:
    """Read the volumes of one case from the folder of its result.

    Args:
        folder: `<output_dir>/<stem>`.
        target_labels: label values of the target, empty: all above 0; None: unknown, and the truth is left out.
        slice_axis: stored axis of the slices; None: the one that the recorded orientation names.

    Raises:
        FileNotFoundError: the folder holds no provenance file, or a volume or the image no longer exists.
    """
    facts = read_facts(folder)
    if not Path(facts["image"]).exists():
        raise FileNotFoundError(f"the image of {folder} is not at {facts['image']} any more.")
    image, affine, label = _read_image(facts["image"], facts.get("label"))
    truth = None if label is None or target_labels is None else target_mask(label, target_labels)
    if slice_axis is None:
        slice_axis = slice_axis_of(affine, facts.get("settings", {}).get("orientation", "LPS"))
    saliency, mask = (np.asarray(nib.load(volume_file(folder, what)).dataobj) for what in ("saliency", "mask"))
    return Case(facts["case"], image, affine, slice_axis, truth, saliency, mask)


@lru_cache(maxsize=1)  # the runs of a study are drawn over the same image one after the other
def _read_image(path: str, label: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Read image (H, W, D), affine (4, 4) and label values (H, W, D), None where there is no label."""
    found = find_cases(path)[0]
    image, label = LoadImage(VolumeReader, image_only=True)(path), label or found.get("label")
    array = image.numpy() if image.ndim == 3 else image.numpy()[..., found.get("channel", 0)]
    return array, np.asarray(image.affine), None if label is None else load_label(label, path)


def case_folders(output_dir: Path) -> list[Path]:
    """Find the folders of the cases in the output of an evaluation or inference."""
    return sorted(path.parent for path in output_dir.glob("*/*_provenance.json"))


def read_facts(folder: Path) -> dict:
    """Read the provenance of one case.

    Raises:
        FileNotFoundError: the folder holds no provenance file.
    """
    return read_json(_provenance_file(folder))


def volume_file(folder: Path, what: str) -> Path:
    """Return where the `saliency`, `mask` or `uncertainty` of a case is, or would be."""
    return folder / _provenance_file(folder).name.replace("_provenance.json", f"_{what}.nii.gz")


def _provenance_file(folder: Path) -> Path:
    path = next(folder.glob("*_provenance.json"), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no *_provenance.json: not a result of this bundle.")
    return path
