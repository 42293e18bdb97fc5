"""Values and tangents of MONAI's U-Net against `torch.func.jvp`, which takes the network apart another way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from custom_modules.methods.forward_mode import Dual
from tests.helpers.tiny_network import tiny_network


def inputs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x, dx = (torch.randn(3, 1, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    y, dy = (torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, dx, torch.tensor([300, 5, 0]), y, dy


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_network_along_image_and_condition(patch_size, memory_format):
    x, dx, t, y, dy = inputs()
    network = tiny_network(patch_size=patch_size).double().to(memory_format=torch.contiguous_format)
    value, tangent = torch.func.jvp(lambda x, y: network(x, t, y), (x, y), (dx, dy))  # fails on channels_last
    with torch.no_grad():
        dual = network.to(memory_format=memory_format)(Dual(x, dx), t, Dual(y, dy))
    torch.testing.assert_close(dual.primal, value)
    torch.testing.assert_close(dual.tangent, tangent)


def test_a_plain_image_is_a_constant():
    x, _, t, y, dy = inputs()
    network = tiny_network().double()
    with torch.no_grad():
        dual, same = network(x, t, Dual(y, dy)), network(Dual(x, torch.zeros_like(x)), t, Dual(y, dy))
    torch.testing.assert_close(dual.tangent, same.tangent)
    assert dual.tangent.abs().max() > 1e-3


def test_work_before_the_first_dual_is_done_once():
    x, _, t, y, dy = inputs()
    network, seen = tiny_network().double(), []
    network.denoiser.conv_in.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    with torch.no_grad():
        network(x, t, Dual(y, dy))
    assert seen == [torch.Tensor]


@pytest.mark.parametrize("affine", [False, True])
def test_group_norm(affine):
    x, dx = torch.randn(2, 2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = (torch.rand(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)) if affine else (None, None)
    value, tangent = torch.func.jvp(lambda x: F.group_norm(x, 4, weight, bias, 1e-6), (x,), (dx,))
    dual = F.group_norm(Dual(x, dx), 4, weight, bias, 1e-6)
    torch.testing.assert_close(dual.primal, value)
    torch.testing.assert_close(dual.tangent, tangent)


def test_an_operation_without_a_rule_is_an_error():
    with pytest.raises(NotImplementedError, match="no rule for tanh.*--derivative finite_difference"):
        torch.tanh(Dual(torch.ones(2), torch.ones(2)))


@pytest.mark.parametrize("attribute", ["T", "mT", "data"])
def test_an_attribute_that_is_an_operation_is_an_error(attribute):
    with pytest.raises(NotImplementedError, match=f"no rule for {attribute},"):
        getattr(Dual(torch.ones(2, 2), torch.ones(2, 2)), attribute)


def test_dropout_has_to_be_off():
    x = Dual(torch.ones(4), torch.ones(4))
    with pytest.raises(NotImplementedError, match="dropout is on"):
        F.dropout(x, 0.5, training=True)
    assert F.dropout(x, 0.5, training=False) is x


def test_leaves_no_gradient_behind():
    x, dx, t, y, dy = inputs()
    network = tiny_network().double()  # its weights require gradients
    with torch.no_grad():
        dual = network(Dual(x, dx), t, Dual(y, dy))
    assert not dual.primal.requires_grad and not dual.tangent.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
