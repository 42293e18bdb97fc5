"""CG-Diff against a slow transcription of it, on Gaussian data where everything is known in closed form.

Unguided DDIM integrates the probability flow, which keeps (x_t - sqrt(abar) mu_0) / sqrt(V_t) of every pixel.
"""

from __future__ import annotations

import math

import pytest
import torch

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cg_diff import CGDiff
from tests.helpers.gaussian import ABAR, SIGMA, SIZE, SLICES, Gaussian, pictures
from tests.helpers.tiny_network import tiny_network

DIFFUSION = Diffusion()

TARGET = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
TARGET[..., 2:4, 3:6] = True
MU_0 = torch.linspace(-0.5, 0.5, SIZE, dtype=torch.float64).expand(1, 1, SIZE, SIZE)
MU_1 = MU_0 + 0.4 * TARGET  # the target is bright


def oracle() -> Gaussian:
    return Gaussian(MU_0, MU_1)


def images() -> torch.Tensor:
    """One picture of class 1 for each of `SLICES`, (3, 1, 8, 8) float32."""
    return pictures(MU_1)


def method(noise_level: int = 400, **settings) -> CGDiff:
    return CGDiff(DIFFUSION, noise_level, **settings)


def cg_diff(x_0: torch.Tensor, network: Gaussian, noise_level: int, s: float, stride: int) -> torch.Tensor:
    """xhat in float64, by Wolleb's own form of the step: her Eq. (6) up, and down with the two times exchanged.

    x_t' = x_t + sqrt(abar') [ (sqrt(1/abar) - sqrt(1/abar')) x_t + (sqrt(1/abar' - 1) - sqrt(1/abar - 1)) eps_hat ]
    """

    def move(x, eps, t, t_next):
        now, then = (ABAR[i] if i >= 0 else 1.0 for i in (t, t_next))
        slope = math.sqrt(1 / then - 1) - math.sqrt(1 / now - 1)
        return x + math.sqrt(then) * ((math.sqrt(1 / now) - math.sqrt(1 / then)) * x + slope * eps)

    x, y_0, t = x_0.double(), torch.zeros(len(x_0), dtype=torch.long), -1
    visited = []
    while t < noise_level:
        visited.append(t)
        t_next = min(t + stride, noise_level)
        x = move(x, network(x, torch.full_like(y_0, max(t, 0)), y_0), t, t_next)
        t = t_next
    for t_next in visited[::-1]:
        now = torch.full_like(y_0, t)
        eps = network(x, now, y_0) - s * math.sqrt(1 - ABAR[t]) * network.log_p_gradient(x, now, 0)
        x = move(x, eps, t, t_next)
        t = t_next
    return x


# ---- the algorithm


@pytest.mark.parametrize("s", [0, 5, 100])
@pytest.mark.parametrize(("noise_level", "stride"), [(1, 1), (60, 1), (60, 7), (400, 25), (999, 100)])
def test_equals_the_slow_transcription(noise_level, stride, s):
    x_0 = images()
    run = method(noise_level, guidance_scale=s, stride=stride)
    xhat = run.reconstruct(x_0, oracle())
    expected = cg_diff(x_0, oracle(), noise_level, s, stride)
    torch.testing.assert_close(xhat.double(), expected, rtol=1e-4, atol=1e-4)
    maps = run(x_0, oracle(), SLICES)
    assert maps.shape == x_0.shape and maps.dtype == xhat.dtype == torch.float32
    torch.testing.assert_close(maps.double(), (x_0 - expected).abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("noise_level", "stride", "up", "down"),
    [
        (3, 1, [0, 0, 1, 2], [3, 2, 1, 0]),  # from clean, asked at index 0, to index 0, 1, 2 and 3; then back
        (7, 3, [0, 2, 5], [7, 5, 2]),  # -1 -> 2 -> 5 -> 7: the last step up is shorter
        (8, 3, [0, 2, 5], [8, 5, 2]),  # -1 -> 2 -> 5 -> 8
        (9, 9, [0, 8], [9, 8]),
    ],
)
def test_visits_every_stride_th_index_up_to_l_and_back(noise_level, stride, up, down):
    network = oracle()
    method(noise_level, stride=stride)(images()[:2], network, SLICES[:2])
    assert [(t, y) for t, y, *_ in network.calls] == [([t, t], [0, 0]) for t in up + down]  # healthy both ways
    assert network.classified == [[t, t] for t in down]  # no guidance on the way up
    assert len(network.calls) == 2 * math.ceil((noise_level + 1) / stride)


def test_encodes_to_the_noise_that_the_probability_flow_leads_to():
    network, x_0 = oracle(), images()
    method(400, guidance_scale=0).reconstruct(x_0, network)
    latent = network.inputs[401]  # calls 0..400 lead up to L = 400; the next one, the first of decoding, is asked at L
    assert network.calls[401][0] == [400] * 3
    variance = ABAR[400] * SIGMA**2 + 1 - ABAR[400]
    expected = math.sqrt(ABAR[400]) * MU_0 + math.sqrt(variance) * (x_0 - MU_0) / SIGMA
    torch.testing.assert_close(latent.double(), expected, rtol=0.02, atol=0.02)  # 401 Euler steps


def test_without_guidance_the_slice_comes_back_and_worse_with_longer_steps():
    x_0 = images()
    errors = [
        method(400, guidance_scale=0, stride=k)(x_0, oracle(), SLICES).square().mean().sqrt().item() for k in (1, 4, 16)
    ]
    # Euler there and back: the error is of the first order in the step, and small against SIGMA = 0.3
    assert errors[0] < 0.01
    assert 2 < errors[1] / errors[0] < 8 and 2 < errors[2] / errors[1] < 8


@pytest.mark.parametrize("stride", [1, 10])
def test_guidance_takes_the_target_out_and_leaves_the_rest(stride):
    x_0, inside = images(), TARGET.expand(3, -1, -1, -1)
    difference = x_0 - method(400, guidance_scale=100, stride=stride).reconstruct(x_0, oracle())
    assert (difference[inside] > 0.1).all()  # y1 brightens the target by 0.4, healthy is darker
    assert difference[inside].min() > 5 * difference[~inside].abs().max()
    # elsewhere the classes are the same and the guidance is 0: only the round trip's own error is left
    unguided = x_0 - method(400, guidance_scale=0, stride=stride).reconstruct(x_0, oracle())
    torch.testing.assert_close(difference[~inside], unguided[~inside], rtol=0, atol=1e-5)


def test_more_guidance_takes_out_more_and_none_asks_no_classifier():
    x_0, inside, network = images(), TARGET.expand(3, -1, -1, -1), oracle()
    none = method(400, guidance_scale=0, stride=10)(x_0, network, SLICES)
    assert network.classified == []
    some, more = (method(400, guidance_scale=s, stride=10)(x_0, network, SLICES) for s in (1, 10))
    assert none[inside].mean() < some[inside].mean() < more[inside].mean()


def test_the_stride_does_not_change_what_s_means():
    """A step k times as long moves k times as far along the gradient, so that a coarse path is near the fine one."""
    x_0, inside = images(), TARGET.expand(3, -1, -1, -1)
    fine, coarse = (method(400, guidance_scale=1, stride=k)(x_0, oracle(), SLICES)[inside].mean() for k in (1, 10))
    torch.testing.assert_close(fine, coarse, rtol=0.1, atol=0)


# ---- batches, precision and context


def test_batch_size_and_slice_numbers_do_not_matter():
    network, x_0 = tiny_network(), images()
    run = method(100, stride=20)
    together = run(x_0, network, SLICES)
    alone = torch.cat([run(x_0[i : i + 1], network, [0]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.max() > 1e-2  # or the comparison would be of zeros


def test_nothing_is_drawn():
    x_0, run = images(), method(20, stride=5)
    state = torch.random.get_rng_state()
    first = run(x_0, oracle(), SLICES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(run(x_0, oracle(), SLICES), first)


def test_contexts_outside_change_nothing():
    x_0, run, network = images(), method(20, stride=5, amp=False), oracle()
    plain = run(x_0, oracle(), SLICES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # as inside MONAI's evaluator
        inside = run(x_0, network, SLICES)
    assert torch.equal(inside, plain)
    assert {call[2:] for call in network.calls} == {(torch.float32, False)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_computed_in_float32(dtype):
    x_0, run = images().half().to(dtype), method(20, stride=5)  # the same numbers in every type
    maps = run(x_0, oracle(), SLICES)
    assert maps.dtype == torch.float32 and torch.equal(maps, run(x_0.float(), oracle(), SLICES))


def test_leaves_no_gradient_and_no_change_behind():
    network, x_0 = tiny_network(), images()  # weights that require gradients
    before = x_0.clone()
    maps = method(8, stride=3)(x_0, network, SLICES)
    assert not maps.requires_grad and not x_0.requires_grad and torch.equal(x_0, before)
    assert all(parameter.grad is None for parameter in network.parameters())
