"""Algorithm 1 against a slow transcription of it, on Gaussian data where everything is known in closed form.

The prediction is linear in a soft label, so the finite difference is exact, and the map of one step has the analytic
value derived in `one_step_map`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import CDM, slice_noise
from tests.helpers.gaussian import ABAR, MU_0, MU_1, SIGMA, SLICES, Gaussian, cdm, pictures


def ddim_step(x_t: torch.Tensor, eps: torch.Tensor, t: int) -> torch.Tensor:
    """Eq. (5), from the table of this file."""
    abar, abar_prev = ABAR[t], ABAR[t - 1] if t > 0 else 1.0
    x_0 = (x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    return math.sqrt(abar_prev) * x_0 + math.sqrt(1 - abar_prev) * eps


def algorithm_1(x_0, eps, network: Gaussian, levels, num_steps: int, tau: float, s: float) -> torch.Tensor:
    """The map (1, 1, H, W) of one slice `x_0` in float64, with noise `eps` a draw; two calls a step, one after another.

    f(y1) and tau f(y1) + (1 - tau) f(y0) enter as weights over the classes (w_0, w_1).
    """
    maps = []
    for noise_level in levels:
        for noise in eps:
            x = math.sqrt(ABAR[noise_level]) * x_0 + math.sqrt(1 - ABAR[noise_level]) * noise
            x_prime, a = x.clone(), torch.zeros_like(x_0)
            for t in range(noise_level, noise_level - num_steps, -1):
                steps = []
                for x_t, weights, y in ((x, [0.0, 1.0], 1), (x_prime, [1 - tau, tau], 0)):
                    at = torch.tensor([t])
                    prediction = network(x_t, at, torch.tensor([weights], dtype=torch.float64))
                    prediction = prediction - s * math.sqrt(1 - ABAR[t]) * network.log_p_gradient(x_t, at, y)
                    steps.append(ddim_step(x_t, prediction, t))
                x, x_prime = steps
                a += (x - x_prime) / (1 - tau)
            maps.append(a)
    return sum(maps) / len(maps)


def one_step_map(t: int, tau: float, s: float = 0.0) -> torch.Tensor:
    """The closed form of the map of one step, (1, 1, H, W) float64.

    x_{t-1} depends on the prediction with slope c = sqrt(1 - abar') - sqrt(abar') sqrt(1 - abar) / sqrt(abar), the
    prediction on the mean with slope -sqrt(1 - abar) sqrt(abar) / V, and mu_1 - (tau mu_1 + (1 - tau) mu_0) is
    (1 - tau) (mu_1 - mu_0): tau cancels, and the map is the derivative. The two guidance terms differ by
    s sqrt(1 - abar) sqrt(abar) (mu_1 - mu_0) / V whatever x_t, since the p of the two classes add up to 1.
    """
    abar, abar_prev = ABAR[t], ABAR[t - 1] if t > 0 else 1.0
    variance = abar * SIGMA**2 + 1 - abar
    c = math.sqrt(1 - abar_prev) - math.sqrt(abar_prev) * math.sqrt(1 - abar) / math.sqrt(abar)
    slope = -c * math.sqrt(1 - abar) * math.sqrt(abar) / variance
    return slope * (1 + s / (1 - tau)) * (MU_1 - MU_0).double()


# ---- the algorithm


@pytest.mark.parametrize("s", [0, 10])
@pytest.mark.parametrize(("levels", "num_steps", "num_draws", "tau"), [([400], 10, 1, 0.95), ([300, 20], 4, 2, 0.5)])
def test_equals_the_slow_transcription(levels, num_steps, num_draws, tau, s):
    network, x_0 = Gaussian(), pictures()
    settings = {"num_steps": num_steps, "num_draws": num_draws, "tau": tau, "guidance_scale": s, "seed": 3}
    maps = cdm(noise_level=levels, **settings)(x_0, network, SLICES)
    assert maps.shape == x_0.shape and maps.dtype == torch.float32
    for i, index in enumerate(SLICES):
        eps = [slice_noise(x_0[:1], 3, draw, [index]).double() for draw in range(num_draws)]
        expected = algorithm_1(x_0[i : i + 1].double(), eps, network, levels, num_steps, tau, s)
        # float32 keeps 1e-7 of values near 1, divided by 1 - tau = 0.05 and summed over 10 steps: some 1e-5
        torch.testing.assert_close(maps[i : i + 1].double(), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("noise_level", [1, 50, 400, 999])
def test_one_step_is_the_analytic_derivative(noise_level, tau):
    maps = cdm(noise_level=noise_level, num_steps=1, tau=tau)(pictures(), Gaussian(), SLICES)
    expected = one_step_map(noise_level, tau).expand(3, -1, -1, -1)  # the same for every slice and every noise
    torch.testing.assert_close(maps.double(), expected, rtol=1e-3, atol=1e-5 / (1 - tau))


@pytest.mark.parametrize("s", [1, 10, 100])
def test_one_guided_step_in_closed_form(s):
    maps = cdm(num_steps=1, guidance_scale=s)(pictures(), Gaussian(), SLICES)
    torch.testing.assert_close(maps.double(), one_step_map(400, 0.95, s).expand(3, -1, -1, -1), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("s", [0, 10])
def test_positive_where_the_target_brightens(s):
    maps = cdm(guidance_scale=s)(pictures(), Gaussian(), SLICES)
    difference = (MU_1 - MU_0).expand_as(maps)
    assert (maps[difference > 0] > 0.01).all()
    assert (maps[difference < 0] < -0.001).all()
    assert maps[difference == 0].abs().max() < 5e-4


@pytest.mark.parametrize("s", [0, 10])
def test_identical_conditions_give_zero(s):
    maps = cdm(guidance_scale=s)(pictures(), Gaussian(MU_0, MU_0), SLICES)
    assert maps.abs().max() < 1e-4  # rounding of the mixture 0.05 + 0.95, over 1 - tau


def test_scale_zero_is_cdm():
    x_0 = pictures()
    assert torch.equal(cdm(guidance_scale=0)(x_0, Gaussian(), SLICES), cdm()(x_0, Gaussian(), SLICES))


def test_visits_q_down_to_q_minus_r_plus_1_with_both_conditions():
    network = Gaussian()
    cdm(noise_level=7, num_steps=7)(pictures()[:1], network, [0])
    assert [t for t, *_ in network.calls] == [[t, t] for t in (7, 6, 5, 4, 3, 2, 1)]
    for _, weights, *_ in network.calls:
        np.testing.assert_allclose(weights, [[0, 1], [0.05, 0.95]], atol=1e-7)


def test_alpha_bar_of_the_defaults():
    assert ABAR[400] == pytest.approx(0.194, abs=5e-4)  # the paper's Q
    np.testing.assert_allclose(Diffusion().alphas_cumprod, ABAR, rtol=1e-5)


# ---- precision and context


@pytest.mark.parametrize(
    ("settings", "bf16"),
    [
        ({"tau": 0.95}, False),  # the difference of near numbers, divided by 0.05
        ({"tau": 0.0, "amp": False}, False),
        ({"tau": 0.0}, True),
        ({"tau": CDM.MAX_TAU_BF16}, True),
    ],
)
def test_bf16_where_no_digits_are_lost(monkeypatch, settings, bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    network = Gaussian()
    maps = cdm(guidance_scale=10, **settings)(pictures(), network, SLICES)
    assert {autocast for *_, autocast in network.calls} == {bf16} and maps.dtype == torch.float32


def test_autocast_outside_changes_nothing():
    x_0, run = pictures(), cdm(guidance_scale=10)
    plain = run(x_0, Gaussian(), SLICES)
    network = Gaussian()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(x_0, network, SLICES)
    assert torch.equal(inside, plain) and inside.dtype == torch.float32
    assert {(dtype, autocast) for *_, dtype, autocast in network.calls} == {(torch.float32, False)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_computed_in_float32(dtype):
    x_0 = pictures().half().to(dtype)  # the same numbers in every type
    maps = cdm()(x_0, Gaussian(), SLICES)
    assert torch.equal(maps, cdm()(x_0.float(), Gaussian(), SLICES)) and maps.dtype == torch.float32


def test_leaves_no_gradient_and_no_change_behind():
    x_0 = pictures()
    before = x_0.clone()
    maps = cdm(guidance_scale=10)(x_0, Gaussian(), SLICES)
    assert not maps.requires_grad and not x_0.requires_grad
    assert torch.equal(x_0, before)
