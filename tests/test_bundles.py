"""Both bundles end to end, with their real configs and tiny networks: training, inference, evaluation, commands.

What needs a process of its own (a kill, an exit status, the three working directories) gets one; all other commands
run in this one (`conftest.monai_bundle`). What the two bundles' files say is in `test_configs.py`.
"""

from __future__ import annotations

import csv
import json
import re
import traceback

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPO, SHORT, TAGS, TINY, config, monai_bundle, monai_bundle_process

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
    assert {name.split(".")[0] for name in weights} == {"denoiser", "classifier"}
    assert (trained.ckpt_dir / "model.training.txt").read_text() == "p0\np1\n"
    written = sorted(path.name for path in trained.ckpt_dir.iterdir())
    assert written == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "model.pt", "model.training.txt"]
    assert list(trained.folder.glob("runs/events.out.tfevents.*"))


def test_a_killed_run_continues_as_if_it_had_not_been(trained, dataset_without_masks, tmp_path):
    kill = tmp_path / "kill.yaml"  # in the middle of the second epoch
    kill.write_text("+train#handlers:\n  - {_target_: tests.conftest.Kill, iteration: 3}\n")
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
    return ["run", "--config_file", config(bundle, "inference"), *where, *TINY, *FAST, *more]


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
    assert set(np.unique(mask)) == {0, 1} and np.isfinite(saliency).all()
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
    assert summary["settings"]["noise_level"] == 400 and summary["settings"]["gate"] == "tags"


def test_evaluation_marks_cases_of_the_training(evaluated):
    volumes = read(evaluated / "metrics" / "per_volume.csv")
    assert {row["case"]: row["in_training"] for row in volumes} == {"p0": "1", "p1": "1", "p3": "0"}


# ---- errors of the user


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ("--method=cdn", r"method must be one of \[.*'cdm', 'cg_cdm'.*\]; got 'cdn'"),
        ("--gate=tag", r"gate must be one of \['classifier', 'tags', 'all'\]; got 'tag'"),
        ("--threshold=otzu", "threshold must be 'otsu', 'average_otsu' or a number; got 'otzu'"),
        ("--num_steps=500", r"num_steps \(R\) must be .*<= noise_level \(Q\); got R=500, Q=400"),
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
    with pytest.raises(Exception) as error:  # noqa: B017  whatever type: the process ends non-zero
        monai_bundle(*command)
    assert re.search(message, "".join(traceback.format_exception(error.value)))
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_a_misspelt_knob_of_training_is_an_error(dataset_without_masks, tmp_path):
    where = ["--dataset_dir", dataset_without_masks, "--output_dir", tmp_path, "--ckpt_dir", tmp_path]
    with pytest.raises(ValueError, match="no knob 'max_epoch'; did you mean one of .*'max_epochs'"):
        monai_bundle("run", "training", "--config_file", config("brats_flair", "train"), *where, "--max_epoch=1")
