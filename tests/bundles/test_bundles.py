"""Both bundles end to end, with their real configs and tiny networks: training, inference, evaluation, commands.

What needs a process of its own (a kill, an exit status, the three working directories) gets one; all other commands
run in this one (`conftest.monai_bundle`). Then what the two bundles' files say, and what MONAI's tools ask of them.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import pydoc
import re
import traceback
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ComponentLocator, ConfigParser, ConfigWorkflow, verify_net_in_out

import custom_modules
from custom_modules.diffusion import Diffusion
from tests.helpers.bundles import BUNDLES, REPO, SHORT, TAGS, TINY, config, head, monai_bundle, monai_bundle_process

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
FAST = ["--num_steps=2", "--gate=all"]  # a network of two epochs finds nothing, so no gate


# ---- training


def state(path, key=None) -> dict[str, torch.Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded if key is None else loaded[key]


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_training_needs_no_mask(trained, dataset_without_masks):
    assert not list(dataset_without_masks.rglob("*_seg*"))
    weights = state(trained.weights)
    assert all(isinstance(value, torch.Tensor) and value.isfinite().all() for value in weights.values())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    assert {name.split(".")[0] for name in weights} == {"denoiser", "classifier", "segmenter", "distilled"}
    assert weights["distilled"] == 0  # so the segmenter has its random start
    assert (trained.ckpt_dir / "model.training.txt").read_text() == "p0\np1\n"
    written = sorted(path.name for path in trained.ckpt_dir.iterdir())
    assert written == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "model.pt", "model.training.txt"]
    assert list(trained.folder.glob("runs/events.out.tfevents.*"))


def test_a_killed_run_continues_as_if_it_had_not_been(trained, dataset_without_masks, tmp_path):
    kill = tmp_path / "kill.yaml"  # in the middle of the second epoch
    kill.write_text("+train#handlers:\n  - {_target_: tests.helpers.bundles.Kill, iteration: 3}\n")
    where = ["--dataset_dir", dataset_without_masks, "--datalist", dataset_without_masks / "tags_only.json"]
    where += ["--output_dir", tmp_path / "runs", "--ckpt_dir", tmp_path / "models"]
    train = config("brats_flair", "train")
    killed = monai_bundle_process("run", "training", "--config_file", f"['{train}','{kill}']", *where, *TINY, *SHORT)
    assert killed.returncode == -9, killed.stdout
    assert [path.name for path in (tmp_path / "models").glob("*.pt")].count("checkpoint_epoch=1.pt") == 1
    assert not (tmp_path / "models" / "checkpoint_epoch=2.pt").exists()

    monai_bundle("run", "--config_file", train, *where, *TINY, *SHORT)  # the run id `run` is the other name
    for key in ("network", "ema"):
        last = "checkpoint_epoch=2.pt"
        assert not differing(state(tmp_path / "models" / last, key), state(trained.ckpt_dir / last, key)), key
    assert not differing(state(tmp_path / "models" / "model.pt"), state(trained.weights))

    before = (tmp_path / "models" / "model.pt").read_bytes()
    monai_bundle("run", "--config_file", train, *where, *TINY, *SHORT)  # nothing is left to do
    assert (tmp_path / "models" / "model.pt").read_bytes() == before


# ---- inference


def inference(bundle, data, out, trained, *more) -> list:
    where = ["--dataset_dir", data, "--output_dir", out, "--ckpt_path", trained.weights]
    return ["run", "--config_file", config(bundle, "inference"), *where, *TINY, "--segmenter_size=32", *FAST, *more]


@pytest.fixture(scope="module")
def inferred(odd_volumes, trained, tmp_path_factory):
    """What the command wrote and printed, from the repository's root, for all odd volumes at once."""
    out = tmp_path_factory.mktemp("inferred")
    return out, monai_bundle_process(*inference("brats_flair", odd_volumes.folder, out, trained))


@pytest.mark.parametrize("name", ["lps", "ras", "permuted", "anisotropic", "one_slice"])
def test_results_stand_in_the_geometry_of_the_input(name, inferred, odd_volumes):
    out, process = inferred
    image = nib.load(odd_volumes.folder / f"{name}.nii.gz")
    assert sorted(path.name for path in (out / name).iterdir()) == [
        f"{name}_mask.nii.gz", f"{name}_provenance.json", f"{name}_saliency.nii.gz"
    ], process.stdout  # fmt: skip
    mask, saliency = (nib.load(out / name / f"{name}_{kind}.nii.gz") for kind in ("mask", "saliency"))
    assert (mask.get_data_dtype(), saliency.get_data_dtype()) == (np.uint8, np.float32)
    assert mask.shape == saliency.shape == image.shape
    assert np.allclose(mask.affine, image.affine, atol=1e-5) and np.allclose(saliency.affine, image.affine, atol=1e-5)
    mask, saliency = np.asarray(mask.dataobj), np.asarray(saliency.dataobj)
    assert set(np.unique(mask)) <= {0, 1} and np.isfinite(saliency).all()
    assert (saliency[mask == 1] > 0).all()

    report = json.loads((out / name / f"{name}_provenance.json").read_text())
    assert report["case"] == name and report["settings"]["num_steps"] == 2 and report["settings"]["seed"] == 0
    assert re.fullmatch("[0-9a-f]{64}", report["weights_sha256"]) and report["versions"]["torch"] == torch.__version__
    assert report["slices_processed"] == (1 if name == "one_slice" else len(TAGS))


@pytest.mark.parametrize("name", ["ras", "permuted"])
def test_the_order_on_disk_does_not_change_the_result(name, inferred):
    out, _ = inferred
    maps = [nib.load(out / n / f"{n}_saliency.nii.gz") for n in ("lps", name)]
    lps, other = (nib.as_closest_canonical(m).get_fdata() for m in maps)
    assert np.allclose(lps, other, atol=1e-3 * np.abs(lps).max())


def test_bad_cases_are_named_and_stop_nothing(inferred, odd_volumes):
    out, process = inferred
    assert process.returncode != 0
    total = len(odd_volumes.good) + len(odd_volumes.bad)
    summary = process.stdout.rpartition(f"{len(odd_volumes.bad)} of {total} cases failed:")[2]
    for name, why in odd_volumes.bad.items():
        assert re.search(rf"{name}: .*({why})", summary), process.stdout
    assert sorted(path.name for path in out.iterdir()) == odd_volumes.good  # and nothing is half there
    assert not list(out.rglob(".partial*"))


@pytest.mark.parametrize(
    ("bundle", "cwd"), [("brats_flair", REPO / "bundles" / "brats_flair"), ("chaos_kidney", None)], ids=["root", "else"]
)
def test_the_command_runs_from_any_folder(bundle, cwd, odd_volumes, trained, tmp_path):
    command = inference(bundle, odd_volumes.folder / "one_slice.nii.gz", tmp_path / "out", trained)
    command[2] = "configs/inference.yaml" if cwd else REPO / config(bundle, "inference")
    process = monai_bundle_process(*command, cwd=cwd or tmp_path)
    assert process.returncode == 0, process.stdout
    assert (tmp_path / "out" / "one_slice" / "one_slice_mask.nii.gz").is_file()


# ---- evaluation


@pytest.fixture(scope="module")
def evaluated(dataset, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    command = inference("brats_flair", dataset, out, trained, "--gate=tags", "--section=['training','test']")
    command[2] = f"['{config('brats_flair', 'inference')}','{config('brats_flair', 'evaluate')}']"
    monai_bundle(*command)
    return out


def read(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_writes_its_tables(evaluated):
    slices, volumes = read(evaluated / "metrics" / "per_slice.csv"), read(evaluated / "metrics" / "per_volume.csv")
    positive = [str(k) for k, tag in enumerate(TAGS) if tag]
    assert [(row["case"], row["slice"]) for row in slices] == [(c, k) for c in ("p0", "p1", "p3") for k in positive]
    assert all(0 <= float(row[key]) <= 1 for row in slices for key in ("dice", "iou"))
    assert [row["case"] for row in volumes] == ["p0", "p1", "p3"]
    assert all(float(row["seconds_per_slice"]) > 0 for row in volumes)
    assert (evaluated / "p3_flair" / "p3_flair_mask.nii.gz").is_file()


def test_evaluation_summary_has_the_keys_of_the_contract(evaluated):
    summary = json.loads((evaluated / "metrics" / "summary.json").read_text())
    keys = "bundle method n_volumes n_slices seeds dice iou hd95 volume_dice seconds_per_slice settings"
    assert set(keys.split()) <= summary.keys()
    assert (summary["bundle"], summary["method"], summary["n_volumes"]) == ("brats_flair", "cdm", 3)
    assert summary["n_slices"] == 3 * sum(TAGS) and summary["seeds"] == [0]
    for key in ("dice", "iou", "hd95", "volume_dice"):
        assert {"mean", "std", "std_cases"} <= summary[key].keys()
    assert {"unit", "n_undefined"} <= summary["hd95"].keys()
    assert summary["settings"]["noise_level"] == 150 and summary["settings"]["gate"] == "tags"


def test_evaluation_marks_cases_of_the_training(evaluated):
    volumes = read(evaluated / "metrics" / "per_volume.csv")
    assert {row["case"]: row["in_training"] for row in volumes} == {"p0": "1", "p1": "1", "p3": "0"}


# ---- methods

METHODS = ("cdm", "cg_cdm", "cg_diff", "gradcam", "gradcam_pp", "scorecam", "layercam", "segmenter", "supervised")
METHODS += ("intensity",)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> SimpleNamespace:
    """Random weights for `network_def` (TINY) and `supervised_def`: those of two epochs hardly know the condition."""
    parser = ConfigParser(load("brats_flair", "inference"))
    tiny = (knob.removeprefix("--").split("=") for knob in TINY if knob.startswith("--network_def"))
    parser.update({knob: json.loads(value) for knob, value in tiny})
    folder, generator = tmp_path_factory.mktemp("random"), torch.Generator().manual_seed(0)
    for name in ("network_def", "supervised_def"):
        weights = parser.get_parsed_content(name).state_dict()
        drawn = {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in weights.items()}
        torch.save(drawn | ({"distilled": torch.tensor(1)} if "distilled" in drawn else {}), folder / name)
    return SimpleNamespace(weights=folder / "network_def", supervised=folder / "supervised_def")


@each_bundle
@pytest.mark.parametrize("method", METHODS)
def test_every_method_infers_and_is_evaluated(bundle, method, dataset, random_weights, tmp_path):
    command = inference(bundle, dataset, tmp_path, random_weights, f"--method={method}", "--section=test")
    command += ["--num_draws=1", "--gate=tags", "--noise_level=20", "--target_labels=[]"]
    command += [f"--supervised_ckpt_path={random_weights.supervised}"]
    monai_bundle(*command)
    saliency = tmp_path / "p3_flair" / "p3_flair_saliency.nii.gz"
    first = nib.load(saliency).get_fdata()
    assert first.shape == head()[0].shape and first[..., np.array(TAGS) == 1].any()
    command[2] = f"['{config(bundle, 'inference')}','{config(bundle, 'evaluate')}']"
    monai_bundle(*command)
    assert np.array_equal(nib.load(saliency).get_fdata(), first)
    summary = json.loads((tmp_path / "metrics" / "summary.json").read_text())
    assert (summary["method"], summary["n_slices"], summary["settings"]["method"]) == (method, sum(TAGS), method)
    provenance = json.loads((tmp_path / "p3_flair" / "p3_flair_provenance.json").read_text())
    weights = random_weights.supervised if method == "supervised" else random_weights.weights
    assert provenance["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_uncertainty_is_written_and_measured(dataset, random_weights, tmp_path):
    command = inference("brats_flair", dataset, tmp_path, random_weights, "--uncertainty=True", "--section=test")
    command[2] = f"['{config('brats_flair', 'inference')}','{config('brats_flair', 'evaluate')}']"
    monai_bundle(*command, "--noise_level=20")
    entropy = nib.load(tmp_path / "p3_flair" / "p3_flair_uncertainty.nii.gz")
    mask = nib.load(tmp_path / "p3_flair" / "p3_flair_mask.nii.gz")
    assert entropy.shape == mask.shape and entropy.get_data_dtype() == np.float32
    np.testing.assert_array_equal(entropy.affine, mask.affine)
    # eight draws in four pairs vote: H(1/4) and H(1/2)
    votes = np.unique(entropy.get_fdata().round(3))
    assert set(votes) <= {0, 0.811, 1} and len(votes) == 3
    provenance = json.loads((tmp_path / "p3_flair" / "p3_flair_provenance.json").read_text())
    assert provenance["settings"]["num_draws"] == 8 and 0 < provenance["expected_dice"] < 1
    (row,) = read(tmp_path / "metrics" / "per_volume.csv")
    assert float(row["expected_dice"]) == pytest.approx(provenance["expected_dice"], abs=1e-6)


def test_methods_differ(dataset, random_weights, tmp_path):
    maps = {}
    for method in METHODS:
        command = inference("brats_flair", dataset, tmp_path / method, random_weights, f"--method={method}")
        more = ["--section=test", "--num_draws=1", "--noise_level=20", "--guidance_scale=100"]
        monai_bundle(*command, *more, f"--supervised_ckpt_path={random_weights.supervised}")
        maps[method] = nib.load(tmp_path / method / "p3_flair" / "p3_flair_saliency.nii.gz").get_fdata()
    for one, other in itertools.combinations(METHODS, 2):
        assert not np.allclose(maps[one], maps[other], rtol=1e-3), (one, other)


@each_bundle
def test_a_method_has_its_own_defaults_and_a_given_knob_wins(bundle):
    parser = ConfigParser(load(bundle, "inference"))
    parser.update({"method": "cg_diff"})
    assert parser.get_parsed_content("guidance_scale") == 100
    parser = ConfigParser(load(bundle, "inference"))
    parser.update({"method": "cg_diff", "guidance_scale": 7})
    assert parser.get_parsed_content("settings")["guidance_scale"] == 7
    assert set(METHODS) == set(load(bundle, "inference")["methods"])
    known = {method for row in load(bundle, "inference")["own"]["settings"].values() for method in row}
    assert known <= {*METHODS, "others"}


# ---- errors of the user


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ("--method=cdn", r"method must be one of \[.*'cdm', 'cg_cdm'.*\]; got 'cdn'"),
        ("--gate=tag", r"gate must be one of \['classifier', 'tags', 'all'\]; got 'tag'"),
        ("--threshold=otzu", "threshold must be 'otsu', 'average_otsu' or a number; got 'otzu'"),
        ("--num_steps=500", r"num_steps \(R\) must be .*<= noise_level \(Q\); got R=500, Q=150"),
        ("--noise_level=1000", r"noise_level \(Q\) must be .*1\.\.999"),
        ("--tau=1", r"tau must be in \[0, 1\)"),
        ("--ckpt_path=nowhere.pt", r"ckpt_path 'nowhere.pt' does not exist; .*--ckpt_path"),
        ("--image_size=36", "image_size must be divisible by 8"),
        ("--noise_levl=300", "no knob 'noise_levl'; did you mean one of .*'noise_level'"),
        ("--methods#cdm#seeds=1", "seeds"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_is_right(knob, message, odd_volumes, trained, tmp_path):
    command = inference("brats_flair", odd_volumes.folder / "one_slice.nii.gz", tmp_path / "out", trained, knob)
    assert re.search(message, failure(command))
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_a_misspelt_knob_of_training_is_an_error(dataset_without_masks, tmp_path):
    where = ["--dataset_dir", dataset_without_masks, "--output_dir", tmp_path, "--ckpt_dir", tmp_path]
    command = ["run", "training", "--config_file", config("brats_flair", "train"), *where, *TINY, *SHORT]
    assert re.search("no knob 'val_intervall'.*'val_interval'", failure([*command, "--val_intervall=1"]))


def failure(command: list) -> str:
    """What a failing command prints at its end: the error and its causes, whatever their types."""
    with pytest.raises(Exception) as error:  # noqa: B017
        monai_bundle(*command)
    return "".join(traceback.format_exception(error.value))


# ---- what the files say

FOLDERS = REPO / "bundles"
TASK_KNOBS = {  # what the two tasks may set differently; all else is the same line for line
    "train": {"target_labels", "min_area", "image_size", "max_epochs", "timestep_range"},
    "inference": {
        *("target_labels", "min_area", "image_size", "noise_level", "num_steps", "num_draws", "guidance_scale", "blur"),
        *("gate_threshold", "intensity_power", "erosion", "smoothing", "threshold", "num_components", "target_layer"),
        *("label", "category", "type", "region"),  # of segment
    },
    "train_supervised": {"max_epochs"},
    "distill": {"max_epochs", "intensity_power", "erosion", "num_components"},  # the last three of LoadMapd
    "benchmark": {"min_areas"},
    "ablation": {"base"},
}
TASK_TEXTS = {"name", "changelog", "task", "description", "data_source", "image_classes", "label_classes"}
TASK_TEXTS |= {"pred_classes", "eval_metrics", "references"}
PLACE_KNOBS = {"bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_path", "device", "amp", "seed"}
DATA_KNOBS = {"batch_size", "image_size", "slice_axis", "target_labels", "min_area"}
METHOD_KNOBS = {"method", "noise_level", "num_steps", "num_draws", "tau", "derivative", "guidance_scale", "threshold"}


def load(bundle: str, name: str) -> dict:
    return ConfigParser.load_config_file(REPO / config(bundle, name))


def metadata(bundle: str) -> dict:
    return json.loads((FOLDERS / bundle / "configs" / "metadata.json").read_text())


def targets(node) -> set[str]:
    """Every `_target_` (and what a SaveImaged writes with) below a config node."""
    if isinstance(node, dict):
        own = {node[key] for key in ("_target_", "writer") if isinstance(node.get(key), str)}
        return own.union(*map(targets, node.values()))
    return set().union(*map(targets, node)) if isinstance(node, list) else set()


def test_the_bundles_hold_the_same_files():
    brats, chaos = ({p.name for p in (FOLDERS / bundle / "configs").iterdir()} for bundle in BUNDLES)
    assert brats == chaos >= {"train.yaml", "inference.yaml", "evaluate.yaml", "metadata.json", "logging.conf"}


@pytest.mark.parametrize("name", sorted(p.stem for p in (FOLDERS / "brats_flair" / "configs").glob("*.yaml")))
def test_the_bundles_differ_only_where_the_tasks_do(name):
    texts = []
    for bundle in BUNDLES:
        lines = (REPO / config(bundle, name)).read_text().replace(bundle, "BUNDLE").splitlines()
        knobs = [line.partition(":")[0].strip() for line in lines]
        allowed = TASK_KNOBS.get(name, set())
        texts.append([f"{k}: ..." if k in allowed else line for k, line in zip(knobs, lines, strict=True)])
    assert texts[0] == texts[1]


def test_the_metadata_differ_only_where_the_tasks_do():
    brats, chaos = map(metadata, BUNDLES)
    assert {key for key in brats.keys() | chaos.keys() if brats.get(key) != chaos.get(key)} - TASK_TEXTS <= {
        "network_data_format"
    }
    formats = [
        json.dumps(m["network_data_format"]).replace(target, "TARGET")
        for m, target in ((brats, "tumour"), (chaos, "kidney"))
    ]
    assert formats[0] == formats[1]


@each_bundle
def test_training_and_inference_agree(bundle):
    train, inference = load(bundle, "train"), load(bundle, "inference")
    sizes = json.dumps(inference["preprocessing"]).replace("@slice_size", "@image_size")  # that of the chosen method
    inference["preprocessing"] = json.loads(sizes)
    for key in ("preprocessing", "network_def", "diffusion", "network"):
        assert train[key] == inference[key], key
    assert load(bundle, "train_supervised")["network_def"] == inference["supervised_def"]
    own = {"output_dir", "ckpt_path", "datalist"}  # where a stage reads and writes is its own
    shared = (PLACE_KNOBS | DATA_KNOBS | {"orientation"}) - own - {"batch_size"}
    assert {key: train[key] for key in shared} == {key: inference[key] for key in shared}
    assert train["run"] == train["training"]


@each_bundle
def test_knobs_are_flat_and_stand_first(bundle):
    train, inference = load(bundle, "train"), load(bundle, "inference")
    inference_knobs = PLACE_KNOBS | DATA_KNOBS | METHOD_KNOBS | {"gate", "gate_threshold"}
    for content, knobs in ((train, PLACE_KNOBS | DATA_KNOBS | {"ckpt_dir"}), (inference, inference_knobs)):
        flat = list(itertools.takewhile(lambda item: not isinstance(item[1], dict), content.items()))
        assert knobs <= dict(flat).keys()
    assert inference["gate"] == "classifier" and load(bundle, "evaluate")["gate"] == "tags"


@each_bundle
def test_every_target_resolves(bundle):
    files = sorted((FOLDERS / bundle / "configs").glob("*.yaml"))
    assert files
    locator = ComponentLocator()
    for file in files:
        content = ConfigParser.load_config_file(file)
        named = {content[key] for key in ("averaging",) if key in content}  # the target "@averaging"
        for target in targets(content) - {f"@{key}" for key in content} | named:
            found = pydoc.locate(target) if "." in target else locator.get_component_module_name(target)
            assert found, f"{file.name}: {target}"
        assert "import custom_modules" not in file.read_text()


# ---- what MONAI's tools ask of a bundle


@each_bundle
def test_inference_stands_alone(bundle):
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
