"""The Dockerfile: what it copies exists and reaches the build; `tests/toolchains/wheel` builds and runs just this."""

import json
import os
import re

from tests.helpers.bundles import REPO


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's lines as (instruction, rest), continued lines joined."""
    text = (REPO / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^([A-Z]+) +(.+)$", text, re.MULTILINE)


def copied() -> list[str]:
    """What the Dockerfile copies, relative to the repository."""
    return [source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]


def test_what_is_copied_exists_and_is_not_ignored():
    kept = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied()) <= kept and all((REPO / name).exists() for name in copied())
    assert {name for name in kept if "*" not in name} == set(copied())
    assert os.readlink(REPO / "weakseg" / "shipped") == "../bundles"  # within what is copied


def test_it_runs_the_command_without_root_rights():
    steps = instructions()
    assert [rest for name, rest in steps if name == "USER"] == ["1000"]
    assert [json.loads(rest) for name, rest in steps if name == "ENTRYPOINT"] == [["weakseg"]]
    assert steps.index(("USER", "1000")) < [name for name, _ in steps].index("ENTRYPOINT")
