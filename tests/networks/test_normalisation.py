"""Group normalisation in the layout that is fast on a CPU: the same numbers, and the layout that convolutions want."""

import pytest
import torch
from torch import nn

from custom_modules.networks.normalisation import LayoutAwareGroupNorm
from custom_modules.networks.segmenter import Segmenter
from tests.helpers.tiny_network import tiny_network


@pytest.mark.parametrize("side, train, contiguous", [(16, False, True), (32, False, False), (32, True, True)])
def test_values_and_gradients_are_those_of_torch_in_the_layout_that_is_fast(monkeypatch, side, train, contiguous):
    torch.manual_seed(0)
    x = torch.randn(2, 8, side, side).contiguous(memory_format=torch.channels_last)
    own, torchs = LayoutAwareGroupNorm(4, 8), nn.GroupNorm(4, 8)
    nn.init.normal_(torchs.weight)
    own.load_state_dict(torchs.state_dict())
    seen = []
    forward = nn.GroupNorm.forward
    results = []
    for norm in (own, torchs):
        leaf = x.clone().requires_grad_(train)
        with monkeypatch.context() as patch, torch.set_grad_enabled(train):
            patch.setattr(
                nn.GroupNorm, "forward", lambda self, x: (seen.append(x.is_contiguous()), forward(self, x))[1]
            )
            y = norm(leaf)
        if train:
            (y * torch.arange(8.0)[:, None, None]).square().sum().backward()
        results.append((y.detach(), leaf.grad, norm.weight.grad))
    assert seen == [contiguous, False]
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # float32; gradients up to 1e3


def test_contiguous_slices_stay_contiguous():
    x = torch.randn(2, 8, 4, 4)
    assert LayoutAwareGroupNorm(4, 8)(x).is_contiguous()


@pytest.mark.parametrize("network", [tiny_network(segmenter=True), Segmenter(1, [8] * 6)], ids=["all", "segmenter"])
def test_every_normalisation_of_the_networks_is_aware(network):
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and {type(module) for module in norms} == {LayoutAwareGroupNorm}
