"""On a GPU: every method gives the CPU's maps, training waits for nothing, and a run resumes as fast as it started."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from custom_modules.diffusion import Diffusion
from custom_modules.methods.segmenter import SegmentationStep
from custom_modules.networks.precision import has_bf16
from custom_modules.training.handlers import ClipGradients
from custom_modules.training.segmentation import SegmentationLoss
from custom_modules.training.steps import JointLoss, TrainingStep, parameter_groups
from tests.helpers.gpu import METHODS, build_method, distilled_network
from tests.helpers.inferers import ball, inferer
from tests.training.test_checkpoints import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def no_waiting():
    """A context in which anything that waits for the GPU is an error."""

    class Strict:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return Strict()


@pytest.mark.parametrize("gate", ["classifier", "all"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_maps_of_the_cpu(name, gate):
    volume, maps = torch.nn.functional.interpolate(ball(), (32, 32, 5)), []
    for device in ("cpu", GPU):
        network = distilled_network().to(device)
        run = inferer(build_method(name, amp=False), gate=gate, gate_threshold=0.0, batch_size=2, blur=1.0)
        maps.append(run(volume.to(device), network).as_tensor().cpu())
    expected, found = maps
    assert expected[:, 0].abs().max() > 0
    # float32 sums in another order; a map is a small difference, or a component of an SVD, of such sums
    scale = float(expected[:, 0].abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=0.02)


@pytest.mark.skipif(torch.cuda.is_available() and not has_bf16("cuda"), reason="this GPU has no bf16 of its own")
def test_bf16_gives_nearly_the_map_of_float32():
    x, network = ball()[..., 2].to(GPU), distilled_network().to(GPU)
    exact, fast = (build_method("cdm", amp=amp)(x, network, [0]) for amp in (False, True))
    assert torch.nn.functional.cosine_similarity(exact.flatten(), fast.flatten(), dim=0) > 0.95


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 1, 32, 32, generator=generator).to(GPU) * 2 - 1, torch.arange(6, device=GPU) % 2


def test_an_iteration_of_denoiser_and_classifier_waits_for_nothing(no_waiting):
    network, (x, tags) = distilled_network().to(GPU).train(), batch()
    step, loss, weights = TrainingStep(network, Diffusion().to(GPU)), JointLoss(), torch.ones(6, device=GPU)
    optimizer = torch.optim.AdamW(parameter_groups(network, 1e-3, 1e-3))
    run(lambda: loss(step(x, tags, weights), tags), optimizer, no_waiting)


def test_an_iteration_of_the_student_waits_for_nothing(no_waiting):
    network, (x, _) = distilled_network().to(GPU).train(), batch()
    step, loss = SegmentationStep(network.segmenter), SegmentationLoss()
    run(lambda: loss(step(x), (x > 0.5).float()), torch.optim.AdamW(network.segmenter.parameters()), no_waiting)


def run(compute, optimizer, no_waiting) -> None:
    def iteration():
        optimizer.zero_grad(set_to_none=True)
        compute_loss = compute()
        compute_loss.backward()
        ClipGradients(optimizer, max_norm=1.0)(SimpleNamespace())
        optimizer.step()
        return compute_loss.detach()

    losses = [iteration()]
    with no_waiting:
        losses += [iteration() for _ in range(3)]
    assert torch.stack(losses).isfinite().all() and losses[0] != losses[-1]


def waits(folder, max_epochs) -> int:
    """Trains the parts of `train.yaml` and counts how often they wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(folder, max_epochs, device=GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_a_resumed_run_waits_no_more_than_a_fresh_one(tmp_path):
    one, two = (waits(tmp_path / str(epochs), epochs) for epochs in (1, 2))
    waits(tmp_path / "resumed", 1)
    resumed = waits(tmp_path / "resumed", 2)
    assert resumed <= one + 60, (one, two, resumed)  # AdamW's `step` on the GPU waits for each tensor and iteration


def test_weights_load_without_a_gpu(tmp_path):
    train(tmp_path, 1, device=GPU)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {value.device.type for value in state.values()} == {"cpu"}
