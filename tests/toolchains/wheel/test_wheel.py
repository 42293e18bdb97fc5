"""The wheel: built from what the Dockerfile copies, and used from a folder that is not the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import pytest

from tests.helpers.bundles import BUNDLES, REPO, head, save_nifti
from tests.packing.test_dockerfile import copied

SHIPPED = ("configs/inference.yaml", "configs/train.yaml", "configs/distill.yaml", "configs/metadata.json")
SHIPPED += ("models/model.pt", "models/supervised.pt", "models/model.statistics.json", "models/model.training.txt")
SHIPPED += ("docs/data_license.txt", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by pip, which needs no further package; `python -m build` calls the same backend."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    subprocess.run(["cp", "-a", *(REPO / name for name in copied()), folder / "source"], check=True)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_code_configs_weights_and_their_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        shipped = {f"weakseg/shipped/{bundle}/{file}": (bundle, file) for bundle in BUNDLES for file in SHIPPED}
        assert set(shipped) <= names
        for name, (bundle, file) in shipped.items():
            assert archive.read(name) == (REPO / "bundles" / bundle / file).read_bytes(), name
    code = {str(path.relative_to(REPO)) for path in (REPO / "custom_modules").rglob("*.py")}
    assert code <= names and "weakseg/page.html" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"custom_modules", "weakseg"} and not [name for name in names if "shipped" in name and ".py" in name]
    assert wheel.stat().st_size < 40e6


def test_the_installed_command_segments_from_any_folder(wheel, tmp_path):
    target = tmp_path / "target"
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel], check=True)
    save_nifti(head()[0], tmp_path / "volumes" / "head.nii.gz")

    def weakseg(*words: str) -> str:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "timeout": 300}
        command = [sys.executable, "-P", target / "bin" / "weakseg", *words]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)}, **streams)
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert "weakseg predict DIR --bundle brats_flair" in weakseg("--help")
    said = weakseg("predict", "volumes", "--bundle", "brats_flair", "--out", "out", "--device", "cpu", "--debug")
    assert f"--bundle_root={target / 'weakseg' / 'shipped' / 'brats_flair'}" in said
    assert nib.load(tmp_path / "out" / "head" / "head_mask.nii.gz").shape == (48, 40, 6)
