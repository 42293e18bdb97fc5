"""Files: written whole or not at all, read as JSON, hashed, and named by names that are safe."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import unicodedata
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DAY = 24 * 60 * 60  # s
NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\.|$)", re.IGNORECASE)  # devices of Windows, with any ending
MAX_NAME = 230  # bytes; with `_uncertainty.nii.gz` it has to stay below the 255 of most file systems


def stem_of(path: str | Path) -> str:
    """Returns the name of a NIfTI file without `.nii` or `.nii.gz`, and that of anything else as it is."""
    return NIFTI.sub("", Path(path).name)


def flat_name(name: object) -> str:
    """Makes one component of a path of a name: `site/p1` becomes `site_p1`, and bytes that are no UTF-8 their codes."""
    return re.sub(r"[/\\]+", "_", str(name).encode(errors="backslashreplace").decode())


def folded(name: str) -> str:
    """Returns what a file system may take a name for: macOS and Windows ignore case, macOS how an accent is stored."""
    return unicodedata.normalize("NFC", name).casefold()


def printable(text: str) -> str:
    """Writes what is no character of a line (control characters, bytes that are no UTF-8) as Python does."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_name(name: str) -> str:
    """Returns `name` if it can safely name a file and a folder on any system.

    Raises:
        ValueError: it is empty or too long, begins or ends with a dot or a space, is reserved, or holds a separator or
            a control character.
    """
    if not name or name != name.strip(" ."):
        why = "must neither be empty nor begin or end with a dot or a space"
    elif bad := re.search(r"[/\\\x00-\x1f\x7f-\x9f]", name):
        why = f"must not hold {bad[0]!r}"
    elif RESERVED.match(name):
        why = "is reserved by Windows"
    elif (length := len(name.encode(errors="backslashreplace"))) > MAX_NAME:
        why = f"has {length} bytes, but at most {MAX_NAME} are allowed"
    else:
        return name
    raise ValueError(f"the name {name!r} of a case {why}; give it another one in a datalist, or rename its file.")


def result_file(output_dir: str | Path, stem: str, ending: str) -> Path:
    """Returns the path of one file of a case's result: `<output_dir>/<stem>/<stem>_<ending>`.

    Raises:
        ValueError: `stem` is not a safe name (`check_name`).
    """
    return Path(output_dir) / check_name(stem) / f"{stem}_{ending}"


def _parts(path: str | Path) -> list[Path]:
    path = Path(path)
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def stamp(path: str | Path) -> str:
    """Describes a file, or the files of a folder, by size, time and inode: another text if one is replaced."""
    facts = ((part.name, part.stat()) for part in _parts(path))
    return ";".join(f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}" for name, stat in facts)


def sha256(path: str | Path) -> str:
    """Hashes a file, or the files of a folder (a DICOM series) one after the other by name; hexadecimal SHA-256."""
    digest = hashlib.sha256()
    for part in _parts(path):
        with open(part, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def read_json(path: str | Path) -> dict:
    """Reads an object from a JSON file; a ValueError names the file that holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 and numbers of 5000 digits, too
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, {{...}}; got {content!r:.40}.")
    return content


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):  # json would keep the last alone
        (name, count) = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} occurs {count} times in one object")
    return content


def read_json_or_empty(path: str | Path) -> dict:
    """Reads a JSON file that an interrupted run may not have written: {} where it is missing or broken."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` as indented JSON, lists of numbers on one line; NaN is an error."""
    text = json.dumps(content, indent=2, allow_nan=False)
    text = re.sub(r"\[\n[^]\[{}\"]*\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text)
    with atomic_path(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to and renames it to `path` at the end, or removes it after an error,
    which names `path`.

    The content is on the disk before the name is, so that a power cut leaves the old file or the new one. Machines that
    share a disk, and processes with the same number in two containers, get different names to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = (NIFTI.search(path.name) or [path.suffix])[0]
    aside = path.with_name(f".partial-{uuid.uuid4().hex[:12]}{ending}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)  # a write that fails does not say where
        raise
    finally:
        aside.unlink(missing_ok=True)


def is_whole(path: str | Path) -> bool:
    """Says whether a file of `torch.save`, which is a ZIP archive, is complete: all checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return False


def lock_folder(folder: str | Path) -> None:
    """Makes a folder and locks it for this process, until `unlock_folder` or the end of the process, however it ends.

    Where the system (Windows) or its disk (NFS) cannot lock a folder, it stays unlocked.

    Raises:
        RuntimeError: another process has locked it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    real = os.path.realpath(folder)
    if fcntl is None or real in _locked:
        return
    number = os.open(real, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        if isinstance(error, BlockingIOError):
            raise RuntimeError(f"another process is writing to {folder}; wait for it or give another folder.") from None
    else:
        _locked[real] = number


def unlock_folder(folder: str | Path) -> None:
    """Gives up the lock of `lock_folder`, if this process has it."""
    if (number := _locked.pop(os.path.realpath(folder), None)) is not None:
        os.close(number)


def _leave_locks_to_the_parent() -> None:
    for folder in list(_locked):
        unlock_folder(folder)  # or a worker that outlives a killed run would keep its folder locked


_locked: dict[str, int] = {}  # real path: descriptor
if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def remove_partial(folder: str | Path) -> None:
    """Removes what killed processes left of `atomic_path` in a folder more than a day ago.

    A younger file may belong to a process that is still writing, on this machine or another.
    """
    for aside in Path(folder).glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):  # its process, or another that cleans up, was faster
            if time.time() - aside.stat().st_mtime > DAY:
                aside.unlink()
