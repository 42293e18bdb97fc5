"""Checkpoints: a run continues as if never stopped, and leaves averaged weights and the list of their cases behind."""

import errno
import os
from types import SimpleNamespace

import ignite.distributed as idist
import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.transforms import Compose

from custom_modules.diffusion import Diffusion
from custom_modules.files import is_whole
from custom_modules.networks.weights import load_weights, training_cases, training_list
from custom_modules.training.augmentation import Augmentation
from custom_modules.training.checkpoints import AveragedWeights, ResumableRun, ema_handler
from custom_modules.training.handlers import ClipGradients, EpochSeed, TagMetrics
from custom_modules.training.sampling import BalancedSampler
from custom_modules.training.slices import SliceDataset, whole_batch
from custom_modules.training.steps import JointLoss, TagBatch, TrainingStep, parameter_groups, warmup_cosine
from tests.helpers.bundles import REPO
from tests.helpers.tiny_network import tiny_network

BUNDLE = REPO / "bundles" / "brats_flair"


class Slices(SliceDataset):
    """Twelve slices without files."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        super().__init__([], Compose([]))
        self.images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=generator)
        self.tags, self.weights = torch.arange(12) % 3 % 2, torch.linspace(0.5, 1.5, 12)


def train(folder, max_epochs, epoch_length=3, device="cpu"):
    """The parts of `train.yaml` at their smallest; returns network and averaged network."""
    torch.manual_seed(torch.seed())  # nothing may depend on what was drawn before
    dataset, network = Slices(), tiny_network(seed=4).train().to(device)
    ema = ema_handler(network, decay=0.9)  # warms up over 2 / (1 - 0.9) = 20 iterations, more than the run has
    optimizer = torch.optim.AdamW(parameter_groups(network, 1e-3, 1e-3))
    scheduler = warmup_cosine(optimizer, warmup_steps=2, total_steps=12)
    sampler = BalancedSampler(dataset, 4 * epoch_length)
    run = {"network": network, "ema": ema.ema_model, "optimizer": optimizer, "lr_scheduler": scheduler}
    handlers = [
        EpochSeed(0),
        ClipGradients(optimizer, max_norm=1.0),
        LrScheduleHandler(scheduler, epoch_level=False, print_lr=False),
        AveragedWeights(ema, str(folder / "model.pt"), ["p1", "pat 02-ü"], BUNDLE),
        ResumableRun(str(folder), run),
    ]
    trainer = SupervisedTrainer(
        device=torch.device(device),
        max_epochs=max_epochs,
        epoch_length=epoch_length,
        train_data_loader=DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=whole_batch),
        network=TrainingStep(network, Diffusion().to(device), amp=False),
        optimizer=optimizer,
        loss_function=JointLoss(),
        prepare_batch=TagBatch(Augmentation(flip=0.5, noise=0.5)),
        train_handlers=handlers,
        decollate=False,
    )
    trainer.run()
    assert trainer.state.epoch == max_epochs and trainer.state.iteration == max_epochs * epoch_length
    return network.state_dict(), ema.ema_model.state_dict()


def test_fine_tuned_weights_have_seen_the_cases_of_those_they_start_from(tmp_path):
    ema = ema_handler(tiny_network(), decay=0.9)
    (tmp_path / "base.training.txt").write_text("p1\np2\n")
    AveragedWeights(ema, str(tmp_path / "model.pt"), ["p2", "p3"], BUNDLE, start=str(tmp_path / "base.pt"))(
        SimpleNamespace(state=SimpleNamespace(rank=0))
    )
    assert training_cases(tmp_path / "model.pt") == ["p1", "p2", "p3"]


class OnAGpu(torch.Tensor):
    """A tensor that claims to be on a GPU until it is copied to the CPU."""

    device = property(lambda self: torch.device("cuda"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_weights_are_written_from_the_cpu(tmp_path, monkeypatch):
    ema, written = ema_handler(tiny_network(), decay=0.9), {}
    state = {name: value.as_subclass(OnAGpu) for name, value in ema.ema_model.state_dict().items()}
    monkeypatch.setattr(ema.ema_model, "state_dict", lambda: state)
    monkeypatch.setattr(torch, "save", lambda weights, file: written.update(weights))
    AveragedWeights(ema, str(tmp_path / "model.pt"), [], BUNDLE)(SimpleNamespace(state=SimpleNamespace(rank=0)))
    assert written.keys() == state.keys() and {value.device.type for value in written.values()} == {"cpu"}


def test_a_run_is_resumed_through_the_cpu(tmp_path, monkeypatch):
    """On a GPU AdamW's `step` would cost a synchronisation for each of the network's tensors, in every iteration."""
    places, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: (places.append(kw["map_location"]), load(*args, **kw))[1])
    for max_epochs in (1, 2):
        train(tmp_path, max_epochs)
    assert places == ["cpu"]


def test_processes_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "all_gather", lambda name: [name, "checkpoint_epoch=3.pt"])
    engine = SimpleNamespace(state=SimpleNamespace(rank=0))
    with pytest.raises(ValueError, match="checkpoint_epoch=3.pt.*none.*one folder that all machines share"):
        ResumableRun(str(tmp_path), {}).attach(engine)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four epochs in one go: folder, weights, averaged weights."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, *train(folder, max_epochs=4)


def test_a_resumed_run_equals_one_that_was_never_stopped(straight, tmp_path):
    train(tmp_path, max_epochs=2)
    network, averaged = train(tmp_path, max_epochs=4)
    assert_same(network, straight[1])
    assert_same(averaged, straight[2])
    assert any(not torch.equal(network[name], averaged[name]) for name in network)


@pytest.mark.parametrize("left", [0, 0.7])
def test_a_broken_newest_checkpoint_is_named_and_the_one_before_taken(straight, tmp_path, caplog, left):
    train(tmp_path, max_epochs=3)
    newest = tmp_path / "checkpoint_epoch=3.pt"
    os.truncate(newest, int(left * newest.stat().st_size))
    assert_same(train(tmp_path, max_epochs=4)[0], straight[1])
    assert "checkpoint_epoch=3.pt is broken" in caplog.text and is_whole(newest)


def test_a_full_disk_leaves_the_checkpoint_before(straight, tmp_path, monkeypatch):
    train(tmp_path, max_epochs=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        train(tmp_path, max_epochs=4)
    assert not list(tmp_path.glob(".partial*"))
    assert_same(train(tmp_path, max_epochs=4)[0], straight[1])


def test_a_finished_run_stays_as_it_is(straight):
    folder, network, averaged = straight
    again = train(folder, max_epochs=4)
    assert_same(again[0], network)
    assert_same(again[1], averaged)


def test_what_a_run_leaves_behind(straight):
    folder, _, averaged = straight
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint_epoch=3.pt",
        "checkpoint_epoch=4.pt",
        "model.pt",
        "model.training.txt",
    ]
    state = torch.load(folder / "model.pt", weights_only=True)
    assert {value.dtype for name, value in state.items() if name != "distilled"} == {torch.float16}
    assert_same(state, {name: value.to(state[name]) for name, value in averaged.items()})
    loaded = load_weights(tiny_network(seed=9), folder / "model.pt").state_dict()
    assert {value.dtype for name, value in loaded.items() if name != "distilled"} == {torch.float32}
    assert_same(loaded, {name: value.half().to(loaded[name]) for name, value in averaged.items()})


def test_the_training_list_is_beside_the_weights(straight, tmp_path):
    assert training_list(straight[0] / "model.pt") == straight[0] / "model.training.txt"
    assert training_cases(straight[0] / "model.pt") == ["p1", "pat 02-ü"]
    assert training_cases(tmp_path / "model.pt") is None


def test_an_evaluator_runs_the_step(straight):
    """The validation half of `train.yaml`, on the averaged weights."""
    network = load_weights(tiny_network(), straight[0] / "model.pt")
    results = []
    for _ in range(2):
        dataset = Slices()
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(dataset, batch_size=5, collate_fn=whole_batch),
            network=TrainingStep(network, Diffusion(), amp=False),
            prepare_batch=TagBatch(),
            val_handlers=[EpochSeed(0, every_epoch=False), TagMetrics()],
            decollate=False,
        )
        evaluator.run()
        results.append(evaluator.state.metrics)
    assert results[0] == results[1] and set(results[0]) == {
        "val_denoising_y0",
        "val_denoising_y1",
        "val_classifier_auc",
    }
