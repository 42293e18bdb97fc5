"""Layouts: where data sets keep their volumes and labels on disk.

A case is one volume, `{"case", "image", "label"?, "channel"?}`. Every rule of a single data set (BraTS, MSD, CHAOS) is
in this file; the others see cases and arrays.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path, PurePosixPath

from custom_modules.files import NIFTI, flat_name, folded, stem_of

logger = logging.getLogger(__name__)
LAYOUTS = {  # where each layout keeps its images; `glob` takes the place of these patterns
    "brats": ("**/*_flair.nii*", "**/*-t2f.nii*"),
    "msd": ("**/imagesTr/*.nii*",),
    "chaos": ("**/T2SPIR/DICOM_anon", "**/*_t2spir.nii*"),
    "volumes": ("**/*.nii*", "**/"),
}
IN_WORDS = {  # what each layout takes for an image
    "brats": "NIfTI files whose names end in _flair or -t2f",
    "msd": "NIfTI files in a folder imagesTr",
    "chaos": "DICOM series in folders T2SPIR/DICOM_anon, NIfTI files whose names end in _t2spir",
    "volumes": "NIfTI files (.nii, .nii.gz), DICOM series (one a folder)",
}
DICOM = re.compile(r"\.(dcm|dic|dicom|ima)$", re.IGNORECASE)
OTHER_FORMATS = re.compile(
    r"\.(n?hdr|mg[hz]|nrrd|mh[ad]|minc|mnc|par|gipl|nia|nifti|npz|zip|7z|rar|tgz|tar|tar\.\w+|img(\.gz)?|"
    r"(nii|dcm)\.(bz2|xz|zst|zip|7z|z|bak|part)|dcm\.gz)$",
    re.IGNORECASE,
)
CHAOS_KIDNEYS = (2, 3, 126, 189)  # right and left: 2, 3 in NIfTI copies; 126, 189 in the published PNGs
NOT_IMAGES = re.compile(r"[_-](seg|mask|saliency|uncertainty)$")  # labels, and what our own inference writes


def find_cases(
    root: str | Path, layout: str = "auto", glob: str | None = None, output_dir: str | Path | None = None
) -> list[dict]:
    """Find the volumes below a folder, each file once: links are followed, hidden files and results are ignored.

    Args:
        root: a folder, or one volume (a NIfTI file, the folder of a DICOM series).
        layout: `brats`, `msd`, `chaos`, `volumes`, or `auto`: the first of these that finds something.
        glob: pattern relative to `root` that replaces those of the layout (with `auto`: of `volumes`).
        output_dir: folder of results, which is not searched if it is below `root`.

    Returns:
        Cases in the order of their paths, `{"case", "image", "label"?, "channel"?}`, with unique names and absolute
        paths. An image is a NIfTI file or the folder of a DICOM series, a label a NIfTI file or a folder of PNGs.

    Raises:
        FileNotFoundError: `root` does not exist.
        ValueError: the layout is unknown, or nothing was found.
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
    paths = list(_walk(root, None if output_dir is None else os.path.realpath(output_dir)))
    for name in tried:
        if images := _images(paths, root, [glob] if glob else LAYOUTS[name]):
            _name_others(paths)
            return name_apart([_describe(image, name) for image in images], root)
    wanted = IN_WORDS[tried[-1]] + (f" that fit {glob}" if glob else "")
    remedy = "convert them to one of these" if layout == "auto" and not glob else "choose another layout or --glob"
    raise ValueError(
        f"no volume found in {root} or below. Looked for: {wanted}. Found: {_found(paths or [root])}; {remedy}."
    )


def _found(paths: Sequence[Path]) -> str:
    """Says what kinds of files there are, the three most frequent ones: "12 .mha files, 3 .txt files"."""
    counts = Counter(map(_kind, (path for path in paths if not path.is_dir())))
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count} {kind if count > 1 else kind.replace('files', 'file', 1)}" for kind, count in kinds[:3]]
    return ", ".join(words) + (" and others" if len(kinds) > 3 else "") or "no file"


def _kind(file: Path) -> str:
    if NIFTI.search(file.name) and NOT_IMAGES.search(stem_of(file)):
        return "files of labels or results (_seg, _mask, ...)"
    ending = (NIFTI.search(file.name) or OTHER_FORMATS.search(file.name) or [file.suffix])[0].lower()
    return f"{ending} files" if ending else "files without ending"


def _walk(root: Path, left_out: str | None) -> Iterator[Path]:
    """Give the folders and files below `root`, itself first: each real one once, those behind links last.

    A link to a folder above would multiply its cases under other names, which a split takes for other patients.
    """
    starts, seen = [root], {left_out} - {os.path.realpath(root)}
    for start in starts:  # grows
        for folder, folders, files in os.walk(start, onerror=lambda error: logger.warning("not searched: %s", error)):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            visible = sorted(name for name in folders if not name.startswith(".") and name not in links)
            starts += [Path(folder, name) for name in sorted(links) if not name.startswith(".")]
            real = os.path.realpath(folder)
            folders[:] = [] if real in seen else visible
            here = [] if real in seen else [folder, *(os.path.join(folder, name) for name in files if name[0] != ".")]
            seen.add(real)
            yield from map(Path, here)


def _images(paths: Iterable[Path], root: Path, patterns: Iterable[str]) -> list[Path]:
    """Choose the images that fit one of `patterns`; of several names of one file the first that is no link."""
    wanted = [PurePosixPath(pattern).parts for pattern in patterns]
    found = [p for p in paths if any(_fits(_lower_ending(p.relative_to(root)).parts, parts) for parts in wanted)]
    unpacked_twins = {path.with_suffix("") for path in found if path.suffix.lower() == ".gz"}
    images = [p for p in found if p not in unpacked_twins and _is_image(p) and not NOT_IMAGES.search(stem_of(p))]
    links_first = sorted(images, key=lambda p: (p.is_symlink(), p), reverse=True)
    return sorted({os.path.realpath(path): path for path in links_first}.values())


def _name_others(paths: Iterable[Path]) -> None:
    """Logs what looks like a volume and is none that can be read: other formats, links to nowhere."""
    others = [str(p) for p in paths if OTHER_FORMATS.search(p.name) or (NIFTI.search(p.name) and not _is_image(p))]
    no_series = {p.parent: p for p in paths if DICOM.search(p.name)}  # one file for each folder
    others += [str(file) for folder, file in no_series.items() if not _is_image(folder)]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        logger.warning(
            "not read: %s%s; give each as a NIfTI file (.nii, .nii.gz) or a DICOM series.", ", ".join(others[:5]), more
        )


def _lower_ending(path: Path) -> Path:
    return path.with_name(NIFTI.sub(lambda ending: ending[0].lower(), path.name)) if path.name else path


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether the parts of a path fit those of a pattern, in which `**` stands for any number of folders."""
    if not pattern or not path:
        return not path and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _fits(path, pattern[1:]) or _fits(path[1:], pattern)
    return fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _is_image(path: Path) -> bool:
    """Tell whether `path` is a NIfTI file, or a folder that directly holds DICOM files."""
    if path.is_file():
        return NIFTI.search(path.name) is not None
    files = [file for file in path.iterdir() if file.name[0] != "."] if path.is_dir() else []
    for i, file in enumerate(sorted(files)):
        may_be = not file.suffix or DICOM.search(file.name) or file.suffix[1:].isdigit() or i == 0  # one of any ending
        other = file.name == "DICOMDIR" or NOT_IMAGES.search(file.stem)
        if may_be and not other and file.is_file() and _is_dicom(file):
            return True
    return False


def _is_dicom(file: Path) -> bool:
    """Tell whether a file begins as DICOM does: with its preamble or, in old ones, with the first entries."""
    with open(file, "rb") as stream:
        start = stream.read(132)
    return start[128:] == b"DICM" or re.match(rb"[\x02\x08]\0[\0\x01\x05\x08\x16]\0", start) is not None


def _describe(image: Path, layout: str) -> dict:
    """Name a case by the rule of its layout and find its label."""
    stem = flat_name(stem_of(image))
    without_modality = re.sub(r"(?<=.)[_-][^_-]+$", "", stem)
    endings = ("_seg.nii.gz", "_seg.nii", "-seg.nii.gz", "-seg.nii")
    labels = [image.with_name(name + ending) for name in (stem, without_modality) for ending in endings]
    item = {"case": stem if layout in ("msd", "volumes") else without_modality, "image": str(image)}
    if layout == "chaos" and image.is_dir():
        item["case"] = f"chaos_{flat_name(image.parents[1].name):0>2}"
        labels = [image.with_name("Ground")]
    elif layout == "msd":
        item["channel"] = 0  # FLAIR
        labels = [image.parents[1] / "labelsTr" / image.name]
    label = next((path for path in labels if path.exists()), None)
    return item | ({"label": str(label)} if label else {})


def name_apart(cases: list[dict], root: Path) -> list[dict]:
    """Make names unique on any file system: prefix a repeated one with the folders between root and image, and number
    what is left."""
    counts = Counter(folded(item["case"]) for item in cases)
    taken: set[str] = set()
    for item in cases:
        name = item["case"]
        if counts[folded(name)] > 1:
            folders = Path(os.path.relpath(item["image"], root)).parent.parts
            name = flat_name("_".join([*(folder for folder in folders if folder not in ("..", name)), name]))
        numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        item["case"] = next(unique for unique in numbered if folded(unique) not in taken)
        taken.add(folded(item["case"]))
    return cases
