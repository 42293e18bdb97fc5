"""benchmarks/gpu.sh, which has to work at the first try where a GPU is lent: its first part, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.bundles import REPO


@pytest.mark.long
def test_the_script_runs_a_part_and_reports_it(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "WHEELS": str(tmp_path / "none")}
    command = ["bash", REPO / "benchmarks" / "gpu.sh", "--quick", "--only", "phantoms"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "phantoms" in json.dumps(json.loads((tmp_path / "gpu.json").read_text()))
    assert "phantoms" in (tmp_path / "gpu.log").read_text()
