"""The notebook runs from top to bottom, and is kept without outputs."""

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.bundles import REPO

CELLS = [
    cell for cell in json.loads((REPO / "examples/tour.ipynb").read_bytes())["cells"] if cell["cell_type"] == "code"
]


def test_outputs_are_cleared():
    assert CELLS and not [cell for cell in CELLS if cell["outputs"] or cell["execution_count"] is not None]


@pytest.mark.long
def test_it_runs_from_top_to_bottom(tmp_path):
    script = "\n\n".join("".join(cell["source"]) for cell in CELLS)
    environment = os.environ | {"PYTHONPATH": str(REPO), "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "timeout": 600}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, **streams)
    assert done.returncode == 0, done.stdout
    out = tmp_path / "tour_output"
    for weights in ("own", "shipped"):
        assert nib.load(out / weights / "p2_flair" / "p2_flair_mask.nii.gz").shape == (256, 256, 32)
    mask = nib.load(out / "shipped" / "p2_flair" / "p2_flair_mask.nii.gz")
    assert np.asarray(mask.dataobj).any() and (out / "masks.png").stat().st_size > 10_000
