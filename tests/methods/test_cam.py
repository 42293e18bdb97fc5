"""Class activation maps: a worked example, a planted target, chunks, smoothing and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from custom_modules.methods import cam
from custom_modules.methods.cam import VARIANTS, ClassActivationMap, first_component, min_max
from tests.helpers.tiny_network import tiny_network

LAYERS = ["classifier.activation", "classifier.down_blocks.0", "classifier.conv_in"]  # the second gives a tuple
LAST = LAYERS[0]


def slices(count: int = 3, size: tuple[int, int] = (16, 24), seed: int = 1) -> torch.Tensor:
    """Noise in [-1, 1], (count, 1, H, W)."""
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain(variant: str, layer: str = LAST, **settings) -> ClassActivationMap:
    return ClassActivationMap(variant, layer, **{"aug_smooth": False, "eigen_smooth": False, **settings})


class Toy(nn.Module):
    """A classifier of two functions: A = features(x) at `layer`, S(y1) = score(A) and S(y0) = -score(A)."""

    def __init__(self, features, score) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.features, self.score = features, score

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        assert not timesteps.any()
        score = self.score(self.layer(self.features(x)))
        return torch.stack([-score, score], dim=1)


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def test_worked_example():
    """One 2 x 2 slice, two channels: A_1 = x + 1, A_2 its mirror; S = sum(A_1^2) / 2 + sum(A_2) / 2.

    A_1 = [0 1; 2 1], A_2 = [1 0; 1 2], so G_1 = A_1 and G_2 = 1/2 everywhere.
    """
    network = Toy(
        lambda x: torch.cat([x + 1, (x + 1).flip(3)], dim=1),
        lambda A: (A[:, 0] ** 2 / 2 + A[:, 1] / 2).sum(dim=(1, 2)),
    )
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).view(1, 1, 2, 2) - 1
    # ScoreCAM: x + 1 masked by A_1 / 2 is [0 .5; 2 .5], S = 2.25 + 1.5; by A_2 / 2 it is [0 0; 1 1], S = 1 + 1
    w = 1 / (1 + np.exp(-1.75))
    expected = {
        "gradcam": [[0, 0.25], [1, 0.75]],  # w = 1, 1/2: [.5 1; 2.5 2]
        # sum(A_1 G_1^3) = 18, w_1 = 2 / 20 + 2 * 4 / 26; sum(A_2 G_2^3) = 1/2, w_2 = 4 * 1/4 * 1/2
        "gradcam_pp": [[12 / 130, 0], [118 / 130, 1]],
        "layercam": [[0, 0.125], [1, 0.375]],  # A_1^2 + A_2 / 2: [.5 1; 4.5 2]
        "scorecam": [[0, 1 - 1 / (2 * w)], [1, 1 / (2 * w)]],  # [1-w w; 1+w 2-w], of range 2 w
    }
    for variant, values in expected.items():
        np.testing.assert_allclose(plain(variant, "layer")(x, network, [0])[0, 0], values, atol=1e-6, err_msg=variant)


# ---- what a map is for


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_peaks_where_the_target_is(variant, smooth):
    """Brightness speaks for y1, grey speaks against it; a third channel is dead and has no gradient."""
    network = Toy(
        lambda x: nn.functional.avg_pool2d(torch.cat([(x - 0.3).relu(), (0.4 - x.abs()).relu(), 0 * x + 1], 1), 2),
        lambda A: (A.mean(dim=(2, 3)) * torch.tensor([300.0, -30.0, 0.0])).sum(dim=1),
    )
    x = torch.full((2, 1, 24, 32), -1.0)
    x[0, 0, 4:8, 20:26] = 0.9  # the target
    x[0, 0, 12:22, 4:14] = 0.0  # larger, and not the target
    x[1] = x[0].flip(1)
    maps = plain(variant, "layer", aug_smooth=smooth, eigen_smooth=smooth)(x, network, [0, 1])
    for saliency, picture in zip(maps, x):
        assert picture.flatten()[saliency.argmax()] == pytest.approx(0.9)
        assert saliency[picture == 0.9].mean() > 3 * saliency[picture == 0].mean()
        assert saliency[picture == 0.9].mean() > 3 * saliency[picture == -1].mean()


@pytest.mark.parametrize(
    ("variant", "eigen"),
    [("gradcam", False), ("gradcam_pp", False), ("gradcam_pp", True), ("layercam", False), ("layercam", True)],
)
def test_evidence_against_the_target_only_gives_zero(variant, eigen):
    network = Toy(lambda x: torch.cat([x + 1, (x + 1) ** 2], dim=1), lambda A: -A.sum(dim=(1, 2, 3)))
    maps = plain(variant, "layer", eigen_smooth=eigen)(slices(), network, range(3))
    assert torch.equal(maps, torch.zeros_like(maps))


def test_slices_do_not_see_each_other(network):
    x = slices()
    for variant in VARIANTS:
        run = plain(variant, LAYERS[1], eigen_smooth=True)
        alone = torch.cat([run(x[i : i + 1], network, [i]) for i in range(3)])
        torch.testing.assert_close(run(x, network, range(3)), alone, rtol=0, atol=1e-4, msg=variant)


# ---- ScoreCAM's masks


def test_chunks_bound_the_batch_and_change_nothing(network, monkeypatch):
    x, run = slices(), plain("scorecam")
    whole = run(x, network, range(3))  # 3 slices x 16 channels in one pass
    passes = []
    classify = network.classify
    monkeypatch.setattr(network, "classify", lambda x, t: passes.append(len(x)) or classify(x, t))
    monkeypatch.setattr(cam, "CHUNK", 7 * x[0].numel() + 1)
    torch.testing.assert_close(run(x, network, range(3)), whole, rtol=0, atol=1e-5)
    assert passes == [3] + [7] * 6 + [6]


# ---- smoothing


@pytest.mark.parametrize("variant", VARIANTS)
def test_aug_smooth_is_the_mean_of_six_views(network, variant):
    x = slices()
    views = [(x + 1) * factor - 1 for factor in (0.9, 1, 1.1)]
    one = plain(variant)
    maps = [one(v, network, range(3)) for v in views]
    maps += [torch.flip(one(torch.flip(v, [2]), network, range(3)), [2]) for v in views]  # H is left to right
    smooth = plain(variant, aug_smooth=True)(x, network, range(3))
    torch.testing.assert_close(smooth, sum(maps) / 6, rtol=0, atol=1e-5)
    assert (smooth - one(x, network, range(3))).abs().max() > 0.01


@pytest.mark.parametrize("sign", [1, -1])
def test_first_component_of_rank_one(sign):
    pattern = slices(2, (3, 5))
    shares = sign * torch.tensor([3.0, -1.0, 2.0]).view(1, 3, 1, 1)  # they add up to 4, their length is sqrt(14)
    expected = sign * 14**0.5 * (pattern - pattern.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(first_component(shares * pattern + 7), expected, rtol=0, atol=1e-5)


def test_first_component_goes_with_the_sum():
    weighted = torch.randn(32, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    component, total = first_component(weighted), weighted.sum(dim=1, keepdim=True)
    assert ((component * (total - total.mean(dim=(2, 3), keepdim=True))).sum(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(first_component(-weighted), -component, rtol=0, atol=1e-5)


def test_min_max_by_hand():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[0.1, 0.1], [0.1, 0.1000001]], [[0.0, 0.0], [0.0, 1e-20]]])
    expected = torch.tensor([[[0, 0.5], [0.25, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 1]]])
    torch.testing.assert_close(min_max(maps), expected)  # rounding of a constant is no map; a faint map is one


# ---- how it is called


def test_leaves_nothing_behind():
    network, x_0 = tiny_network(), slices()
    before = x_0.clone()
    for variant in VARIANTS:
        maps = ClassActivationMap(variant, LAYERS[1])(x_0, network, range(3))
        assert not maps.requires_grad
    assert torch.equal(x_0, before) and not x_0.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_failure_leaves_no_hook():
    network = Toy(lambda x: x, lambda A: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plain("gradcam", "layer")(slices(), network, range(3))
    assert not network.layer._forward_hooks


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_map_under_no_grad_autocast_and_with_frozen_weights(network, variant):
    x, run = slices(), plain(variant, eigen_smooth=True)
    expected = run(x, network, range(3))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # as inside MONAI's evaluator
        inside = run(x.double(), network, range(3))
    frozen = run(x, tiny_network().requires_grad_(False), range(3))
    assert torch.equal(inside, expected) and torch.equal(frozen, expected)


# ---- errors


def test_wrong_variant_is_named():
    with pytest.raises(ValueError, match=r"variant must be one of \[.*'gradcam_pp'.*'scorecam'\]; got 'grad-cam'"):
        ClassActivationMap("grad-cam", LAST)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("classifier.activations", r"got 'classifier\.activations'; close names: \['classifier\.activation', "),
        ("classifier.head", r"got 'classifier\.head'; close names: \['classifier\.(?!head)"),  # gives (B, 2)
        ("denoiser.conv_in", r"got 'denoiser\.conv_in'; close names: \['classifier\."),  # does not run
    ],
)
def test_wrong_layer_is_named(network, layer, message):
    with pytest.raises(ValueError, match=rf"target_layer must .*feature map \(B, K, h, w\).*{message}"):
        ClassActivationMap("layercam", layer)(slices(), network, range(3))
