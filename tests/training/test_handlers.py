"""Handlers: gradients clipped apart, seeds by epoch, the mean loss, and validation metrics by hand."""

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine

from custom_modules.training.handlers import ClipGradients, EpochSeed, MeanLoss, TagMetrics, TrainingProgress
from custom_modules.training.steps import parameter_groups
from tests.helpers.tiny_network import tiny_network


def test_groups_have_their_own_rate_and_are_clipped_apart():
    network = tiny_network()
    groups = parameter_groups(network, lr_denoiser=1e-3, lr_classifier=2e-3)
    assert [group["lr"] for group in groups] == [1e-3, 2e-3]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    optimizer = torch.optim.AdamW(groups)
    for parameter in network.denoiser.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    for parameter in network.classifier.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    before = [parameter.grad.clone() for parameter in network.classifier.parameters()]
    ClipGradients(optimizer, max_norm=1.0)(engine=None)
    norm = torch.stack([parameter.grad.norm() for parameter in network.denoiser.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, abs=1e-3)
    # the small gradients are below the norm, so one clipping of all together would have shrunk them
    assert all(torch.equal(p.grad, b) for p, b in zip(network.classifier.parameters(), before))


def draws(handler, epoch):
    handler(SimpleNamespace(state=SimpleNamespace(epoch=epoch)))
    return torch.rand(3).tolist()


def test_an_epochs_draws_depend_on_seed_and_epoch():
    first = draws(EpochSeed(3), epoch=1)
    torch.rand(100)
    assert draws(EpochSeed(3), epoch=1) == first
    assert first not in (draws(EpochSeed(3), epoch=2), draws(EpochSeed(4), epoch=1))
    draws(EpochSeed(2**31), epoch=10**6)  # no seed is too large


def test_validation_draws_the_same_every_epoch():
    handler = EpochSeed(3, every_epoch=False)
    assert draws(handler, epoch=1) == draws(handler, epoch=2)


def test_the_loss_of_a_single_process_is_its_own():
    output = {"loss": torch.tensor(3.0, requires_grad=True) * 2}
    MeanLoss()(SimpleNamespace(state=SimpleNamespace(output=output)))
    assert output["loss"] == 6 and not output["loss"].requires_grad


def test_validation_metrics_by_hand():
    outputs = [
        {"pred": {"denoising": torch.tensor(losses), "probability": torch.tensor(p)}, "label": torch.tensor([0, 1])}
        for losses, p in (([1.0, 2.0], [0.2, 0.9]), ([3.0, 6.0], [0.5, 0.4]))
    ]
    engine = Engine(lambda engine, output: output)
    TagMetrics().attach(engine)
    for _ in range(2):  # each epoch starts from nothing
        engine.run(outputs)
        # AUC: of the pairs (y1, y0) (0.9, 0.2), (0.9, 0.5), (0.4, 0.2), (0.4, 0.5) three are in order
        assert engine.state.metrics == {"val_denoising_y0": 2.0, "val_denoising_y1": 4.0, "val_classifier_auc": 0.75}


def test_without_a_terminal_progress_is_a_line_an_epoch(caplog, capsys):
    caplog.set_level("INFO")
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(batch / 4)})
    TrainingProgress().attach(engine)
    engine.run([1, 2], max_epochs=2)
    assert "epoch 2 of 2: loss 0.5000" in caplog.messages and capsys.readouterr().err == ""
