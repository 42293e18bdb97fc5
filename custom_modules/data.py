"""From folders of volumes to a datalist: layouts, slice tags, splits by patient, and the check before training.

A case is one volume. A datalist is MONAI's decathlon JSON: lists of cases under `training`, `validation` and `test`,

    {"case": "p1", "image": "p1/p1_flair.nii.gz", "slice_labels": [0, 1, ...], "label"?: ..., "channel"?: 0}

`slice_labels[i]` says whether index i of the stored array along `slice_axis` shows the target. Paths are relative to
the folder that was searched. Cases without tags stand under `untagged`: good for inference, of no use for training.

    python -m custom_modules.data brats --root DIR --output DIR/datalist.json
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import sys
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

LAYOUTS = {  # where each layout keeps its images; `glob` takes the place of these patterns
    "brats": ("**/*_flair.nii*", "**/*-t2f.nii*"),
    "msd": ("**/imagesTr/*.nii*",),
    "chaos": ("**/T2SPIR/DICOM_anon", "**/*_t2spir.nii*"),
    "volumes": ("**/*.nii*", "**/"),
}
CHAOS_KIDNEYS = (2, 3, 126, 189)  # right and left; 2, 3 in NIfTI copies, 126, 189 in the published PNGs
NOT_IMAGES = re.compile(r"[_-](seg|mask|saliency)$")  # labels, and what our own inference writes
SECTIONS = ("training", "validation", "test")
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, ImageFileError)


# Finding cases


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
            return _name_apart([_describe(image, name) for image in images], root)
    patterns = [glob] if glob else [pattern for name in tried for pattern in LAYOUTS[name]]
    raise ValueError(f"no volume found: {root} holds no NIfTI file or DICOM series that fits {', '.join(patterns)}.")


def _glob_images(root: Path, patterns: Iterable[str]) -> list[Path]:
    found = {root / name for pattern in patterns for name in glob_paths(pattern, root_dir=root, recursive=True)}
    unpacked_twins = {path.with_suffix("") for path in found if path.suffix == ".gz"}
    return sorted(p for p in found - unpacked_twins if _is_image(p) and not NOT_IMAGES.search(_stem(p)))


def _is_image(path: Path) -> bool:
    """Whether this is a NIfTI file or a folder that directly holds DICOM files (judged by the first candidate)."""
    if path.is_file():
        return path.name.endswith((".nii", ".nii.gz"))
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        may_be = file.suffix.lower() in ("", ".dcm", ".ima") or file.suffix[1:].isdigit()
        if may_be and file.is_file() and not file.name.startswith(".") and file.name != "DICOMDIR":
            with file.open("rb") as stream:
                return stream.read(132)[128:] == b"DICM"
    return False


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else re.sub(r"\.nii(\.gz)?$", "", path.name)


def _describe(image: Path, layout: str) -> dict:
    """Name a case by the rule of its layout and find its label."""
    stem = _stem(image)
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


def _name_apart(cases: list[dict], root: Path) -> list[dict]:
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

    names = itk.GDCMSeriesFileNames.New()  # the calls of MONAI's ITKReader, hence its order of slices
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(str(series))
    uids = names.GetSeriesUIDs()
    files = [Path(name) for name in names.GetFileNames(uids[0])] if uids else []
    pngs = [path for path in folder.glob("*.png") if not path.name.startswith(".")]
    if not files or len(pngs) != len(files):
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
        ValueError: neither 3D nor 4D with that `channel`.
    """
    if os.path.isdir(image):
        from monai.data import ITKReader

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
                _check_label(item, label.shape)
        except UNREADABLE as error:
            skipped[case] = _in_a_line(error)
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


def _check_label(item: dict, label_shape: Sequence[int]) -> None:
    """Raise ValueError where a label differs from its image in shape or, between NIfTI files, affine (0.01 mm)."""
    shape, affine = read_geometry(item["image"], item.get("channel"))
    if tuple(label_shape) != shape:
        raise ValueError(f"the label's shape {tuple(label_shape)} differs from the image's {shape}.")
    if os.path.isfile(item["label"]) and not np.allclose(nib.load(item["label"]).affine, affine, atol=1e-2):
        raise ValueError("the label's affine differs from the image's.")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Splits by patient


def patient_of(case: str) -> str:
    """Patient of a case: BraTS time points (`BraTS-GLI-00001-000`, `-001`) share one, else each case is one."""
    return re.sub(r"^(BraTS-[A-Za-z]+-\d+)-\d{3}$", r"\1", case)


def split_cases(
    cases: list[dict], seed: int = 0, fractions: Sequence[float] = (0.8, 0.1, 0.1), folds: int = 0
) -> list[dict[str, list[dict]]]:
    """Divide cases by patient, at random under a seed, each group (hospital, folder) in the same proportions.

    Args:
        cases: `{"case", "image", ...}`.
        seed: of the random order.
        fractions: shares of training, validation and test; from 3 patients on, each share above 0 gets one.
        folds: 0 for one split, or the number N of folds.

    Returns:
        One split `{"training", "validation", "test"}`, or N: fold k is the test, the others are the training.

    Raises:
        ValueError: fractions that are no three shares with sum 1; folds that are 1 or more than the patients.
    """
    order = _stratified_order(cases, seed)
    if folds < 0 or folds == 1 or folds > len(order):
        raise ValueError(f"folds must be 0, or from 2 to the number of patients ({len(order)}); got {folds}.")
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be 3 shares (training, validation, test) with sum 1; got {fractions}.")
    dealt = [i % folds for i in range(len(order))] if folds else _deal(len(order), fractions)
    place = dict(zip(order, dealt, strict=True))
    return _expand(cases, {item["case"]: place[patient_of(item["case"])] for item in cases})


def _stratified_order(cases: list[dict], seed: int) -> list[str]:
    """Patients, group after group; the order of the groups and within them is random."""
    group: dict[str, str] = {}
    for item in sorted(cases, key=lambda item: item["case"]):
        hospital = re.match(r"TCGA[_-]([A-Za-z0-9]{2})[_-]", item["case"])
        folder = Path(item["image"]).parent
        folder = folder.parent if folder.name == item["case"] else folder
        group.setdefault(patient_of(item["case"]), hospital[1] if hospital else folder.name)
    patients = list(group)
    random.Random(seed).shuffle(patients)
    rank = {name: i for i, name in enumerate(dict.fromkeys(group[patient] for patient in patients))}
    return sorted(patients, key=lambda patient: rank[group[patient]])


def _deal(n: int, fractions: Sequence[float]) -> list[str]:
    """Deal n places in a row to the sections, so that every stretch of the row holds each in about its share."""
    shares = [max(round(n * f), int(f > 0 and n >= 3)) for f in fractions[1:]]
    quota = dict(zip(SECTIONS, [n - sum(shares), *shares], strict=True))
    dealt: list[str] = []
    for i in range(1, n + 1):
        unfilled = [name for name in SECTIONS if dealt.count(name) < quota[name]]
        dealt.append(max(unfilled, key=lambda name: i * quota[name] / n - dealt.count(name)))
    return dealt


def _expand(cases: list[dict], place: dict[str, str | int]) -> list[dict[str, list[dict]]]:
    """Splits from the place of each case, a section or the number of a fold: one split, or one per fold."""
    n_folds = max((place[item["case"]] + 1 for item in cases if isinstance(place[item["case"]], int)), default=0)

    def section(p: str | int, fold: int) -> str:
        return p if isinstance(p, str) else "test" if p == fold else "training"

    return [
        {name: [item for item in cases if section(place[item["case"]], fold) == name] for name in SECTIONS}
        for fold in range(max(n_folds, 1))
    ]


def read_splits(path: str | Path) -> dict[str, str | int]:
    """Read given splits: a JSON that holds, at any depth, lists of case names under `training`, `validation`, `test`,
    or lists of such lists under `folds`.

    Returns:
        `{case: section, or number of its fold}`.

    Raises:
        ValueError: nothing of this is there, or a patient stands in two places.
    """
    place: dict[str, str | int] = {}
    place_of_patient: dict[str, str | int] = {}

    def put(names: list[str], where: str | int) -> None:
        for name in names:
            first = place_of_patient.setdefault(patient_of(name), where)
            if first != where:
                raise ValueError(f"{path} puts the patient of {name} in two places: {first} and {where}.")
            place[name] = where

    def walk(node: dict) -> None:
        for key, value in node.items():
            if key in SECTIONS:
                put(value, key)
            elif key == "folds":
                for k, names in enumerate(value):
                    put(names, k)
            elif isinstance(value, dict):
                walk(value)

    walk(_read_json(path))
    if not place:
        raise ValueError(f"{path} must hold lists of cases under {', '.join(SECTIONS)} or folds; got none.")
    return place


def _read_json(path: str | Path) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error


# Reading a datalist, and the check


def load_cases(
    datalist: str | Path | None,
    dataset_dir: str | Path,
    section: str | Sequence[str] | None = None,
    with_label: bool = False,
    discover: bool = False,
    allow_empty: bool = False,
) -> list[dict]:
    """Read the cases of a datalist.

    Args:
        datalist: JSON file; None: `datalist.json` in `dataset_dir`.
        dataset_dir: folder that the paths are relative to; what is not there is sought beside the datalist.
        section: section or sections to read; None: all.
        with_label: keep the key `label`. Training does without, so that it cannot see a mask.
        discover: where there is no datalist, take what `find_cases` finds in `dataset_dir`.
        allow_empty: sections that are there but empty are no error (the validation of folds is).

    Returns:
        `{"case", "image", "slice_labels"?, "label"?, "channel"?}`, with unique names and absolute paths.

    Raises:
        FileNotFoundError: no such folder, no datalist, or none of its images exists.
        ValueError: a section is missing, or all are empty (without `allow_empty`).
    """
    if not os.path.exists(dataset_dir):
        raise FileNotFoundError(f"dataset_dir {dataset_dir} does not exist.")
    path = Path(datalist or Path(dataset_dir) / "datalist.json")
    build = f"Build one: python -m custom_modules.data {'|'.join(LAYOUTS)} --root {dataset_dir} --output {path}"
    if path.is_file():
        folders = [Path(os.path.abspath(folder)) for folder in (dataset_dir, path.parent)]
        items = [_absolute(item, folders) for item in _read_sections(path, section, build)]
        if not items and not allow_empty:
            raise ValueError(f"no case in section {section or 'any'} of {path}: all asked for are empty. {build}")
        if items and not any(os.path.exists(item["image"]) for item in items):
            raise FileNotFoundError(f"none of the images of {path} exists, for example {items[0]['image']}. Set "
                                    f"dataset_dir to the folder that it was built with (--root). {build}")  # fmt: skip
        items = _name_apart(items, folders[0])
    elif datalist is None and discover:
        items = find_cases(dataset_dir)
    else:
        raise FileNotFoundError(f"datalist {path} does not exist. {build}")
    return [{key: value for key, value in item.items() if with_label or key != "label"} for item in items]


def _read_sections(path: Path, section: str | Sequence[str] | None, build: str) -> list[dict]:
    asked = [section] if isinstance(section, str) else list(section or ())
    content = _read_json(path)
    lists = {key: content[key] for key in dict.fromkeys([*SECTIONS, "untagged", *asked]) if key in content}
    held = ", ".join(f"{key} ({len(items)} cases)" for key, items in lists.items()) or "none"
    if missing := [key for key in asked if key not in lists]:
        raise ValueError(f"datalist {path} has no section {', '.join(missing)}; its sections: {held}. {build}")
    # a decathlon list may hold bare paths
    items = [item if isinstance(item, dict) else {"image": item} for key in asked or lists for item in lists[key]]
    if bad := [item for item in items if not isinstance(item.get("image"), str)]:
        raise ValueError(f"every case of {path} must have an image (a path); got {bad[0]}.")
    return items


def _absolute(item: dict, folders: Sequence[Path]) -> dict:
    """Join the paths to the first folder in which they exist (else the first), and name the case if it has no name."""
    item = {"case": _stem(Path(item["image"]))} | item
    for key in {"image", "label"} & set(item):
        paths = [os.path.normpath(folder / item[key]) for folder in folders]
        item[key] = next((path for path in paths if os.path.exists(path)), paths[0])
    return item


def check_cases(
    items: Sequence[dict], require_labels: bool = True, with_label: bool = False, slice_axis: int = 2
) -> dict[str, int]:
    """Check a data set before the work: images readable and 3D, tags that fit the slices, masks that fit the images.

    Args:
        items: cases as from `load_cases`.
        require_labels: every case must have `slice_labels`, and the list both classes.
        with_label: a `label`, where a case has one, must agree with the image in shape and affine.
        slice_axis: the axis that the tags speak of.

    Returns:
        `{"n_cases", "n_slices", "n_positive"}`; slices of tagged cases.

    Raises:
        ValueError: lists the problems of all cases (20, and how many more).
    """
    problems = []
    for item in items:
        try:
            _check_case(item, require_labels, with_label, slice_axis)
        except UNREADABLE as error:
            problems.append(f"{item['case']}: {_in_a_line(error)} ({item['image']})")
    tags = [tag for item in items for tag in item.get("slice_labels", ())]
    if require_labels and not problems and set(tags) != {0, 1}:
        problems.append(f"slice_labels must hold both 0 and 1; got {sum(tags)} ones in {len(tags)} slices.")
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("\n  ".join([f"{len(problems)} problem(s) in the data set:", *problems[:20], *more]))
    return {"n_cases": len(items), "n_slices": len(tags), "n_positive": sum(tags)}


def _check_case(item: dict, require_labels: bool, with_label: bool, slice_axis: int) -> None:
    if missing := [key for key in ("image", "label") if key in item and not os.path.exists(item[key])]:
        if with_label or "image" in missing:
            raise FileNotFoundError(f"the {missing[0]} {item[missing[0]]} does not exist.")
    shape, _ = read_geometry(item["image"], item.get("channel"))
    tags = item.get("slice_labels")
    if tags is None and require_labels:
        raise ValueError("it has no slice_labels.")
    if tags is not None and len(tags) != shape[slice_axis]:
        raise ValueError(f"it has {len(tags)} slice_labels, but axis {slice_axis} of its shape {shape} differs.")
    if not set(tags or ()) <= {0, 1}:
        raise ValueError(f"slice_labels must be 0 or 1; got {sorted(set(tags))}.")
    if with_label and "label" in item:
        label = item["label"]
        _check_label(item, read_geometry(label)[0] if os.path.isfile(label) else load_label(label, item["image"]).shape)


# Command line


def _write_datalist(path: Path, split: dict[str, list[dict]], root: Path, settings: dict) -> None:
    """Write a datalist, a case per line, whole or not at all; paths become relative to `root`."""

    def line(item: dict) -> str:
        paths = {key: Path(os.path.relpath(item[key], root)).as_posix() for key in ("image", "label") if key in item}
        return "\n  " + json.dumps(item | paths)

    entries = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in settings.items()]
    entries += [f" {json.dumps(name)}: [{','.join(map(line, items))}]" for name, items in split.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m custom_modules.data", description="Build a datalist.")
    layouts = parser.add_subparsers(dest="layout", required=True, metavar="|".join(LAYOUTS))
    for layout, patterns in LAYOUTS.items():
        sub = layouts.add_parser(layout, help=f"images at {', '.join(patterns)}")
        target = CHAOS_KIDNEYS if layout == "chaos" else ()
        sub.add_argument("--root", type=Path, required=True, help="folder (or one volume) to search")
        sub.add_argument("--output", type=Path, required=True, help="datalist to write (.json)")
        sub.add_argument("--glob", help=f"pattern of the images, relative to root (default: {' '.join(patterns)})")
        sub.add_argument("--tags", type=Path, help="CSV case,slice,label in place of masks")
        sub.add_argument("--target_labels", type=int, nargs="+", default=target, metavar="VALUE",
                         help=f"mask values that make the target (default: {target or 'all above 0'})")  # fmt: skip
        sub.add_argument("--slice_axis", type=int, default=2, choices=(0, 1, 2), help="axis of slices (default: 2)")
        sub.add_argument("--min_area", type=int, default=0, help="pixels that a positive slice exceeds (default: 0)")
        sub.add_argument("--folds", type=int, default=0, help="write N datalists, each with one fold as its test")
        sub.add_argument("--seed", type=int, default=0, help="of the random split (default: 0)")
        sub.add_argument("--splits", type=Path, help="JSON of given splits or folds, by case name")
    args = parser.parse_args(argv)
    if args.min_area < 0:
        parser.error(f"--min_area must be 0 or more; got {args.min_area}")
    if args.splits and args.folds:
        parser.error("give --splits or --folds, not both: a file of splits has its own folds")
    return args


def _report(title: str, lines: Sequence[str], limit: int = 20) -> None:
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    if lines:
        print("\n  ".join([f"{title} ({len(lines)}):", *lines[:limit], *more]))


def _build(args: argparse.Namespace) -> None:
    """Find the cases, tag their slices, split them by patient, write the datalist (one per fold) and report."""
    rule = {key: getattr(args, key) for key in ("target_labels", "slice_axis", "min_area")}
    cases = find_cases(args.root, args.layout, args.glob)
    usable, skipped, notes = tag_cases(cases, read_tags(args.tags) if args.tags else None, **rule)
    if not usable:
        raise ValueError("no usable case. " + " ".join(f"{case}: {why}" for case, why in skipped.items()))
    tagged = [item for item in usable if "slice_labels" in item]
    untagged = [item for item in usable if "slice_labels" not in item]
    left_out: list[str] = []
    if args.splits:
        place = read_splits(args.splits)
        left_out = [item["case"] for item in tagged if item["case"] not in place]
        tagged = [item for item in tagged if item["case"] in place]
        if not tagged:
            raise ValueError(f"{args.splits} names none of the cases found: {', '.join(left_out[:5])} ...")
        splits = _expand(tagged, place)
    else:
        splits = split_cases(tagged, args.seed, folds=args.folds)

    target = f"label in {list(args.target_labels)}" if args.target_labels else "label > 0"
    source = args.tags or f"{target} on more than {args.min_area} pixels"
    print(f"{len(cases)} cases found in {args.root} ({args.layout}); a slice is positive by: {source}")
    for k, split in enumerate(splits):
        path = args.output if len(splits) == 1 else args.output.with_stem(f"{args.output.stem}_fold{k}")
        split |= {"untagged": untagged} if untagged else {}
        _write_datalist(path, split, args.root if args.root.is_dir() else args.root.parent, rule)
        print(f"{path}\n  {'section':<12}{'cases':>7}{'slices':>8}{'positive':>10}")
        for name, items in split.items():
            tags = [tag for item in items for tag in item.get("slice_labels", ())]
            print(f"  {name:<12}{len(items):>7}{len(tags):>8}{sum(tags):>10}")
    _report("skipped", [f"{case}: {why}" for case, why in skipped.items()])
    _report("left out, not named in the splits", left_out)
    _report("notes", [f"{case}: {note}" for case, note in notes.items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error ends it with a message and exit code 1."""
    try:
        _build(_parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
