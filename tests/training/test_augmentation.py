"""Augmentation of whole batches: each change by itself, against values worked out by hand; labels move along."""

import pytest
import torch

from custom_modules.training.augmentation import Augmentation

GEOMETRY = ("flip", "affine", "warp")


def block(count=8, size=64):
    """Slices (count, 1, size, size) of 0 with a block of 0.5 off the middle, in [-1, 1], and the block's mask."""
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, size // 4 : size // 2, size // 3 : 2 * size // 3] = 1
    return mask - 1, mask


def augmented(seed=0, images=None, labels=None, **changes):
    images = block()[0] if images is None else images
    torch.manual_seed(seed)
    return Augmentation(**changes)(images, labels)


def test_without_a_change_all_stays_as_it_is():
    images, labels = block()
    x, y = augmented(images=images, labels=labels)
    assert torch.allclose(x, images, atol=1e-5) and torch.equal(y, labels)
    assert Augmentation()(images)[1] is None


def test_a_batch_is_a_function_of_the_seed():
    changes = {name: 0.5 for name in (*GEOMETRY, "cut", "bias", "gamma", "gain", "blur", "coarse", "noise", "bright")}
    first, again, other = (augmented(seed, **changes)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= -1 and first.max() <= 1 and first.isfinite().all()
    assert len({tuple(slice_.flatten().tolist()) for slice_ in first}) == 8  # each slice changes in its own way


def test_a_flip_mirrors_left_and_right_which_run_along_h():
    images, labels = block()
    x, y = augmented(images=images, labels=labels, flip=1.0)
    assert torch.allclose(x, images.flip(2), atol=1e-5) and torch.equal(y, labels.flip(2))


@pytest.mark.parametrize("change", GEOMETRY)
def test_a_label_moves_with_its_image(change):
    images, labels = block(32)
    x, y = augmented(images=images, labels=labels, **{change: 1.0})
    inside = x > -0.5  # halfway between 0 and 0.5 in [0, 1]
    assert set(y.unique().tolist()) == {0, 1}
    for image, label, before in zip(inside, y > 0, labels > 0):
        assert 2 * (image & label).sum() / (image.sum() + label.sum()) > 0.97
        assert not torch.equal(label, before)


def test_what_comes_in_from_outside_is_background():
    x, _ = augmented(images=torch.ones(16, 1, 32, 32), affine=1.0, zoom=0.0, rotation=0.0, translation=0.3)
    assert x.min() == -1 and x.max() == 1


def test_half_of_the_slices_change_at_probability_one_half():
    images, _ = block(400, 8)
    x, _ = augmented(images=images, gain=0.5)
    changed = ((x - images).abs().amax((1, 2, 3)) > 1e-4).sum().item()
    assert changed == pytest.approx(200, abs=40)  # 4 standard deviations of sqrt(400) / 2


def test_contrast_bias_and_brightness_by_hand():
    flat = torch.zeros(64, 1, 16, 16)  # 0.5 of [0, 1]
    gamma = (augmented(images=flat, gamma=1.0, gamma_range=(0.5, 2.0))[0] + 1) / 2
    assert gamma.amin() >= 0.25 and gamma.amax() <= 0.5**0.5  # 0.5^2, 0.5^0.5
    assert gamma.amin() < 0.3 and gamma.amax() > 0.65 and (gamma.amax((1, 2, 3)) - gamma.amin((1, 2, 3))).max() < 1e-5
    gain = (augmented(images=flat, gain=1.0, gain_range=0.2)[0] + 1) / 2
    assert gain.amin() >= 0.4 - 1e-6 and gain.amax() <= 0.6 + 1e-6
    field = (augmented(images=flat - 0.8, bias=1.0, bias_range=0.1)[0] + 1) / 2
    assert field.log().sub(torch.tensor(0.1).log()).abs().max() <= 0.1 * 10 + 1e-5  # 10 terms, each within +-1
    assert (field.amax((1, 2, 3)) / field.amin((1, 2, 3))).min() > 1.01  # it varies over every slice


def test_another_slice_saturates_and_keeps_its_order():
    ramp = torch.linspace(-1, 1, 64).expand(64, 1, 64, 64)
    x, _ = augmented(images=ramp, odd_slice=1.0)
    assert (x.diff(dim=-1) >= 0).all() and x.max() <= 1
    middle = (x[..., 32] + 1) / 2  # of 0.51: a factor in [1/4, 2], saturating at 1
    assert middle.min() < 0.2 and middle.max() > 0.8


def test_noise_is_rician():
    """In air, Rician noise of s is Rayleigh: mean s sqrt(pi / 2); in signal, of mean 0 and standard deviation s."""
    air, signal = -torch.ones(1, 1, 256, 256), torch.zeros(1, 1, 256, 256)
    torch.manual_seed(0)
    in_air, in_signal = (Augmentation(noise=1.0)(torch.cat([air, signal]))[0] + 1) / 2
    s = in_signal.std().item()
    assert 0 < s <= 0.0605 and in_air.mean().item() / 1.2533 <= 0.0605
    assert (in_air.std() / in_air.mean()).item() == pytest.approx(0.5227, abs=0.01)  # of Rayleigh's distribution
    assert in_signal.mean().item() == pytest.approx(0.5 + s**2, abs=2e-3)  # s^2 / (2 * 0.5), of second order


def test_blur_and_half_resolution_keep_the_mean_and_take_the_edges():
    images, _ = block()
    for change in ({"blur": 1.0, "blur_size": 0.03}, {"coarse": 1.0}):
        x, _ = augmented(images=images, **change)
        assert torch.allclose(x.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-3)
        assert x.diff(dim=-1).abs().max() < images.diff(dim=-1).abs().max()


def test_a_box_is_saturated_or_empty():
    images, _ = block(64)
    bright = augmented(images=images, bright=1.0)[0] == 1
    sides = [bright.any(axis).float().sum(-1) for axis in (2, 3)]
    assert all(side.max() <= 64 / 4 + 1 for side in sides) and bright.flatten(1).any(1).float().mean() > 0.9
    dark = augmented(images=torch.zeros(64, 1, 32, 32), dark=1.0)[0]
    assert set(dark.unique().tolist()) == {-1.0, 0.0}


def test_a_cut_field_of_view_hides_image_and_label_alike():
    x, y = augmented(images=torch.zeros(64, 1, 32, 32), labels=torch.ones(64, 1, 32, 32), cut=1.0)
    assert torch.equal(x > -1, y > 0)
    seen = y.mean((1, 2, 3))
    assert seen.min() > 0.74 and seen.max() <= 1 and seen.std() > 0.02
    sides = {(int(s[:, 0, 15]), int(s[:, -1, 15]), int(s[:, 15, 0]), int(s[:, 15, -1])) for s in y if s.mean() < 1}
    assert len(sides) == 4  # each of the four


def test_the_skull_is_taken_off_and_the_brain_stays():
    """Discs: a bright scalp of radius 28 to 30, dark bone to 26, brain of 0.5 within."""
    rows, columns = torch.meshgrid(torch.arange(64) - 32, torch.arange(64) - 32, indexing="ij")
    radius = (rows**2 + columns**2).sqrt()
    head = torch.where(radius < 26, 0.5, torch.where(radius < 28, 0.0, torch.where(radius < 30, 0.9, 0.0)))
    x = (augmented(images=(2 * head - 1).expand(4, 1, 64, 64), strip=1.0)[0] + 1) / 2
    stripped = x[0, 0]
    assert (stripped[radius >= 29.5] == 0).all() and (stripped[radius < 18] - 0.5).abs().max() < 1e-5


def test_processes_draw_together_what_one_draws(monkeypatch):
    images, labels = block(6)
    changes = {"flip": 0.5, "affine": 0.5, "gamma": 0.5, "noise": 0.5, "bright": 0.5}
    whole = augmented(images=images, labels=labels, **changes)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        part = augmented(images=images[rank::2], labels=labels[rank::2], **changes)
        assert all(torch.allclose(a, b[rank::2], atol=1e-6) for a, b in zip(part, whole))


def test_a_wrong_probability_is_an_error():
    with pytest.raises(ValueError, match=r"blur is a probability and must be in \[0, 1\]; got 1.5"):
        Augmentation(blur=1.5)
