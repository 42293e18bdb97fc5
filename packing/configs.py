"""Writes the configs of each bundle from the shared ones in `configs/` and from the bundle's own `bundle.yaml`.

    python -m packing.configs [bundles/brats_flair ...]

A line `# <- FILE: SECTION` of a shared config becomes that section's text with its comments. FILE is `bundle.yaml`
or, for what several configs share, `parts.yaml`. So a bundle's configs are complete, commented files, and what two of
them must agree on is written once. They are committed; a test writes them again and compares.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO / "configs"
PARTS, BUNDLE = "parts.yaml", "bundle.yaml"
INSERT = re.compile(r"^( *)# <- (\S+): (\w+)\n", re.MULTILINE)
HEAD = "# Written by `python -m packing.configs`: in the repository, edit configs/{file} and bundle.yaml.\n"


def bundle_folders() -> list[Path]:
    """The folders of the repository's bundles."""
    return sorted(path.parent for path in REPO.glob(f"bundles/*/{BUNDLE}"))


def section(text: str, name: str) -> str:
    """Returns the lines below `name:` in a YAML text, up to the next top-level key, dedented.

    Raises:
        ValueError: if there is no such section.
    """
    found = re.search(rf"^{name}:[^\n]*\n((?: [^\n]*\n|\n)*)", text, re.MULTILINE)
    if not found:
        known = re.findall(r"^(\w+):", text, re.MULTILINE)
        raise ValueError(f"there is no section {name!r}; there are {known}.")
    return textwrap.dedent(found[1]).rstrip("\n") + "\n"


def expand(text: str, bundle: str | None = None) -> str:
    """Replaces each line `# <- FILE: SECTION` of `text` by the text of that section.

    Args:
        text: of a shared config.
        bundle: text of a `bundle.yaml`; None leaves the bundle's part out.

    Raises:
        ValueError: if there is no such file or section.
    """
    sources = {PARTS: (SHARED / PARTS).read_text(encoding="utf-8"), BUNDLE: bundle}

    def insert(line: re.Match) -> str:
        indent, file, name = line.groups()
        if file not in sources:
            raise ValueError(f"{line[0].strip()!r}: the file must be one of {sorted(sources)}.")
        source = sources[file]
        return "" if source is None else textwrap.indent(expand(section(source, name), bundle), indent)

    return INSERT.sub(insert, text)


def written(bundle: Path) -> dict[str, str]:
    """Returns the text of each config of a bundle's folder, by its file name."""
    own = (bundle / BUNDLE).read_text(encoding="utf-8")
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(SHARED.iterdir()) if file.name != PARTS}
    return {
        file: HEAD.format(file=file) + expand(text, own).replace("bundles/NAME/", f"bundles/{bundle.name}/")
        for file, text in texts.items()
    }


def write(bundle: Path) -> None:
    """Writes a bundle's configs into its folder."""
    (bundle / "configs").mkdir(exist_ok=True)
    for file, text in written(bundle).items():
        (bundle / "configs" / file).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m packing.configs", description="Generate the configs of bundles.")
    parser.add_argument("bundles", type=Path, nargs="*", help="folders of bundles; default: all of the repository")
    for bundle in parser.parse_args(arguments).bundles or bundle_folders():
        try:
            write(bundle.resolve())
        except (OSError, ValueError) as error:
            sys.exit(f"error: {bundle}: {error}")
        print(bundle / "configs")


if __name__ == "__main__":
    main()
