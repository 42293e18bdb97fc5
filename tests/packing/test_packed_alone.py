"""Packed bundles are imported, run and downloaded in processes that cannot import the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

import custom_modules
from tests.helpers.bundles import BUNDLES, REPO, config, head, monai_bundle, monai_bundle_process, save_nifti, zip_of

QUICK = ["--gate=all", "--device=cpu"]  # the shipped network, on every slice of a head of 48 x 40 x 6 voxels


def process(*arguments, cwd):
    """A Python process outside the repository; stdout and stderr come back together."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, timeout=300, **streams)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return save_nifti(head()[0], tmp_path_factory.mktemp("volume") / "head.nii.gz")


IMPORT_ALL = """
import importlib
import sys
from pathlib import Path

for name in ("matplotlib", "study", "packing", "tests"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
files = sorted(Path(sys.argv[1]).glob("custom_modules/**/*.py"))
for file in files:
    name = ".".join(file.relative_to(sys.argv[1]).with_suffix("").parts).removesuffix(".__init__")
    assert Path(importlib.import_module(name).__file__) == file, name
print(len(files), "modules")
"""


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_module_of_a_zip_imports_without_the_repository(bundle, packed_bundles, tmp_path):
    with zipfile.ZipFile(zip_of(packed_bundles[bundle])) as archive:
        archive.extractall(tmp_path)
    done = process("-P", "-c", IMPORT_ALL, tmp_path / bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split("\n")[-2] == f"{len(list((REPO / 'custom_modules').rglob('*.py')))} modules"


def test_the_packed_bundle_makes_the_masks_of_the_repository(packed_bundles, volume, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    where = ["--dataset_dir", volume, "--output_dir"]
    bundle = shutil.copytree(packed_bundles["brats_flair"], tmp_path / "bundle")  # Python leaves its caches there
    inference = bundle / "configs" / "inference.json"
    done = monai_bundle_process("run", "--config_file", inference, *where, tmp_path / "packed", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stdout, re.MULTILINE))
    assert "custom_modules.inference.inferer" in imported
    assert not imported & {"highdicom", "custom_modules.training.distill", "custom_modules.inference.dicom_seg"}  # slow
    source = config("brats_flair", "inference")
    monai_bundle("run", "--config_file", source, *where, tmp_path / "source", "--logging_file=False", *QUICK)
    masks = [nib.load(tmp_path / kind / "head" / "head_mask.nii.gz") for kind in ("packed", "source")]
    assert np.array_equal(*(np.asarray(mask.dataobj) for mask in masks))
    assert np.array_equal(*(mask.affine for mask in masks)) and np.asarray(masks[0].dataobj).any()


ELSEWHERE = """
import sys
from pathlib import Path

import torch
from monai.bundle import create_workflow, load

models, volume, out = sys.argv[1:]
bundle = Path(models, "chaos_kidney")
configs = bundle / "configs"

where = {"dataset_dir": volume, "output_dir": out, "gate": "all", "device": "cpu"}
workflow = create_workflow(config_file=str(configs / "inference.json"), workflow_type="inference", **where)
workflow.run()  # puts the bundle on Python's path

for name in ("train", "inference"):
    network = load("chaos_kidney", bundle_dir=models, workflow_type=name, device="cpu")
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(value, weights[key].to(value)) for key, value in network.state_dict().items())
with torch.no_grad():
    print("shape", tuple(network(torch.zeros(1, 1, 64, 64, 2)).shape))
print("code", Path(sys.modules["custom_modules"].__file__).parent)
"""


def test_a_downloaded_bundle_loads_and_runs_without_the_repository(packed_bundles, volume, tmp_path):
    url = zip_of(packed_bundles["chaos_kidney"]).as_uri()
    models = tmp_path / "models"
    monai_bundle("download", "--name=chaos_kidney", f"--bundle_dir={models}", f"--url={url}", "--progress=False")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    done = process("-P", "elsewhere.py", models, volume, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"shape {(1, 1, 64, 64, 2)}" in done.stdout
    assert f"code {models / 'chaos_kidney' / 'custom_modules'}" in done.stdout
    assert (tmp_path / "out" / "head" / "head_mask.nii.gz").is_file()


def test_a_bundle_of_another_version_is_refused(packed_bundles, tmp_path, monkeypatch):
    """What a server of two bundles meets: the code was imported for one of them, the other is of another version."""
    newer = tmp_path / "brats_flair"
    shutil.copytree(packed_bundles["brats_flair"], newer)
    for name in ("inference", "train"):
        path = newer / "configs" / f"{name}.json"
        path.write_text(path.read_text().replace(f'"version": "{custom_modules.__version__}"', '"version": "9.9.9"'))
        assert "9.9.9" in path.read_text()
    monkeypatch.syspath_prepend(str(newer))
    own, other = REPO / "custom_modules", newer / "custom_modules"
    for name in ("inference", "train"):
        parser = ConfigParser(ConfigParser.load_config_file(newer / "configs" / f"{name}.json"))
        parser["network_def::denoiser::of_a_newer_version"] = True  # is not what the user hears of
        with pytest.raises(RuntimeError) as error:
            parser.get_parsed_content("network_def")
        said = str(error.value.__cause__)
        assert isinstance(error.value.__cause__, ValueError)
        assert re.search(
            r"bundle is of version 9\.9\.9, but Python has imported custom_modules \d+\.\d+\.\d+ from", said
        )
        assert str(own) in said and f"not {other}" in said and "start a process for each" in said


def test_a_bundle_of_the_same_version_is_served():
    custom_modules.require_version(custom_modules.__version__)
