"""One case of a report, from what is on disk: how much was found, and the slices that tell most about it.

first, last, middle, largest    of the target: the mask, and the truth where it was given
least sure                      the slice with the most entropy, where the map says it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import nibabel as nib
import numpy as np
from skimage.measure import find_contours

from custom_modules.data.labels import load_label, target_mask
from custom_modules.data.reader import VolumeReader, open_nifti
from custom_modules.inference.mask import slice_axis_of
from custom_modules.report.html import note
from custom_modules.report.slices import View, is_placed, jpeg, picture_size

LEAST, SIZE = 6, 256  # pictures a case, pixels
WINDOW = (1, 99.9)  # percentiles of the pictured slices that become black and white


def measure(
    folder: Path, facts: Mapping, label: str | None, probabilities: bool, doubt: Sequence[np.ndarray] | None = None
) -> tuple[dict, str]:
    """Measures a case and draws its slices.

    Args:
        folder: of the results.
        facts: the case's provenance.
        label: file of the truth; None: none was given.
        probabilities: the saliency map holds probabilities.
        doubt: `doubts` of the case, if they are known without reading it.

    Returns:
        {"voxels", "ml" (None where the file gives no voxel size), "first", "last" (slices of the mask, or None)},
        and HTML of the pictures.

    Raises:
        OSError, ValueError: a volume is gone or cannot be read.
    """
    image, affine = _read(facts["image"], facts.get("channel"))
    view = View(affine, slice_axis_of(affine, facts["settings"].get("orientation", "LPS")))
    mask = np.asarray(nib.load(folder / f"{folder.name}_mask.nii.gz").dataobj) > 0
    truth = None if label is None else _truth(label, facts)
    placed = is_placed(facts["image"])
    found = np.flatnonzero(_areas(mask, view.axis))
    numbers = {
        "voxels": int(mask.sum()),
        "ml": float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000) if placed else None,
        "first": int(found[0]) if found.size else None,
        "last": int(found[-1]) if found.size else None,
    }
    target = mask if truth is None else mask | truth
    doubt = _stored_doubts(folder, probabilities) if doubt is None else doubt
    slices = choose_slices(_areas(target, view.axis), None if doubt is None else doubt[view.axis])
    figures = _figures(image, mask, truth, view, slices, view.sides if placed else {})
    remark = "" if placed else note("The file does not say where left and right are, nor how large a voxel is.")
    return numbers, f'{remark}<div class="slices">{figures}</div>'


def _read(path: str, channel: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image (H, W, D) and its affine (4, 4); a file was read to its end, and checked, before the result."""
    if Path(path).is_dir():
        array, meta = VolumeReader().get_data(path)
        return array, np.asarray(meta["affine"])
    image = open_nifti(path)
    array = np.asanyarray(image.dataobj)
    return array if array.ndim == 3 else array[..., channel or 0], image.affine


def _truth(label: str, facts: Mapping) -> np.ndarray:
    return target_mask(load_label(label, facts["image"]), facts["settings"].get("target_labels"))


def _areas(volume: np.ndarray, axis: int) -> np.ndarray:
    # in 64 bits, or the order in which a volume lies in memory decides between two slices
    return volume.sum(axis=tuple(other for other in range(3) if other != axis), dtype=np.float64)


def doubts(volume: np.ndarray, entropy: bool) -> list[np.ndarray]:
    """Sums how unsure each slice is, along each of the three axes: three arrays, of (H,), (W,) and (D,).

    Args:
        volume: (H, W, D): the entropy of each voxel, or the probability p. Of that p (1 - p) is taken, which has its
            maximum in the same place, and of every third voxel: it only has to rank the slices.
        entropy: which of the two it is.
    """
    sums = []
    for axis in range(3):
        part = volume[tuple(slice(None, None, 1 if other == axis else 3) for other in range(3))]
        sums.append(_areas(part if entropy else part * (1 - part), axis))
    return sums


def _stored_doubts(folder: Path, probabilities: bool) -> list[np.ndarray] | None:
    for name, entropy in {"uncertainty": True, "saliency": False}.items():
        file = folder / f"{folder.name}_{name}.nii.gz"
        if file.is_file() and (entropy or probabilities):
            return doubts(np.asarray(nib.load(file).dataobj), entropy)
    return None


def choose_slices(areas: np.ndarray, doubt: np.ndarray | None = None) -> dict[int, str]:
    """Chooses the slices that tell most about a case, in order, {index: what it shows}; at least `LEAST` if it can.

    Args:
        areas: (D,), the target's pixels in each slice.
        doubt: (D,), how unsure each slice is, or None.
    """
    found = np.flatnonzero(areas)
    named: dict[int, list[str]] = {}
    if found.size:
        middle = found[(len(found) - 1) // 2]
        for name, index in {"first": found[0], "middle": middle, "largest": areas.argmax(), "last": found[-1]}.items():
            named.setdefault(int(index), []).append(name)
    if doubt is not None and np.any(doubt):
        named.setdefault(int(np.argmax(doubt)), []).append("least sure")
    others = found if found.size else np.linspace(0, len(areas) - 1, LEAST + 2).round().astype(int)[1:-1]
    while len(named) < LEAST and (left := [int(k) for k in others if k not in named]):
        named[max(left, key=lambda k: min((abs(k - other) for other in named), default=0))] = []  # into widest gap
    return {index: ", ".join(named[index]) for index in sorted(named)}


def _figures(
    image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None, view: View, slices: Mapping[int, str], sides: Mapping
) -> str:
    planes = {index: view.plane(image, index).astype(np.float32) for index in slices}
    low, high = np.percentile(np.stack(list(planes.values())), WINDOW)
    size = picture_size(next(iter(planes.values())).shape, view.pixel, SIZE)
    parts = []
    for index, shows in slices.items():
        grey = (planes[index] - low) / max(high - low, 1e-6)
        outlines = {"mask": view.plane(mask, index)}
        if truth is not None:
            outlines = {"truth": view.plane(truth, index), **outlines}
        caption = f"slice {index}" + (f": {shows}" if shows else "")
        parts.append(figure(grey, size, outlines, sides, caption))
    return "".join(parts)


def figure(
    grey: np.ndarray, size: tuple[int, int], outlines: Mapping[str, np.ndarray], sides: Mapping, caption: str
) -> str:
    """Draws a slice (rows, columns) in [0, 1] as HTML, with an outline a mask (bool, same shape) over it."""
    height, width = size
    lines = "".join(f'<path class="{kind}" d="{outline(plane, size)}"/>' for kind, plane in outlines.items())
    letter = round(max(size) / 14)
    places = {"left": (letter * 0.7, height / 2), "right": (width - letter * 0.7, height / 2)}
    places |= {"top": (width / 2, letter), "bottom": (width / 2, height - letter * 0.35)}
    marks = "".join(
        f'<text x="{places[side][0]:.0f}" y="{places[side][1]:.0f}" font-size="{letter}">{mark}</text>'
        for side, mark in sides.items()
    )
    source = f"data:image/jpeg;base64,{jpeg(grey, size)}"
    picture = f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{source}"/>'
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(caption)}">'
    return f"<figure>{head}{picture}{lines}{marks}</svg><figcaption>{escape(caption)}</figcaption></figure>"


def outline(plane: np.ndarray, size: Sequence[int]) -> str:
    """Traces the outlines of a mask (rows, columns) as the path of an SVG of `size` (height, width)."""
    scale = np.divide(size, plane.shape)
    path = []
    for line in find_contours(np.pad(plane, 1).astype(np.float32), 0.5) if plane.any() else ():
        points = (line - 0.5) * scale  # the middle of the first pixel is at 0.5 here, at 1 in `line`
        path.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in points) + "Z")
    return "".join(path)
