"""Shared by the tests of hosts: each host has an environment of its own, made once and kept in `.toolchains/`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".toolchains"


def _install(name: str, *pip_arguments: Sequence[str]) -> Path:
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    files = [Path(file) for one in pip_arguments for option, file in zip(one, one[1:]) if option in ("-r", "-c")]
    wanted = "\n".join([sys.version, *map(repr, pip_arguments), *(file.read_text() for file in files)])
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for arguments in pip_arguments:
            subprocess.run([python, "-m", "pip", "install", *arguments], check=True)
        stamp.write_text(wanted)
    return python


@pytest.fixture(scope="session")
def toolchain_env() -> Callable[..., Path]:
    """`toolchain_env(name, *pip_arguments)` gives the python of the environment `.toolchains/<name>`.

    Each of `pip_arguments` is one `pip install`, run in order. The environment is made again where they, a requirements
    file that they name by `-r` or `-c`, or the Python that runs the tests have changed.
    """
    return _install
