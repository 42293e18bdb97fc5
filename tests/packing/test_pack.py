"""The packed bundles stand alone: they are read, run and downloaded in processes that cannot import the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256

import nibabel as nib
import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser
from monai.bundle.scripts import _get_monaihosting_bundle_url

import custom_modules
from packing import pack, record
from tests.helpers.bundles import BUNDLES, REPO, config, head, monai_bundle, monai_bundle_process, save_nifti

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
QUICK = ["--gate=all", "--device=cpu"]  # the shipped network, on every slice of a head of 48 x 40 x 6 voxels


def zip_of(folder):
    return folder.with_name(f"{folder.name.replace('-', '_v')}.zip")


def process(*arguments, cwd):
    """A Python process outside the repository; stdout and stderr come back together."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, timeout=300, **streams)


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return save_nifti(head()[0], tmp_path_factory.mktemp("volume") / "head.nii.gz")


# ---- what is packed


def test_the_same_files_give_the_same_bytes(packed_bundles, tmp_path, capsys):
    first = next(iter(packed_bundles.values())).parent
    umask = os.umask(0o077)  # somebody else, somewhere else
    try:
        pack.main(["--output_dir", str(tmp_path / "dist"), "--export_dir", str(tmp_path / "no_exports")])
    finally:
        os.umask(umask)
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path / "dist"): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == again
    printed = capsys.readouterr().out
    for folder in packed_bundles.values():
        assert f"{tmp_path / 'dist' / folder.name}/" in printed
        assert f"{sha256(zip_of(folder).read_bytes()).hexdigest()}  {zip_of(folder).name}" in printed

    pack.pack(tmp_path / "dist", export_dir=tmp_path / "no_exports")  # over what lies there
    assert sorted(path.name for path in (tmp_path / "dist").iterdir()) == sorted(p.name for p in first.iterdir())


@each_bundle
def test_the_packed_bundle_is_complete_and_checked(bundle, packed_bundles):
    folder = packed_bundles[bundle]
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files >= {"LICENSE", "docs/data_license.txt", "models/model.pt", "models/supervised.training.txt"}
    code = {name for name in files if name.startswith("custom_modules/")}
    assert code == {path.relative_to(REPO).as_posix() for path in (REPO / "custom_modules").rglob("*.py")}
    assert "Apache License" in (folder / "LICENSE").read_text()

    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: checksum for checksum, name in (line.split("  ") for line in lines)}
    assert listed.keys() == files - {"SHA256SUMS"}
    assert all(sha256((folder / name).read_bytes()).hexdigest() == checksum for name, checksum in listed.items())


@each_bundle
def test_json_says_what_yaml_says(bundle, packed_bundles):
    configs = packed_bundles[bundle] / "configs"
    sources = sorted((REPO / "bundles" / bundle / "configs").glob("*.yaml"))
    assert {path.stem for path in sources} >= {"train", "inference", "evaluate", "train_supervised", "paper"}
    for source in sources:
        assert (configs / source.name).read_bytes() == source.read_bytes()
        said = json.loads((configs / f"{source.stem}.json").read_text())
        assert said == yaml.safe_load(source.read_text())
        assert list(said) == list(yaml.safe_load(source.read_text()))  # overlays are merged in order
    overlays = [[str(configs / f"{name}.{kind}") for name in ("inference", "evaluate")] for kind in ("json", "yaml")]
    one, other = map(ConfigParser.load_config_files, overlays)
    assert one == other
    assert one["postprocessing"]["transforms"][-1]["_target_"] == "custom_modules.evaluation.labels.LoadLabeld"


@each_bundle
def test_the_zip_is_the_folder_under_the_bundles_name(bundle, packed_bundles):
    folder = packed_bundles[bundle]
    version = custom_modules.__version__
    assert folder.name == f"{bundle}-{version}"
    assert _get_monaihosting_bundle_url(bundle, version).endswith(f"/{zip_of(folder).name}")
    with zipfile.ZipFile(zip_of(folder)) as archive:
        entries = archive.infolist()
        assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
        assert {(entry.date_time, entry.external_attr >> 16, entry.compress_type) for entry in entries} == {
            ((1980, 1, 1, 0, 0, 0), 0o100644, zipfile.ZIP_STORED)
        }
        inside = {entry.filename: archive.read(entry) for entry in entries}
    assert inside == {f"{bundle}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_export(folder, bundle, **knobs):
    """A folder as `packing.export` leaves it, without the minutes."""
    folder.mkdir(parents=True)
    (folder / "model.ts").write_bytes(b"traced")
    said = record.describe(folder, bundle / "configs" / "inference.yaml", bundle / "models" / "model.pt", knobs)
    (folder / record.RECORD).write_text(json.dumps(said))


def test_exported_models_are_taken_along_and_nothing_else(tmp_path):
    bundle = tmp_path / "brats_flair"
    shutil.copytree(REPO / "bundles" / "brats_flair", bundle)
    for stray in ("models/checkpoint_epoch=1.pt", "runs/cache/p0.npy", "custom_modules/__pycache__/data.pyc"):
        (bundle / stray).parent.mkdir(parents=True, exist_ok=True)
        (bundle / stray).write_bytes(b"stray")
    before = pack.contents(bundle, tmp_path / "exports").keys()
    assert not [name for name in before if "checkpoint" in name or "cache" in name]
    write_export(tmp_path / "exports", bundle)
    files = pack.contents(bundle, tmp_path / "exports")
    assert files.keys() - before == {"models/model.ts"} and b"  models/model.ts\n" in files["SHA256SUMS"]


def say(exports, **said):
    path = exports / record.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, e: (b / "models" / "model.pt").write_bytes(b"trained again"), "models/model.pt was another file"),
        (lambda b, e: (b / "configs" / "inference.yaml").open("a").write("#"), "inference.yaml was another file"),
        (lambda b, e: (b / "configs" / "metadata.json").open("a").write(" "), "metadata.json was another file"),
        (lambda b, e: say(e, version="0.0.1"), f"of version 0.0.1, the bundle of {custom_modules.__version__}"),
        (lambda b, e: say(e, knobs={"ckpt_path": "/home/me/m.pt", "tau": 0}), "with --ckpt_path --tau"),
        (lambda b, e: (e / "model.ts").write_bytes(b"of another export"), "model.ts was not made then, or differs"),
        (lambda b, e: (e / "stray.ts").write_bytes(b""), "stray.ts was not made then"),
        (lambda b, e: (e / record.RECORD).unlink(), "has no export.json"),
        (lambda b, e: (e / record.RECORD).write_text("{"), "has no export.json"),
    ],
)
def test_the_export_of_something_else_is_not_packed(change, message, tmp_path):
    bundle, exports = tmp_path / "brats_flair", tmp_path / "exports"
    shutil.copytree(REPO / "bundles" / "brats_flair", bundle)
    write_export(exports, bundle)
    change(bundle, exports)
    with pytest.raises(ValueError, match=message) as error:
        pack.contents(bundle, exports)
    assert str(error.value).endswith(f"Export brats_flair again (make export), or remove {exports}.")
    assert "/home/me" not in str(error.value)


def test_nothing_is_packed_where_one_bundle_cannot_be(tmp_path):
    write_export(tmp_path / "exports" / "chaos_kidney", REPO / "bundles" / "chaos_kidney", tau=0.5)
    with pytest.raises(SystemExit, match="error: .*chaos_kidney as it is: it was made with --tau"):
        pack.main(["--output_dir", str(tmp_path / "dist"), "--export_dir", str(tmp_path / "exports")])
    assert not (tmp_path / "dist").exists()


def test_the_old_folder_outlives_a_failure(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        pack.replace(tmp_path / "missing", tmp_path / "old")
    assert (tmp_path / ".old-old" / "old").is_dir()
    pack.replace(tmp_path / "new", tmp_path / "old")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["old", "old/new"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: (b / "models" / "model.pt").unlink(), FileNotFoundError, "brats_flair cannot .* no models/model.pt"),
        (lambda b: (b / "docs" / "data_license.txt").unlink(), FileNotFoundError, "no docs/data_license.txt"),
        (lambda b: (b / "configs" / "a.yaml").write_text("{1: x}"), ValueError, "a.yaml cannot be written as JSON"),
        (lambda b: (b / "configs" / "a.yaml").write_text("a: 2020-02-02"), ValueError, "JSON's own types"),
        (lambda b: (b / "configs" / "metadata.json").write_text('{"version": "9.9.9"}'), ValueError, "says .* 9.9.9"),
    ],
)
def test_what_cannot_stand_alone_is_not_packed(change, error, message, tmp_path):
    bundle = tmp_path / "brats_flair"
    shutil.copytree(REPO / "bundles" / "brats_flair", bundle)
    change(bundle)
    with pytest.raises(error, match=message):
        pack.contents(bundle, tmp_path / "exports")


# ---- what it does elsewhere


def test_the_packed_bundle_makes_the_masks_of_the_repository(packed_bundles, volume, tmp_path):
    where = ["--dataset_dir", volume, "--output_dir"]
    bundle = shutil.copytree(packed_bundles["brats_flair"], tmp_path / "bundle")  # Python leaves its caches there
    inference = bundle / "configs" / "inference.json"
    done = monai_bundle_process("run", "--config_file", inference, *where, tmp_path / "packed", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
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


# ---- two versions in one process


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
