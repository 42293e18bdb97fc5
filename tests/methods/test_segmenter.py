"""Slices to masks in one pass: a student that must have learned, and the upper bound with weights of its own."""

from __future__ import annotations

import pytest
import torch

from custom_modules.methods.segmenter import SegmentationStep, Student, UpperBound, check_distilled, probability
from custom_modules.networks.segmenter import Segmenter
from tests.helpers.tiny_network import tiny_network


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the student


@pytest.fixture(scope="module")
def distilled():
    network = tiny_network(segmenter=True)
    network.distilled.fill_(1)
    return network


def test_the_student_gives_the_probability_of_its_logits(distilled):
    x_0 = randn(3, 1, 32, 64)
    pred = Student(amp=False)(x_0, distilled, [4, 5, 6])
    assert pred.shape == x_0.shape and pred.dtype == torch.float32 and not pred.requires_grad
    assert 0 <= pred.min() < pred.max() <= 1
    straight = 1 / (1 + torch.exp(-distilled.segmenter(x_0)))
    mirrored = 1 / (1 + torch.exp(-distilled.segmenter(x_0.flip(2)))).flip(2)
    torch.testing.assert_close(pred, ((straight + mirrored) / 2).detach())
    torch.testing.assert_close(Student(amp=False)(x_0.flip(2), distilled, [4, 5, 6]), pred.flip(2))
    torch.testing.assert_close(Student(amp=False)(x_0[1:2], distilled, [0]), pred[1:2])


def test_the_student_is_float32_under_mixed_precision(distilled, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    x_0 = randn(2, 1, 32, 32)
    mixed, plain = (Student(amp=amp)(x_0, distilled, [0, 1]) for amp in (True, False))
    logits = SegmentationStep(distilled.segmenter)(x_0)
    assert mixed.dtype == logits.dtype == torch.float32 and logits.requires_grad
    assert 0 < (mixed - plain).abs().max() < 0.1
    torch.testing.assert_close(probability(distilled.segmenter, x_0, amp=True).detach(), mixed)


@pytest.mark.parametrize("segmenter", [True, False])
def test_a_network_that_is_not_distilled_is_refused(segmenter):
    network = tiny_network(segmenter=segmenter)
    message = r"ckpt_path\) have no trained segmenter: run distill .* or choose another --method, such as cdm"
    with pytest.raises(ValueError, match=message):
        check_distilled(network)
    with pytest.raises(ValueError, match=message):
        Student()(randn(1, 1, 32, 32), network, [0])


def test_a_distilled_network_passes(distilled):
    assert check_distilled(distilled) is None


# ---- the upper bound


def tiny_unet(seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(2, [8] * 6, norm_num_groups=4)


@pytest.fixture
def weights(tmp_path):
    state = {name: value.half() for name, value in tiny_unet(seed=1).state_dict().items()}
    torch.save(state, tmp_path / "supervised.pt")
    return tmp_path / "supervised.pt"


def test_the_method_gives_probabilities_of_its_own_network(weights):
    x_0 = torch.rand(3, 1, 32, 32) * 2 - 1
    method = UpperBound(tiny_unet(seed=2), str(weights), amp=False)
    pred = method(x_0, torch.nn.Identity(), [4, 5, 6])
    assert pred.shape == x_0.shape and pred.dtype == torch.float32 and not pred.requires_grad
    assert 0 <= pred.min() < pred.max() <= 1
    other = tiny_unet(seed=1).eval()
    other.load_state_dict({name: value.half().float() for name, value in other.state_dict().items()})
    mirrored = torch.sigmoid(other(x_0.flip(2))).flip(2)
    torch.testing.assert_close(pred, ((torch.sigmoid(other(x_0)) + mirrored) / 2).detach())
    torch.testing.assert_close(method(x_0[1:2], None, [5]), pred[1:2])  # a slice does not depend on its batch
    mixed = UpperBound(tiny_unet(), weights)(x_0, None, [4, 5, 6])
    assert mixed.dtype == torch.float32 and (mixed - pred).abs().max() < 0.05


def test_missing_weights_say_how_to_train_them(tmp_path):
    message = (
        r"supervised_ckpt_path '.*nowhere.pt' does not exist; train it with masks "
        r"\(configs/train_supervised.yaml over train.yaml\), or give --supervised_ckpt_path FILE"
    )
    with pytest.raises(FileNotFoundError, match=message):
        UpperBound(tiny_unet(), tmp_path / "nowhere.pt")


def test_other_weights_are_an_error(tmp_path):
    torch.save({"denoiser.weight": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="supervised_ckpt_path .* does not hold weights of this network"):
        UpperBound(tiny_unet(), tmp_path / "model.pt")
