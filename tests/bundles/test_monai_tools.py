"""What MONAI's tools ask of a bundle, asked of the repository's; `tests/packing/test_zoo.py` asks the packed ones."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out

import custom_modules
from custom_modules.diffusion import Diffusion
from tests.helpers.bundles import BUNDLES, REPO, TINY, config, head, load, state, targets

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
FOLDERS = REPO / "bundles"
TASK_TEXTS = {"name", "changelog", "task", "description", "data_source", "image_classes", "label_classes"}
TASK_TEXTS |= {"pred_classes", "eval_metrics", "references"}


def metadata(bundle: str) -> dict:
    return json.loads((FOLDERS / bundle / "configs" / "metadata.json").read_text())


def test_the_metadata_differ_only_where_the_tasks_do():
    brats, chaos = map(metadata, BUNDLES)
    different = {key for key in brats.keys() | chaos.keys() if brats.get(key) != chaos.get(key)}
    assert different <= TASK_TEXTS | {"network_data_format"}
    formats = [json.dumps(m["network_data_format"]) for m in (brats, chaos)]
    assert formats[0].replace("tumour", "TARGET") == formats[1].replace("kidney", "TARGET")


@each_bundle
def test_inference_is_complete_alone(bundle):
    content = load(bundle, "inference")
    ids = "preprocessing inferer postprocessing network_def network device dataset evaluator"
    assert set(ids.split()) <= content.keys()
    assert "_meta_" not in json.dumps(content)
    assert "SaveImaged" in targets(content.pop("postprocessing")) and "SaveImaged" not in targets(content)
    names = [transform["_target_"] for transform in content["preprocessing"]["transforms"]]
    assert names[:3] == ["LoadImaged", "EnsureChannelFirstd", "EnsureTyped"]


@each_bundle
@pytest.mark.parametrize(
    ("names", "kind"), [(["train"], "train"), (["inference"], "inference"), (["inference", "evaluate"], "evaluation")]
)
def test_workflow_has_every_property(bundle, names, kind, dataset, trained, tmp_path):
    where = {"bundle_root": FOLDERS / bundle, "dataset_dir": dataset, "output_dir": tmp_path, "ckpt_dir": tmp_path}
    overrides = {name: str(path) for name, path in where.items() if name != "ckpt_dir" or kind == "train"}
    overrides |= {} if kind == "train" else {"ckpt_path": str(trained.weights)}
    for knob in TINY:
        name, _, value = knob.removeprefix("--").partition("=")
        overrides[name] = yaml.safe_load(value)
    files = [str(REPO / config(bundle, name)) for name in names]
    workflow = ConfigWorkflow(files, workflow_type=kind, **overrides)
    workflow.initialize()
    assert workflow.check_properties() == []


@each_bundle
def test_metadata_are_complete(bundle):
    content = metadata(bundle)
    keys = "schema version changelog monai_version pytorch_version numpy_version required_packages_version task"
    keys += " description authors copyright intended_use network_data_format"
    assert set(keys.split()) <= content.keys() and "supported_apps" not in content
    assert content["schema"].endswith("meta_schema_20240725.json")
    assert content["version"] == custom_modules.__version__ and content["version"] in content["changelog"]
    image, pred = content["network_data_format"]["inputs"]["image"], content["network_data_format"]["outputs"]["pred"]
    size = load(bundle, "inference")["image_size"]
    assert image["spatial_shape"] == [size, size, "*"] and image["num_channels"] == 1
    assert pred["channel_def"].keys() == {"0", "1"}
    pinned = dict(line.split("==") for line in (REPO / "requirements.txt").read_text().split() if "==" in line)
    versions = {"monai": content["monai_version"], "torch": content["pytorch_version"]}
    versions |= {"numpy": content["numpy_version"]} | content["required_packages_version"]
    assert {name: pinned.get(name, version) for name, version in versions.items()} == versions


@each_bundle
def test_network_takes_the_image_alone(bundle):
    files = {"meta_file": str(FOLDERS / bundle / "configs" / "metadata.json")}
    verify_net_in_out("network_def", config_file=str(REPO / config(bundle, "inference")), device="cpu", **files)
    network = built(bundle)
    x = torch.zeros(1, 1, 64, 64, 4)
    with torch.no_grad():
        assert network(x).shape == x.shape


def built(bundle: str) -> torch.nn.Module:
    parser = ConfigParser(load(bundle, "inference"))
    return parser.get_parsed_content("network_def").eval()


@each_bundle
def test_shipped_weights_fit_the_network(bundle):
    path = FOLDERS / bundle / "models" / "model.pt"
    if not path.is_file():
        pytest.skip("no weights are shipped yet")
    assert path.stat().st_size <= 16e6
    assert path.with_suffix(".training.txt").is_file()  # else evaluation cannot tell what they have seen
    network = built(bundle)
    network.load_state_dict(state(path), strict=True)
    plane = torch.as_tensor(head()[0][..., 2])  # (48, 40)
    x_0 = torch.nn.functional.pad(plane / plane.max() * 2 - 1, (12, 12, 8, 8), value=-1)[None, None]
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([400])
    with torch.no_grad():
        x_t = Diffusion().add_noise(x_0, eps, t)
        eps_hat, logits = network(x_t, t, torch.tensor([1])), network.classify(x_0, 0 * t)
    assert eps_hat.isfinite().all() and logits.isfinite().all()
    assert (eps_hat - eps).square().mean() < 0.1  # an untrained network is at 1
