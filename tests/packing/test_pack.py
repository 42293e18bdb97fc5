"""What is packed: complete, checked, the same bytes from the same files, in YAML and in JSON."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from hashlib import sha256

import pytest
import yaml
from monai.bundle import ConfigParser
from monai.bundle.scripts import _get_monaihosting_bundle_url

import custom_modules
from packing import pack
from tests.helpers.bundles import BUNDLES, REPO, zip_of

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)


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

    pack.pack(tmp_path / "dist", export_dir=tmp_path / "no_exports")  # over the first one
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
