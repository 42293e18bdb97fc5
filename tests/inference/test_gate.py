"""The gate: which slices are processed, by the classifier, by tags, or all that show the body."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from custom_modules.inference.inferer import FACTS
from tests.helpers.inferers import DEPTH, SIZE, BrightIsPositive, Copy, ball, inferer, tag_volume


def probabilities(output) -> list[float]:
    return output.meta[FACTS]["gate_probability"][0].tolist()


def test_gate_tags_passes_only_tagged_slices():
    image, method = ball(), Copy()
    output = inferer(method, gate="tags", batch_size=2)(image, nn.Identity(), tag_volume([0, 1, 0, 1, 1])).as_tensor()
    assert method.batches == [[1, 3], [4]]
    assert torch.equal(output[:, :1, ..., [1, 3, 4]], image[..., [1, 3, 4]])
    assert not output[..., [0, 2]].any()  # neither saliency nor region


@pytest.mark.parametrize("gate_threshold", [0.1, 0.5, 0.9])
def test_gate_classifier_compares_the_probability_at_t_0(gate_threshold):
    image, method, network = ball(depth=7, seed=3), Copy(), BrightIsPositive()
    inferer(method, gate="classifier", gate_threshold=gate_threshold, batch_size=1)(image, network)
    probability = 1 / (1 + np.exp(-10 * (image[0, 0, 5:11, 5:11].mean(dim=(0, 1)).numpy() - 0.6)))
    assert method.slices == np.flatnonzero(probability > gate_threshold).tolist()
    assert network.timesteps == [0] * 7


def test_gate_classifier_opens_bf16_only_where_asked(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    seen = []

    class Network(BrightIsPositive):
        def classify(self, x, timesteps):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().classify(x, timesteps)

    for amp in (True, False):
        inferer(gate="classifier", amp=amp)(ball(), Network())
    assert seen == [True, False]


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.5])
def test_the_gate_is_smoothed_over_the_logits_of_neighbours(sigma):
    image, network = ball(depth=9, seed=3), BrightIsPositive()
    output = inferer(gate="classifier", gate_smoothing=sigma, batch_size=1)(image, network)
    logit = 10 * (image[0, 0, 5:11, 5:11].mean(dim=(0, 1)).double().numpy() - 0.6)
    weight = ndimage.gaussian_filter1d(np.ones(9), sigma, mode="constant")  # the part of the Gaussian inside the volume
    smooth = ndimage.gaussian_filter1d(logit, sigma, mode="constant") / weight
    assert probabilities(output) == pytest.approx(1 / (1 + np.exp(-smooth)), abs=1e-5)
    assert np.abs(smooth - logit).max() > 0.05


def test_a_slice_between_positive_ones_is_processed():
    image, chosen = ball(depth=5), []
    for k, value in enumerate([0.7, 0.75, 0.58, 0.75, 0.2]):  # logits 1, 1.5, -0.2, 1.5, -4
        image[0, 0, 5:11, 5:11, k] = value
    for sigma in (0.0, 0.5):
        method = Copy()
        inferer(method, gate="classifier", gate_smoothing=sigma)(image, BrightIsPositive())
        chosen.append(method.slices)
    assert chosen == [[0, 1, 3], [0, 1, 2, 3]]


def test_the_gate_is_not_smoothed_by_default():
    image = ball(depth=7, seed=3)
    default, off = (
        probabilities(inferer(gate="classifier", **knobs)(image, BrightIsPositive()))
        for knobs in ({}, {"gate_smoothing": 0.0})
    )
    probability = 1 / (1 + np.exp(-10 * (image[0, 0, 5:11, 5:11].mean(dim=(0, 1)).numpy() - 0.6)))
    assert default == off == pytest.approx(probability)


class Sizes(BrightIsPositive):
    """Remembers what the classifier got, and says y1."""

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)


def test_the_classifier_gets_slices_of_its_own_size():
    image, network, method = ball(), Sizes(), Copy()
    inferer(method, gate="classifier", gate_size=8)(image, network)
    assert network.seen.shape == (DEPTH, 1, 8, 8) and method.slices == list(range(DEPTH))
    triangle = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8  # the tent of half width 2 at distances 1.5 and 0.5: anti-aliased
    windows = image[0, :, 1:15, 1:15].movedim(-1, 0).unfold(2, 4, 2).unfold(3, 4, 2)  # not those over the edge
    expected = torch.einsum("dchwij,i,j->dchw", windows, triangle, triangle)
    torch.testing.assert_close(network.seen[..., 1:7, 1:7], expected)


@pytest.mark.parametrize("gate_size", [None, SIZE])
def test_slices_of_the_classifiers_size_are_left_alone(gate_size):
    image, network = ball(), Sizes()
    inferer(gate="classifier", gate_size=gate_size)(image, network)
    assert torch.equal(network.seen, image[0].movedim(-1, 0))


def test_gate_all_leaves_out_slices_without_body():
    image, method = ball(), Copy()
    image[..., 0] = -1
    inferer(method)(image, nn.Identity())
    assert method.slices == [1, 2, 3, 4]


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_an_empty_gate_gives_an_empty_map_and_calls_nothing(smoothing):
    method = Copy()
    output = inferer(method, gate="tags", smoothing=smoothing)(ball(), nn.Identity(), tag_volume([0] * DEPTH))
    assert output.shape == (1, 2, SIZE, SIZE, DEPTH) and not output.any()
    assert method.batches == []
    assert {name: value.tolist() for name, value in output.meta[FACTS].items()} == {
        "seconds_per_slice": [0], "n_slices": [0]
    }  # fmt: skip


def test_gate_tags_needs_tags():
    with pytest.raises(ValueError, match="gate is 'tags' but the case has no slice_labels.*--gate classifier"):
        inferer(gate="tags")(ball(), nn.Identity())


def test_gate_tags_refuses_tags_along_another_axis():
    tags = torch.arange(SIZE).view(1, 1, SIZE, 1, 1).expand(1, 1, SIZE, SIZE, DEPTH) % 2  # along the first axis
    with pytest.raises(ValueError, match="slice_labels run along another axis.*slice_axis"):
        inferer(gate="tags")(ball(), nn.Identity(), tags)
