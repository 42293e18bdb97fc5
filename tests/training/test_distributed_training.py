"""Training in two processes, as `torchrun` starts them, follows one process whose batch is as large as theirs together.

The real commands and configs, in fp32, on tiny heads. The two are killed in the middle and continue, so this also
shows that a run in several processes continues as if never stopped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from custom_modules.networks.weights import training_cases
from tests.helpers.bundles import REPO, TINY, config, monai_bundle
from tests.helpers.processes import forked_bundle

SETTINGS = ["--amp=False", "--epoch_length=5", "--max_epochs=2", "--val_interval=1"]
STUDENT = ["--segmenter_epochs=1", "--segmenter_size=64"]


def arguments(dataset, folder, *overlays, batch_size, tiny=TINY) -> list[str]:
    files = ",".join(f"'{file}'" for file in (config("brats_flair", "train"), *overlays))
    where = [f"--dataset_dir={dataset}", f"--output_dir={folder}", f"--ckpt_dir={folder / 'models'}"]
    knobs = [*tiny, *SETTINGS, *STUDENT, f"--batch_size={batch_size}"]
    return ["run", "training", f"--config_file=[{files}]", *where, *knobs]


def torchrun(*arguments) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc_per_node 2 -m monai.bundle *arguments`; stdout and stderr come back together."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [*launcher, "-m", "monai.bundle", *arguments]
    return subprocess.run(command, cwd=REPO, env=environment, encoding="utf-8", timeout=300, **streams)


def logged(folder) -> dict[str, dict[int, float]]:
    """What a run wrote for TensorBoard: {name: {step: value}}."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """The folder of one process with batches of 4."""
    folder = tmp_path_factory.mktemp("one")
    monai_bundle(*arguments(dataset, folder, batch_size=4))
    return folder


@pytest.fixture(scope="module")
def two(dataset, tmp_path_factory):
    """Two processes with batches of 2: the folder, what the killed command said, and what the one after it said."""
    folder = tmp_path_factory.mktemp("two")
    kill = folder / "kill.yaml"  # the second process, in the middle of the second epoch
    handler = "{_target_: tests.helpers.bundles.Kill, iteration: 7, _disabled_: $not @secondary}"
    kill.write_text(f"+train#handlers:\n  - {handler}\n")
    several = config("brats_flair", "multi_gpu_train")
    killed = torchrun(*arguments(dataset, folder, several, kill, batch_size=2))
    left = sorted(path.name for path in (folder / "models").iterdir())
    continued = forked_bundle(*arguments(dataset, folder, several, batch_size=2), processes=2)
    assert continued.returncode == 0, continued.stdout
    return SimpleNamespace(folder=folder, killed=killed, left=left, continued=continued)


def test_two_processes_compute_what_one_does(one, two):
    expected, found = logged(one), logged(two.folder)
    assert expected.keys() == found.keys()
    for name in ("train_loss", "val_denoising_y0", "val_denoising_y1", "val_classifier_auc"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name  # equal but for the order of sums
    assert found["train_loss"].keys() == {10}  # every tenth

    weights = [torch.load(folder / "models" / "model.pt", weights_only=True) for folder in (one, two.folder)]
    assert weights[0].keys() == weights[1].keys()
    assert weights[0].pop("distilled") == weights[1].pop("distilled") == 1
    for name in [name for name in weights[0] if name.startswith("segmenter")]:
        assert weights[0].pop(name).isfinite().all()  # Dice of each process's batch: only nearly the same
    for name, value in weights[0].items():  # half precision, 2**-11 of the value
        torch.testing.assert_close(weights[1][name].float(), value.float(), rtol=2**-10, atol=1e-4, msg=name)


def test_a_killed_process_is_named_and_ends_the_command(two):
    assert two.killed.returncode != 0
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", two.killed.stdout), two.killed.stdout
    assert two.left == ["checkpoint_epoch=1.pt", "model.pt", "model.training.txt"]


def test_only_the_first_process_speaks(two):
    assert len({path.name.split(".")[-2] for path in two.folder.glob("events.out.*")}) == 2  # one of each command
    assert two.continued.stdout.count("val_classifier_auc") == 1
    assert sorted(path.name for path in (two.folder / "models").iterdir()) == [
        "checkpoint_epoch=1.pt",
        "checkpoint_epoch=2.pt",
        "distill",
        "model.pt",
        "model.training.txt",
    ]
    assert len({path.name.split(".")[-2] for path in (two.folder / "distill").glob("events.out.*")}) == 1
    assert sorted(path.name for path in (two.folder / "distill" / "maps").iterdir()) == ["p0_flair", "p1_flair"]
    assert training_cases(two.folder / "models" / "model.pt") == ["p0", "p1"]


def test_the_upper_bound_trains_in_two_processes(dataset, tmp_path):
    overlays = [config("brats_flair", name) for name in ("train_supervised", "multi_gpu_train")]
    tiny = ["--network_def#features=[8,8,8,8,8,8]", *(knob for knob in TINY if "network_def" not in knob)]
    process = forked_bundle(*arguments(dataset, tmp_path, *overlays, batch_size=2, tiny=tiny), processes=2)
    assert process.returncode == 0, process.stdout
    assert logged(tmp_path)["train_loss"].keys() == {10} and logged(tmp_path)["val_slice_dice"].keys() == {1, 2}
    assert (tmp_path / "models" / "supervised.pt").is_file()
