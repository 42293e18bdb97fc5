"""What MONAI's model zoo asks of a bundle before it takes it, asked of the packed bundles."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest
from jsonschema import Draft202012Validator
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out

import custom_modules
from tests.helpers.bundles import BUNDLES, REPO

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
SCHEMA = REPO / "packing" / "schema" / "meta_schema_20240725.json"
LARGEST_FILE = 16e6  # bytes: so a bundle's files need no store for large files beside the repository


@pytest.fixture
def schema(tmp_path):
    """A copy of the schema where MONAI looks before it downloads the one that metadata.json names."""
    return shutil.copy(SCHEMA, tmp_path / "schema.json")


@pytest.fixture
def metadata(packed_bundles) -> dict:
    return json.loads((packed_bundles["brats_flair"] / "configs" / "metadata.json").read_text())


@each_bundle
def test_metadata_follow_the_schema(bundle, packed_bundles, schema):
    verify_metadata(str(packed_bundles[bundle] / "configs" / "metadata.json"), filepath=schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changelog": {"next": "a version without numbers"}}, "'next' does not match"),
        ({"version": 0.2}, "0.2 is not of type 'string'"),
        ({"eval_metrics": {"dice": "0.7"}}, "'0.7' is not of type 'number'"),
        ({"network_data_format#outputs#pred#channel_def": {}}, "should be non-empty"),
        ({"network_data_format#inputs#image#spatial_shape": ["64", 0]}, "0 is less than the minimum of 1"),
        ({"network_data_format#inputs#image#value_range": [0]}, r"\[0\] is not valid under any"),
        ({"network_data_format": {"inputs": {}}}, "'outputs' is a required property"),
    ],
)
def test_the_schema_finds_what_is_wrong(change, message, metadata, schema, tmp_path):
    parser = ConfigParser(metadata)
    parser.update(change)
    (tmp_path / "metadata.json").write_text(json.dumps(parser.config))
    with pytest.raises(ValueError, match=message):
        verify_metadata(str(tmp_path / "metadata.json"), filepath=schema)


def test_the_schema_misses_no_field(metadata):
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    documented = "schema version changelog monai_version pytorch_version numpy_version required_packages_version task"
    for field in [*documented.split(), "description", "authors", "copyright", "network_data_format"]:
        kept = {key: value for key, value in metadata.items() if key != field}
        assert [error.message for error in validator.iter_errors(kept)] == [f"'{field}' is a required property"]


@each_bundle
def test_the_network_has_the_shapes_that_metadata_state(bundle, packed_bundles):
    configs = packed_bundles[bundle] / "configs"
    meta_file, config_file = str(configs / "metadata.json"), str(configs / "inference.json")
    verify_net_in_out("network_def", meta_file=meta_file, config_file=config_file, device="cpu")


@each_bundle
@pytest.mark.parametrize(("name", "kind"), [("train", "train"), ("inference", "infer")])
def test_workflows_have_every_property(bundle, name, kind, packed_bundles, dataset, tmp_path):
    root = packed_bundles[bundle]
    where = {"bundle_root": str(root), "dataset_dir": str(dataset), "output_dir": str(tmp_path), "device": "cpu"}
    config_file = str(root / "configs" / f"{name}.json")
    workflow = ConfigWorkflow(config_file, workflow_type=kind, logging_file=False, **where)
    workflow.initialize()
    assert workflow.check_properties() == []


@each_bundle
def test_one_version_everywhere(bundle, packed_bundles):
    """`make dist` says so too; a new version changes these files together, and the changelogs tell what is new."""
    version = custom_modules.__version__
    configs = packed_bundles[bundle] / "configs"
    metadata = json.loads((configs / "metadata.json").read_text())
    assert metadata["version"] == version == list(metadata["changelog"])[0]
    for name in ("inference", "train"):
        content = ConfigParser.load_config_file(configs / f"{name}.json")
        assert content["network_def"]["_requires_"]["version"] == version, f"configs/{name}.yaml"
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "custom_modules.__version__"}
    assert f"## [{version}]" in (REPO / "CHANGELOG.md").read_text()


@each_bundle
def test_metadata_list_what_has_to_be_installed(bundle, packed_bundles):
    metadata = json.loads((packed_bundles[bundle] / "configs" / "metadata.json").read_text())
    versions = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
    versions |= {"numpy": metadata["numpy_version"], **metadata["required_packages_version"]}
    lines = (REPO / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split()[0].split("==") for line in lines if "==" in line)
    assert versions == {name: version for name, version in pinned.items() if name != "matplotlib"}  # only study draws


@each_bundle
def test_versions_in_the_changelog_go_down(bundle, packed_bundles):
    metadata = json.loads((packed_bundles[bundle] / "configs" / "metadata.json").read_text())
    versions = [tuple(map(int, version.split("."))) for version in metadata["changelog"]]
    assert versions == sorted(set(versions), reverse=True)


@each_bundle
def test_no_file_is_too_large(bundle, packed_bundles):
    sizes = {path.name: path.stat().st_size for path in packed_bundles[bundle].glob("models/*.pt")}
    assert sizes.keys() == {"model.pt", "supervised.pt"} and max(sizes.values()) <= LARGEST_FILE
