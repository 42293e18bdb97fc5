"""Without a GPU: nothing that runs on one waits for it, and nothing mixes its tensors with the CPU's.

The device is torch's `meta`, whose tensors have shapes and no data: reading a value (`item`, `float`, `if tensor`,
`cpu`, `nonzero`) is an error there, just as on a GPU it is a wait, and so is mixing in a tensor from elsewhere. (Fake
tensors on `cuda` need a build of torch with CUDA.)
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from custom_modules.diffusion import Diffusion
from custom_modules.methods.segmenter import SegmentationStep
from custom_modules.training.handlers import ClipGradients
from custom_modules.training.segmentation import SegmentationLoss
from custom_modules.training.steps import JointLoss, TrainingStep, parameter_groups
from tests.helpers.gpu import METHODS, build_method, distilled_network

META = torch.device("meta")


@pytest.fixture
def network(monkeypatch):
    network = distilled_network()
    monkeypatch.setattr("custom_modules.methods.segmenter.check_distilled", lambda network: None)  # once a batch
    return network.to(META)


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_methods_wait_for_nothing(network, name, moved):
    """Also with diffusion tables that stayed on another device, as those of a server with two."""
    method = build_method(name, diffusion=Diffusion().to(META) if moved else Diffusion())
    x = torch.empty(3, 1, 32, 32, device=META)
    maps = method(x, network, [0, 1, 2])
    assert maps.device == META and maps.shape == x.shape and maps.dtype == torch.float32


def test_reading_a_value_is_an_error_here():
    x = torch.empty(3, device=META)
    for read in (bool, lambda x: float(x[0]), torch.Tensor.cpu, torch.Tensor.nonzero, lambda x: x + torch.ones(3)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(x)


def iterate(compute, optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss = compute()
        loss.backward()
        ClipGradients(optimizer, max_norm=1.0)(SimpleNamespace())
        optimizer.step()
        assert loss.device == META


def test_an_iteration_of_denoiser_and_classifier_waits_for_nothing(network):
    x, tags = torch.empty(4, 1, 32, 32, device=META), torch.empty(4, dtype=torch.long, device=META)
    step, loss, weights = TrainingStep(network.train(), Diffusion()), JointLoss(), torch.empty(4, device=META)
    optimizer = torch.optim.AdamW(parameter_groups(network, 1e-3, 1e-3))
    iterate(lambda: loss(step(x, tags, weights), tags), optimizer)


def test_an_iteration_of_the_student_waits_for_nothing(network):
    x = torch.empty(4, 1, 32, 32, device=META)
    step, loss = SegmentationStep(network.segmenter.train()), SegmentationLoss()
    iterate(lambda: loss(step(x), torch.empty_like(x)), torch.optim.AdamW(network.segmenter.parameters()))
