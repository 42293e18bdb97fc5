"""Layouts: where data sets keep their volumes and labels on disk, and how their geometry, labels and tags are read.

A case is one volume, `{"case", "image", "label"?, "channel"?}`. Every rule that belongs to one data set (BraTS, MSD,
CHAOS) stands in this file; the others see cases and arrays.
"""

from __future__ import annotations

import csv
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from glob import glob as glob_paths
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from tqdm import tqdm

from custom_modules.dicom import read_series, series_files

LAYOUTS = {  # where each layout keeps its images; `glob` takes the place of these patterns
    "brats": ("**/*_flair.nii*", "**/*-t2f.nii*"),
    "msd": ("**/imagesTr/*.nii*",),
    "chaos": ("**/T2SPIR/DICOM_anon", "**/*_t2spir.nii*"),
    "volumes": ("**/*.nii*", "**/"),
}
CHAOS_KIDNEYS = (2, 3, 126, 189)  # right and left; 2, 3 in NIfTI copies, 126, 189 in the published PNGs
NOT_IMAGES = re.compile(r"[_-](seg|mask|saliency)$")  # labels, and what our own inference writes
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, ImageFileError)


def find_cases(root: str | Path, layout: str = "auto", glob: str | None = None) -> list[dict]:
    """Find the volumes below a folder. Links are followed, hidden files are not seen.

    Args:
        root: a folder, or one volume (a NIfTI file, the folder of a DICOM series).
        layout: `brats`, `msd`, `chaos`, `volumes`, or `auto`: the first of these that finds something.
        glob: pattern relative to `root` in place of the layout's own (with `auto`: of `volumes`).

    Returns:
        Cases in the order of their paths, `{"case", "image", "label"?, "channel"?}`, with unique names and absolute
        paths. An image is a NIfTI file or the folder of a DICOM series, a label a NIfTI file or a folder of PNGs.

    Raises:
        FileNotFoundError: `root` does not exist.
        ValueError: unknown layout, or nothing found.
    """
    root = Path(os.path.abspath(root))
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be one of auto, {', '.join(LAYOUTS)}; got {layout!r}.")
    if not root.exists():
        raise FileNotFoundError(f"dataset folder {root} does not exist.")
    if _is_image(root):
        fitting = (name for name, patterns in LAYOUTS.items() if any(fnmatch(str(root), p) for p in patterns))
        return [_describe(root, next(fitting, "volumes") if layout == "auto" else layout)]
    tried = [layout] if layout != "auto" else ["volumes"] if glob else list(LAYOUTS)
    for name in tried:
        if images := _glob_images(root, [glob] if glob else LAYOUTS[name]):
            return name_apart([_describe(image, name) for image in images], root)
    patterns = [glob] if glob else [pattern for name in tried for pattern in LAYOUTS[name]]
    raise ValueError(f"no volume found: {root} holds no NIfTI file or DICOM series that fits {', '.join(patterns)}.")


def _glob_images(root: Path, patterns: Iterable[str]) -> list[Path]:
    found = {root / name for pattern in patterns for name in glob_paths(pattern, root_dir=root, recursive=True)}
    unpacked_twins = {path.with_suffix("") for path in found if path.suffix == ".gz"}
    return sorted(p for p in found - unpacked_twins if _is_image(p) and not NOT_IMAGES.search(stem_of(p)))


def _is_image(path: Path) -> bool:
    """Whether this is a NIfTI file or a folder that directly holds DICOM files."""
    if path.is_file():
        return path.name.endswith((".nii", ".nii.gz"))
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        may_be = file.suffix.lower() in ("", ".dcm", ".ima") or file.suffix[1:].isdigit()
        other = file.name.startswith(".") or file.name == "DICOMDIR" or NOT_IMAGES.search(file.stem)
        if may_be and not other and file.is_file():
            with file.open("rb") as stream:
                if stream.read(132)[128:] == b"DICM":
                    return True
    return False


def stem_of(path: Path) -> str:
    return path.name if path.is_dir() else re.sub(r"\.nii(\.gz)?$", "", path.name)


def _describe(image: Path, layout: str) -> dict:
    """Name a case by the rule of its layout and find its label."""
    stem = stem_of(image)
    without_modality = re.sub(r"(?<=.)[_-][^_-]+$", "", stem)
    endings = ("_seg.nii.gz", "_seg.nii", "-seg.nii.gz", "-seg.nii")
    labels = [image.with_name(name + ending) for name in (stem, without_modality) for ending in endings]
    item = {"case": stem if layout in ("msd", "volumes") else without_modality, "image": str(image)}
    if layout == "chaos" and image.is_dir():
        item["case"] = f"chaos_{image.parents[1].name:0>2}"
        labels = [image.with_name("Ground")]
    elif layout == "msd":
        item["channel"] = 0  # FLAIR
        labels = [image.parents[1] / "labelsTr" / image.name]
    label = next((path for path in labels if path.exists()), None)
    return item | ({"label": str(label)} if label else {})


def name_apart(cases: list[dict], root: Path) -> list[dict]:
    """Put the folders between root and image before names that occur more than once, and a number if need be."""
    counts = Counter(item["case"] for item in cases)
    taken: set[str] = set()
    for item in cases:
        name = item["case"]
        if counts[name] > 1:
            folders = Path(os.path.relpath(item["image"], root)).parent.parts
            name = "_".join([*(folder for folder in folders if folder not in ("..", name)), name])
        numbered = (name, *(f"{name}_{i}" for i in range(2, len(cases) + 1)))
        item["case"] = next(unique for unique in numbered if unique not in taken)
        taken.add(item["case"])
    return cases


# Reading labels and tags


def load_label(path: str | Path, image: str | Path | None = None) -> np.ndarray:
    """Read a label volume as stored: a NIfTI file, or a folder of PNGs (CHAOS) that belongs to a DICOM series.

    PNG i in the order of names belongs to DICOM file i in the order of names. The slices then take the order in which
    MONAI's `ITKReader` stacks the series: by position, which may be the reverse of the names.

    Args:
        path: NIfTI file or folder of PNGs.
        image: the DICOM folder that a folder of PNGs belongs to; default: `DICOM_anon` beside it.

    Returns:
        (H, W, D) int32, aligned with the stored array of the image.

    Raises:
        ValueError: not 3D or not finite; not one grey PNG of one size per DICOM file.
    """
    path = Path(path)
    if path.is_dir():
        return _load_pngs(path, Path(image or path.with_name("DICOM_anon")))
    array = np.asanyarray(nib.load(path).dataobj)
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    if array.ndim != 3 or not np.isfinite(array).all():
        raise ValueError(f"label {path} must be a 3D volume of finite values; got shape {array.shape}.")
    return (np.rint(array) if array.dtype.kind == "f" else array).astype(np.int32)


def _load_pngs(folder: Path, series: Path) -> np.ndarray:
    import itk  # slow to import, and NIfTI data need none of it

    files = series_files(series)
    pngs = [path for path in folder.glob("*.png") if not path.name.startswith(".")]
    if len(pngs) != len(files):
        raise ValueError(f"{folder} must hold a PNG per DICOM file; got {len(pngs)} PNGs, {len(files)} DICOM files.")
    png_of = dict(zip(sorted(files, key=_by_number), sorted(pngs, key=_by_number), strict=True))
    slices = [itk.array_from_image(itk.imread(str(png_of[file]))) for file in files]  # each (rows y, columns x)
    shapes = {s.shape for s in slices}
    if len(shapes) > 1 or slices[0].ndim != 2:
        raise ValueError(f"the PNGs of {folder} must be grey and of one size; got shapes {sorted(shapes)}.")
    return np.stack(slices).T.astype(np.int32)  # (z, y, x) -> (x, y, z), as ITKReader


def _by_number(path: Path) -> list:
    """Sort key that puts slice 2 before slice 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_geometry(image: str | Path, channel: int | None = None) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (H, W, D) and affine (4, 4) of a stored volume. Of a NIfTI file only the header is read.

    Raises:
        ValueError: neither 3D nor 4D with that `channel`; a folder that is not one DICOM series.
    """
    if os.path.isdir(image):
        from monai.data import ITKReader

        read_series(image)  # or an error: ITKReader takes what is no volume, with a warning at most
        reader = ITKReader()
        array, meta = reader.get_data(reader.read(image))
        shape, affine = tuple(array.shape), np.asarray(meta["affine"])
    else:
        header = nib.load(image)
        shape, affine = tuple(header.shape), header.affine
    if len(shape) == 4 and (shape[3] == 1 or (channel is not None and 0 <= channel < shape[3])):
        shape = shape[:3]
    if len(shape) != 3:
        wanted = "a 3D volume" if channel is None else f"a 3D volume, or 4D with channel {channel}"
        raise ValueError(f"the volume must be {wanted}; got shape {shape}.")
    return shape, affine


def slice_tags(
    label: np.ndarray, target_labels: Sequence[int] | None = None, slice_axis: int = 2, min_area: int = 0
) -> list[int]:
    """Tag each slice of a label (H, W, D) with 1 where more than `min_area` pixels hold one of `target_labels`
    (None or empty: a value above 0), else 0."""
    target = np.isin(label, list(target_labels)) if target_labels else label > 0
    areas = target.sum(axis=tuple(axis for axis in range(3) if axis != slice_axis))
    return [int(area > min_area) for area in areas]


def read_tags(path: str | Path) -> dict[str, dict[int, int]]:
    """Read slice tags from a CSV with the header `case,slice,label`, as `{case: {slice: 0 or 1}}`.

    Raises:
        ValueError: wrong header, slice or label, or rows that disagree; the message names the line.
    """
    tags: dict[str, dict[int, int]] = defaultdict(dict)
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not {"case", "slice", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must start with the header case,slice,label; got {reader.fieldnames}.")
        for row in reader:
            case, index, tag = ((row[key] or "").strip() for key in ("case", "slice", "label"))
            where = f"{path}, line {reader.line_num} (case {case!r})"
            if not index.isdecimal():
                raise ValueError(f"{where}: slice must be a whole number from 0; got {index!r}.")
            if tag not in ("0", "1"):
                raise ValueError(f"{where}: label must be 0 or 1; got {tag!r}.")
            if tags[case].setdefault(int(index), int(tag)) != int(tag):
                raise ValueError(f"{where}: slice {index} is {tag} here and {tags[case][int(index)]} above.")
    return dict(tags)


def tag_cases(
    cases: list[dict], tags: dict[str, dict[int, int]] | None = None, **rule
) -> tuple[list[dict], dict[str, str], dict[str, str]]:
    """Give each case its `slice_labels`: from `tags`, or else from its label by `slice_tags(label, **rule)`.

    Returns:
        The usable cases (those without tags lack `slice_labels`), `{case: why it was skipped}`, `{case: note}`.

    Raises:
        ValueError: `tags` speak of a case or of a slice that does not exist.
    """
    if unknown := sorted(set(tags or ()) - {item["case"] for item in cases}):
        known = ", ".join(item["case"] for item in cases[:3])
        raise ValueError(f"the tags name unknown cases: {', '.join(unknown[:5])}. Cases are named like {known}.")
    usable, skipped, notes = [], {}, {}
    for item in tqdm(cases, desc="reading cases", unit="case", leave=False, disable=None):
        case, label = item["case"], None
        try:
            n_slices = read_geometry(item["image"], item.get("channel"))[0][rule.get("slice_axis", 2)]
            if tags is None and "label" in item:
                label = load_label(item["label"], item["image"])
                check_label(item, label.shape)
        except UNREADABLE as error:
            skipped[case] = in_a_line(error)
            continue
        if label is not None:
            item = item | {"slice_labels": slice_tags(label, **rule)}
        elif case in (tags or ()):
            if max(tags[case]) >= n_slices:
                raise ValueError(f"the tags of {case!r} name slice {max(tags[case])}; its last is {n_slices - 1}.")
            item = item | {"slice_labels": [tags[case].get(index, 0) for index in range(n_slices)]}
            if missing := n_slices - len(tags[case]):
                notes[case] = f"{missing} of {n_slices} slices are not in the tags; they count as 0."
        else:
            notes[case] = f"no {'label' if tags is None else 'tags'}: listed as untagged, for inference only."
        usable.append(item)
    return usable, skipped, notes


def check_label(item: dict, label_shape: Sequence[int]) -> None:
    """Raise ValueError where a label differs from its image in shape or, between NIfTI files, affine (0.01 mm)."""
    shape, affine = read_geometry(item["image"], item.get("channel"))
    if tuple(label_shape) != shape:
        raise ValueError(f"the label's shape {tuple(label_shape)} differs from the image's {shape}.")
    if os.path.isfile(item["label"]) and not np.allclose(nib.load(item["label"]).affine, affine, atol=1e-2):
        raise ValueError("the label's affine differs from the image's.")


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
