"""Slices to masks in one pass: a loss that leaves out what nobody knows, and a student that must have learned."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from custom_modules.methods.segmenter import SegmentationStep, Student, check_distilled, probability
from custom_modules.training.segmentation import UNKNOWN, LabelBatch, SegmentationLoss
from tests.helpers.tiny_network import tiny_network


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(seed=0):
    """Logits (3, 1, 8, 8) and labels of a square; the third slice has none."""
    label = torch.zeros(3, 1, 8, 8)
    label[:2, :, 2:6, 3:7] = 1
    return randn(3, 1, 8, 8, seed=seed), label


def test_the_batch_is_image_and_label():
    batch = {"image": torch.ones(2, 1, 4, 4).half(), "label": torch.full((2, 1, 4, 4), 2).byte(), "tag": torch.ones(2)}
    x_0, label = LabelBatch()(batch)
    assert x_0.dtype == label.dtype == torch.float32 and x_0.sum() == 32 and label.sum() == 64


# ---- the loss


def test_where_all_is_known_the_loss_is_monais():
    logits, label = batch()
    torch.testing.assert_close(SegmentationLoss()(logits, label), DiceCELoss(sigmoid=True, batch=True)(logits, label))


def test_the_loss_by_hand():
    """Four pixels, three of them known: probabilities 0.5, 0.5, 0.2 for the labels 1, 0, 0."""
    logits = torch.tensor([0.0, 0.0, -1.386294, 5.0]).view(1, 1, 2, 2)  # the logit of 0.2 is log(0.25)
    label = torch.tensor([1.0, 0.0, 0.0, UNKNOWN]).view(1, 1, 2, 2)
    dice = 1 - (2 * 0.5 + 1e-5) / (0.5 + 0.5 + 0.2 + 1 + 1e-5)
    cross_entropy = (0.693147 + 0.693147 + 0.223144) / 4  # -log 0.5, 0.5, 0.8; the unknown one is right
    assert SegmentationLoss()(logits, label).item() == pytest.approx(dice + cross_entropy, abs=1e-5)


def test_unknown_pixels_have_no_gradient_and_their_logits_no_say():
    logits, label = batch()
    label[:, :, 5:, :4] = UNKNOWN
    unknown = label == UNKNOWN
    logits.requires_grad_()
    loss = SegmentationLoss()(logits, label)
    loss.backward()
    assert unknown.any() and (logits.grad[unknown] == 0).all() and (logits.grad[~unknown] != 0).all()
    changed = torch.where(unknown, randn(3, 1, 8, 8, seed=1) * 100, logits.detach())
    torch.testing.assert_close(SegmentationLoss()(changed, label), loss.detach())


@pytest.mark.parametrize("right", [0, 1])
def test_unknown_pixels_count_as_right(right):
    """MONAI's loss with sure and right background in their place; as sure and right target they would feed the Dice."""
    logits, label = batch()
    unknown = torch.zeros_like(label, dtype=torch.bool)
    unknown[:, :, :2] = True
    filled = torch.where(unknown, 60.0 * right - 30, logits), label.masked_fill(unknown, right)
    expected = DiceCELoss(sigmoid=True, batch=True)(*filled)
    found = SegmentationLoss()(logits, label.masked_fill(unknown, UNKNOWN))
    assert torch.allclose(found, expected, atol=1e-6) == (right == 0)


def test_a_batch_of_which_nothing_is_known_is_harmless():
    logits = randn(2, 1, 8, 8).requires_grad_()
    loss = SegmentationLoss()(logits, torch.full_like(logits, UNKNOWN).detach())
    loss.backward()
    assert loss.isfinite() and not logits.grad.any()


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
