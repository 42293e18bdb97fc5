"""Packs each bundle to be used alone: as a folder to serve from, and as a zip to download.

    python -m packing.pack [bundles/brats_flair ...] [--output_dir dist] [--export_dir dist/export]

    dist/brats_flair-0.7.0/       configs/ (every YAML, and the same as JSON), docs/, models/, custom_modules/ (a copy),
                                  LICENSE (code), docs/data_license.txt (weights), SHA256SUMS
    dist/brats_flair_v0.7.0.zip   holds brats_flair/, the name that `monai.bundle.load` asks for; its own name is the
                                  one that `monai.bundle download` looks for where bundles are published
    dist/SHA256SUMS               of the zips

The same files in give the same bytes out, on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from monai.bundle import ConfigParser

import custom_modules
from packing import record
from packing.configs import REPO, bundle_folders
from packing.identity import check_identity

DIST = REPO / "dist"
EXPORTS = DIST / "export"  # where `make export` writes
FILES = (  # what a packed bundle must hold; other files (checkpoints, caches, logs) are left out
    *("LICENSE", "configs/metadata.json", "configs/logging.conf", "configs/*.yaml", "custom_modules/**/*.py"),
    *("docs/README.md", "docs/data_license.txt", "models/model.pt", "models/model.training.txt"),
)
OPTIONAL = ("docs/*.png", "models/model.statistics.json", "models/supervised.pt", "models/supervised.training.txt")
SUMS = "SHA256SUMS"
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can state


def as_json(config: Path) -> bytes:
    """Converts a YAML config to JSON: `monai.bundle.load` and some hosts read nothing else.

    Raises:
        ValueError: if JSON cannot say the same (a key that is not a string, a date, ...).
    """
    content = ConfigParser.load_config_file(config)
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    if json.loads(text) != content:
        raise ValueError(f"{config} cannot be written as JSON: its keys must be strings, its values JSON's own types.")
    return f"{text}\n".encode()


def checksums(files: Mapping[str, bytes]) -> bytes:
    """Returns the lines that `sha256sum --check` reads."""
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode()


def contents(bundle: Path, exports: Path) -> dict[str, bytes]:
    """Collects every file of a packed bundle, by its path there.

    Args:
        bundle: folder of the bundle.
        exports: folder of further model files (`model.ts`, ...) that `packing.export` made of this bundle, if any.

    Raises:
        FileNotFoundError: if the bundle lacks a file.
        ValueError: if its version is not that of `custom_modules`, name, codes, texts or weights are not its own, or
            `exports` were made of anything else.
    """
    missing = [pattern for pattern in FILES if not any(bundle.glob(pattern))]
    if missing:
        raise FileNotFoundError(f"{bundle} cannot be packed: there is no {', no '.join(missing)}.")
    version = ConfigParser.load_config_file(bundle / "configs" / "metadata.json")["version"]
    if version != custom_modules.__version__:
        raise ValueError(
            f"{bundle / 'configs' / 'metadata.json'} says version {version}, custom_modules/__init__.py says "
            f"{custom_modules.__version__}: they must agree, give both the newer one."
        )
    check_identity(bundle, [other for other in bundle_folders() if other.name != bundle.name])
    paths = [path for pattern in (*FILES, *OPTIONAL) for path in bundle.glob(pattern)]
    files = {path.relative_to(bundle).as_posix(): path.read_bytes() for path in paths}
    files |= {f"configs/{path.stem}.json": as_json(path) for path in bundle.glob("configs/*.yaml")}
    files |= {f"models/{path.name}": path.read_bytes() for path in record.check(exports, bundle)}
    return files | {SUMS: checksums(files)}


def write_folder(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_zip(files: Mapping[str, bytes], path: Path, root: str) -> None:
    """Writes a zip of `root/...` that does not depend on when, where or by whom it was made.

    Stored, not deflated: compressed bytes differ between versions of zlib, and weights hardly shrink.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{root}/{name}", ZIP_EPOCH)
            entry.create_system = 3  # Unix, whose permissions are:
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name])


def replace(source: Path, target: Path) -> None:
    """Moves a finished file or folder to its place and removes what an earlier packing left there.

    A file is replaced at once. A folder is first renamed to `.old-<name>` and removed last: in between there is none,
    and a kill leaves the old one under that name until the next packing.
    """
    aside = target.with_name(f".old-{target.name}")
    if target.is_dir():
        if aside.exists():
            shutil.rmtree(aside)
        target.rename(aside)
    source.replace(target)
    if aside.exists():
        shutil.rmtree(aside)


def pack(output_dir: Path, export_dir: Path = EXPORTS, bundles: Sequence[Path] = ()) -> dict[str, Path]:
    """Packs bundles; returns the packed folders by the bundles' names.

    Args:
        output_dir: gets a folder and a zip for each bundle, and the zips' checksums. Each folder and zip is renamed
            when it is complete; after a kill some may be old and some new, until the next packing.
        export_dir: files of `<export_dir>/<bundle>/` go into the bundle's models/.
        bundles: their folders; by default every bundle of the repository.

    Raises:
        FileNotFoundError, ValueError: of `contents`, before anything is written.
    """
    bundles = [bundle.resolve() for bundle in bundles] or bundle_folders()
    all_files = {bundle.name: contents(bundle, export_dir / bundle.name) for bundle in bundles}
    output_dir.mkdir(parents=True, exist_ok=True)
    packed, zips = {}, {}
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=output_dir) as partial:
        for name, files in all_files.items():
            folder = output_dir / f"{name}-{custom_modules.__version__}"
            archive = output_dir / f"{name}_v{custom_modules.__version__}.zip"
            write_folder(files, Path(partial) / folder.name)
            write_zip(files, Path(partial) / archive.name, name)
            replace(Path(partial) / folder.name, folder)
            replace(Path(partial) / archive.name, archive)
            packed[name], zips[archive.name] = folder, archive.read_bytes()
    (output_dir / SUMS).write_bytes(checksums(zips))
    return packed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m packing.pack", description="Pack the bundles to be used alone.")
    parser.add_argument("bundles", type=Path, nargs="*", help="folders of bundles (default: all of the repository)")
    parser.add_argument("--output_dir", type=Path, default=DIST, help="gets the folders and zips")
    parser.add_argument("--export_dir", type=Path, default=EXPORTS, help="of packing.export")
    options = parser.parse_args(arguments)
    try:
        for folder in pack(options.output_dir, options.export_dir, options.bundles).values():
            print(f"{folder}/")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print((options.output_dir / SUMS).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
