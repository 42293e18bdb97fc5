"""The examples in the docstrings of the functions that a newcomer reads first."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["evaluation.metrics", "inference.inferer", "methods.cdm"])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"custom_modules.{name}"))
    assert result.attempted and not result.failed
