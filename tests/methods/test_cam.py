"""Class activation maps against loops over slices and channels in float64, a worked example and a planted target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.visualize import GradCAM
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


# ---- the slow way: one slice, one channel at a time, in float64


def split(network: nn.Module, x: torch.Tensor, layer: str):
    """A (1, K, h, w) of one slice at `layer`, and the function from A to the logit of y1: `forward`, written out."""
    c = network.classifier
    half = x.new_ones(1, c.time_channels // 2)
    emb = c.time_embed(torch.cat([half, 0 * half], dim=1))  # t = 0: the cosines are 1, the sines 0
    h = c.conv_in(nn.functional.pixel_unshuffle(x, c.patch_size))

    def tail(h: torch.Tensor, first_block: int) -> torch.Tensor:
        for block in c.down_blocks[first_block:]:
            h = block(hidden_states=h, temb=emb)[0]
        return logit(nn.functional.silu(c.norm(c.middle_block(hidden_states=h, temb=emb))))

    def logit(h: torch.Tensor) -> torch.Tensor:
        return (h.mean(dim=(2, 3)) @ c.head.weight.T + c.head.bias)[0, 1]

    if layer == "classifier.conv_in":
        return h, lambda A: tail(A, 0)
    h = c.down_blocks[0](hidden_states=h, temb=emb)[0]
    if layer == "classifier.down_blocks.0":
        return h, lambda A: tail(A, 1)
    return c.features(x, torch.zeros(1, dtype=torch.long)), logit


def bilinear(maps: np.ndarray, size) -> np.ndarray:
    """`maps` (h, w) at the pixel centres of a grid of `size` (H, W), constant beyond the outermost centres."""
    for axis, n in enumerate(size):
        old = maps.shape[axis]
        at = (np.arange(n) + 0.5) * old / n - 0.5
        maps = np.apply_along_axis(lambda line: np.interp(at, np.arange(old), line), axis, maps)  # noqa: B023
    return maps


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / np.ptp(values) if np.ptp(values) > 1e-12 else np.zeros_like(values)


def slow_map(variant: str, network: nn.Module, x: torch.Tensor, layer: str, eigen: bool = False) -> np.ndarray:
    """The map (H, W) of one slice `x` (1, 1, H, W) in float64, channel by channel."""
    A, score = split(network, x, layer)
    A = A.detach().requires_grad_()
    (G,) = torch.autograd.grad(score(A), A)
    A, G = A.detach()[0].numpy(), G[0].numpy()
    weights = []
    for A_k, G_k in zip(A, G):
        if variant == "gradcam":
            weights.append(G_k.sum() / G_k.size)
        elif variant == "gradcam_pp":
            bottom = sum(a * g**3 for a, g in zip(A_k.flat, G_k.flat))
            weights.append(sum(g**2 / (2 * g**2 + bottom) * max(g, 0) for g in G_k.flat))
        elif variant == "layercam":
            weights.append(np.maximum(G_k, 0))
        else:
            mask = torch.from_numpy(scaled(bilinear(A_k, x.shape[2:])))
            weights.append(network.classify((x + 1) * mask - 1, torch.zeros(1, dtype=torch.long))[0, 1].item())
    if variant == "scorecam":
        weights = np.exp(weights) / np.exp(weights).sum()
    weighted = np.stack([w * A_k for w, A_k in zip(weights, A)])
    total = weighted.sum(axis=0)
    if eigen:
        centred = weighted - weighted.mean(axis=(1, 2), keepdims=True)
        flat = centred.reshape(len(A), -1)
        component = np.tensordot(np.linalg.eigh(flat @ flat.T)[1][:, -1], centred, 1)
        total = component * np.sign(np.corrcoef(component.ravel(), total.ravel())[0, 1])
    return scaled(bilinear(np.maximum(total, 0), x.shape[2:]))


@pytest.fixture(scope="module")
def network():
    return tiny_network()


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_slow_way(network, variant, layer, eigen):
    x = slices(2)
    maps = plain(variant, layer, eigen_smooth=eigen)(x, network, [4, 0])
    assert maps.shape == x.shape and maps.dtype == torch.float32
    exact = tiny_network().double()
    expected = [slow_map(variant, exact, x[i : i + 1].double(), layer, eigen) for i in range(2)]
    assert np.ptp(expected) == pytest.approx(1)
    np.testing.assert_allclose(maps[:, 0], expected, atol=2e-4)  # float32, through a ratio of sums


@pytest.mark.parametrize("layer", ["classifier.activation", "classifier.conv_in"])
def test_gradcam_equals_monais(layer):
    network, x = tiny_network(), slices()

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network.classify(x, torch.zeros(len(x), dtype=torch.long))

    ours = plain("gradcam", layer)(x, network, range(3))
    monais = GradCAM(Classifier(), f"network.{layer}", postprocessing=lambda maps: maps)(x, class_idx=1).detach()
    torch.testing.assert_close(ours, min_max(monais), rtol=0, atol=1e-5)


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


def test_dead_channels_do_no_harm():
    network = tiny_network()
    with torch.no_grad():
        network.classifier.norm.weight[::2] = 0  # every second channel is the same everywhere
    x = slices(2)
    maps = plain("scorecam")(x, network, [0, 1])
    expected = [slow_map("scorecam", network.double(), x[i : i + 1].double(), LAST) for i in range(2)]
    np.testing.assert_allclose(maps[:, 0], expected, atol=2e-4)


def test_chunks_bound_the_batch_and_change_nothing(network, monkeypatch):
    x, run = slices(), plain("scorecam")
    whole = run(x, network, range(3))  # 3 slices x 16 channels in one pass
    passes = []
    classify = network.classify
    monkeypatch.setattr(network, "classify", lambda x, t: passes.append(len(x)) or classify(x, t))
    monkeypatch.setattr(cam, "CHUNK", 7)
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
