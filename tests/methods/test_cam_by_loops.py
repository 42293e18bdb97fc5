"""Class activation maps against loops over slices and channels in float64, and against MONAI's GradCAM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.visualize import GradCAM
from torch import nn

from custom_modules.methods.cam import VARIANTS, ClassActivationMap, min_max
from tests.helpers.tiny_network import tiny_network

LAYERS = ["classifier.activation", "classifier.down_blocks.0", "classifier.conv_in"]  # the second gives a tuple
LAST = LAYERS[0]


def slices(count: int = 3, size: tuple[int, int] = (16, 24), seed: int = 1) -> torch.Tensor:
    """Noise in [-1, 1], (count, 1, H, W)."""
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain(variant: str, layer: str = LAST, **settings) -> ClassActivationMap:
    return ClassActivationMap(variant, layer, **{"aug_smooth": False, "eigen_smooth": False, **settings})


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
    network, x = tiny_network(), slices().requires_grad_()  # as MONAI's hooks need it

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network.classify(x, torch.zeros(len(x), dtype=torch.long))

    ours = plain("gradcam", layer)(x, network, range(3))
    monais = GradCAM(Classifier(), f"network.{layer}", postprocessing=lambda maps: maps)(x, class_idx=1).detach()
    torch.testing.assert_close(ours, min_max(monais), rtol=0, atol=1e-5)


def test_dead_channels_do_no_harm():
    network = tiny_network()
    with torch.no_grad():
        network.classifier.norm.weight[::2] = 0  # every second channel is the same everywhere
    x = slices(2)
    maps = plain("scorecam")(x, network, [0, 1])
    expected = [slow_map("scorecam", network.double(), x[i : i + 1].double(), LAST) for i in range(2)]
    np.testing.assert_allclose(maps[:, 0], expected, atol=2e-4)
