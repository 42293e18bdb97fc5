"""Training of segmenters: a batch of slices with labels, and a loss that leaves out what nobody knows."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss

from custom_modules.training.segmentation import UNKNOWN, LabelBatch, SegmentationLoss


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


def test_unknown_pixels_have_no_gradient_and_their_logits_do_not_count():
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


def test_a_batch_without_a_known_pixel_is_harmless():
    logits = randn(2, 1, 8, 8).requires_grad_()
    loss = SegmentationLoss()(logits, torch.full_like(logits, UNKNOWN).detach())
    loss.backward()
    assert loss.isfinite() and not logits.grad.any()
