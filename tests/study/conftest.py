"""Fixtures: two studies, one of methods and one of settings, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.studies import SWEEPS, write_study


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    runs = {"cam": {"method": "layercam", "shift": 3}, "cdm": {"method": "cdm", "repeats": 2}}
    return write_study(tmp_path_factory.mktemp("compared"), runs | {"cg": {"method": "cg_cdm"}})


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Path:
    return write_study(tmp_path_factory.mktemp("swept"), SWEEPS)
