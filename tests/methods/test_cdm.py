"""Algorithm 1 against a slow transcription of it, on pixelwise Gaussian data where everything is known in closed form.

The data: x_0 | y ~ N(mu_y, SIGMA^2) in every pixel, both classes equally likely. Then x_t | y is Gaussian with mean
sqrt(abar) mu_y and variance V = abar SIGMA^2 + 1 - abar, and

    E[eps | x_t, y]    = sqrt(1 - abar) (x_t - sqrt(abar) mu_y) / V
    grad log p(y | x_t) = (1 - p(y | x_t)) sqrt(abar) (mu_y - mu_other) / V

A soft label takes the mixture of the means; the prediction is linear in it, so the finite difference is exact and
the map of one step has the analytic value derived in `one_step_map`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import CDM, MAX_TAU_BF16, slice_noise
from custom_modules.methods.exact import build_cdm
from custom_modules.methods.guidance import classifier_gradient
from custom_modules.methods.intensity import IntensityFloor
from tests.helpers.tiny_network import tiny_network

SIZE, SIGMA = 8, 0.3
SLICES = [5, 0, 17]
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # linear beta, in float64 and apart from MONAI's table
DIFFUSION = Diffusion()


def blob(height: float) -> torch.Tensor:
    """A 2 x 3 blob, (1, 1, 8, 8)."""
    mean = torch.zeros(1, 1, SIZE, SIZE)
    mean[..., 2:4, 3:6] = height
    return mean


MU_0 = torch.linspace(-0.5, 0.5, SIZE).expand(1, 1, SIZE, SIZE)
MU_1 = MU_0 + blob(0.4) - 0.1 * blob(1).flip(-2)  # y1 brightens one region and darkens another


class Gaussian(nn.Module):
    """E[eps | x_t, y] and p(y | x_t) of the data above; remembers how it was called."""

    def __init__(self, mu_0: torch.Tensor = MU_0, mu_1: torch.Tensor = MU_1) -> None:
        super().__init__()
        self.mu = torch.cat([mu_0, mu_1]).double()  # (2, 1, H, W)
        self.abar = torch.from_numpy(ABAR)
        self.calls: list[tuple] = []

    def moments(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        abar = self.abar[t].view(-1, 1, 1, 1)
        return abar.to(like), (abar * SIGMA**2 + 1 - abar).to(like)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        self.calls.append((x.dtype, torch.is_autocast_enabled("cpu"), timesteps.tolist(), class_labels.tolist()))
        abar, variance = self.moments(timesteps, x)
        mean = torch.einsum("bk,kchw->bchw", class_labels.double(), self.mu).to(x)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / variance

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        abar, variance = self.moments(timesteps, x)
        square = (x[:, None] - abar[:, None].sqrt() * self.mu.to(x)) ** 2 / (2 * variance[:, None])
        return -square.sum(dim=(2, 3, 4))

    def log_p_gradient(self, x: torch.Tensor, t: int, y: int) -> torch.Tensor:
        """grad log p(y | x_t) (1, 1, H, W) by its formula, without autograd."""
        abar, variance = self.moments(torch.tensor([t]), x)
        p = self.classify(x, torch.tensor([t])).softmax(dim=1)[0, y]
        return (1 - p) * abar.sqrt() * (self.mu[y] - self.mu[1 - y]) / variance


def images(seed: int = 0) -> torch.Tensor:
    """One noisy picture of class 1 for each of `SLICES`, (3, 1, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return MU_1 + SIGMA * torch.randn(len(SLICES), 1, SIZE, SIZE, generator=generator)


def method(**settings) -> CDM:
    return build_cdm(DIFFUSION, **{"noise_level": 400, "num_steps": 10, **settings})


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
                    prediction = network(x_t, torch.tensor([t]), torch.tensor([weights], dtype=torch.float64))
                    prediction = prediction - s * math.sqrt(1 - ABAR[t]) * network.log_p_gradient(x_t, t, y)
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
    network, x_0 = Gaussian(), images()
    settings = {"num_steps": num_steps, "num_draws": num_draws, "tau": tau, "guidance_scale": s, "seed": 3}
    maps = method(noise_level=levels, **settings)(x_0, network, SLICES)
    assert maps.shape == x_0.shape and maps.dtype == torch.float32
    for i, index in enumerate(SLICES):
        eps = [slice_noise(x_0[:1], 3, draw, [index]).double() for draw in range(num_draws)]
        expected = algorithm_1(x_0[i : i + 1].double(), eps, network, levels, num_steps, tau, s)
        # float32 keeps 1e-7 of values near 1, divided by 1 - tau = 0.05 and summed over 10 steps: some 1e-5
        torch.testing.assert_close(maps[i : i + 1].double(), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("noise_level", [1, 50, 400, 999])
def test_one_step_is_the_analytic_derivative(noise_level, tau):
    maps = method(noise_level=noise_level, num_steps=1, tau=tau)(images(), Gaussian(), SLICES)
    expected = one_step_map(noise_level, tau).expand(3, -1, -1, -1)  # the same for every slice and every noise
    torch.testing.assert_close(maps.double(), expected, rtol=1e-3, atol=1e-5 / (1 - tau))


@pytest.mark.parametrize("s", [1, 10, 100])
def test_one_guided_step_in_closed_form(s):
    maps = method(num_steps=1, guidance_scale=s)(images(), Gaussian(), SLICES)
    torch.testing.assert_close(maps.double(), one_step_map(400, 0.95, s).expand(3, -1, -1, -1), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("s", [0, 10])
def test_positive_where_the_target_brightens(s):
    maps = method(guidance_scale=s)(images(), Gaussian(), SLICES)
    difference = (MU_1 - MU_0).expand_as(maps)
    assert (maps[difference > 0] > 0.01).all()
    assert (maps[difference < 0] < -0.001).all()
    assert maps[difference == 0].abs().max() < 5e-4


@pytest.mark.parametrize("s", [0, 10])
def test_identical_conditions_give_zero(s):
    maps = method(guidance_scale=s)(images(), Gaussian(MU_0, MU_0), SLICES)
    assert maps.abs().max() < 1e-4  # rounding of the mixture 0.05 + 0.95, over 1 - tau


def test_scale_zero_is_cdm():
    x_0 = images()
    assert torch.equal(method(guidance_scale=0)(x_0, Gaussian(), SLICES), method()(x_0, Gaussian(), SLICES))


def test_visits_q_down_to_q_minus_r_plus_1_with_both_conditions():
    network = Gaussian()
    method(noise_level=7, num_steps=7)(images()[:1], network, [0])
    assert [t for _, _, t, _ in network.calls] == [[t, t] for t in (7, 6, 5, 4, 3, 2, 1)]
    for *_, weights in network.calls:
        np.testing.assert_allclose(weights, [[0, 1], [0.05, 0.95]], atol=1e-7)


def test_classifier_gradient_by_its_formula():
    network, x_t = Gaussian(), images()
    t = torch.tensor([400, 10, 0])
    with torch.no_grad():  # as inside MONAI's evaluator
        gradients = classifier_gradient(network, x_t, t)
    for y, gradient in enumerate(gradients):
        expected = [network.log_p_gradient(x_t[i : i + 1].double(), int(t[i]), y) for i in range(3)]
        torch.testing.assert_close(gradient.double(), torch.cat(expected), rtol=1e-4, atol=1e-6)
    assert not x_t.requires_grad


# ---- averaging and randomness


def test_levels_and_draws_are_averaged():
    x_0, network = images(), Gaussian()
    both = method(noise_level=[400, 100])(x_0, network, SLICES)
    apart = [method(noise_level=q)(x_0, network, SLICES) for q in (400, 100)]
    torch.testing.assert_close(both, sum(apart) / 2)
    one, two, four = (method(num_draws=n)(x_0, tiny_network(), SLICES) for n in (1, 2, 4))
    assert not torch.allclose(one, two, rtol=1e-2) and not torch.allclose(two, four, rtol=1e-2)


@pytest.mark.parametrize("levels", [400, [400, 100]])
@pytest.mark.parametrize(("num_draws", "derivative"), [(4, "exact"), (8, "finite_difference")])
def test_draws_that_are_kept_have_the_ordinary_map_as_their_mean(num_draws, derivative, levels):
    x_0, network = images(), tiny_network()
    settings = {"noise_level": levels, "num_steps": 1, "num_draws": num_draws, "derivative": derivative}
    plain, kept = (method(uncertainty=keep, **settings)(x_0, network, SLICES) for keep in (False, True))
    assert plain.shape == x_0.shape and kept.shape == (3, num_draws // 2, SIZE, SIZE)
    torch.testing.assert_close(kept.mean(dim=1, keepdim=True), plain)


@pytest.mark.parametrize("num_draws", [1, 2])
def test_one_pair_of_draws_has_no_spread(num_draws):
    with pytest.raises(ValueError, match=rf"uncertainty needs .* num_draws >= 3; got {num_draws}"):
        method(num_draws=num_draws, uncertainty=True)


def test_pairs_of_draws_are_kept_apart_and_a_last_one_alone():
    x_0, network = images(), tiny_network()
    kept = method(num_draws=5, uncertainty=True)(x_0, network, SLICES)
    # of five draws the first two are the map of two, the first four twice the mean of two pairs, and the fifth is alone
    two, four, five = (method(num_draws=n)(x_0, network, SLICES) for n in (2, 4, 5))
    expected = torch.cat([two, 2 * four - two, 5 * five - 4 * four], dim=1)
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert kept.shape == (3, 3, SIZE, SIZE) and kept.std(dim=1).mean() > 0.01 * kept.abs().mean()


@pytest.mark.parametrize("s", [0, 10])
def test_batch_size_and_order_do_not_matter(s):
    x_0, network, run = images(), Gaussian(), method(guidance_scale=s, num_draws=2)
    together = run(x_0, network, SLICES)
    alone = torch.cat([run(x_0[i : i + 1], network, [index]) for i, index in enumerate(SLICES)])
    backwards = run(x_0.flip(0), network, SLICES[::-1]).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-5)
    torch.testing.assert_close(together, backwards, rtol=0, atol=5e-5)


def test_the_seed_decides():
    x_0, network = images(), Gaussian()
    torch.manual_seed(1)
    first = method(guidance_scale=10, seed=4)(x_0, network, SLICES)
    torch.manual_seed(2)  # the global generator has no say
    assert torch.equal(first, method(guidance_scale=10, seed=4)(x_0, network, SLICES))
    assert not torch.allclose(first, method(guidance_scale=10, seed=5)(x_0, network, SLICES), rtol=1e-3)


def test_noise_differs_between_seeds_draws_and_slices():
    like = torch.zeros(2, 1, 64, 64)
    noise = [slice_noise(like, seed, draw, [0, 1]) for seed in (0, 1, 2**32 - 1) for draw in (0, 2)]
    noise = torch.cat(noise).flatten(1)
    # 12 independent samples of 4096 numbers: correlations and means are of the order 1 / sqrt(4096) = 0.016
    np.testing.assert_allclose(np.corrcoef(noise), np.eye(12), atol=0.08)
    np.testing.assert_allclose(noise.mean(dim=1), 0, atol=0.08)
    np.testing.assert_allclose(noise.std(dim=1), 1, atol=0.08)


def test_draws_come_in_antithetic_pairs():
    noise = [slice_noise(torch.zeros(1, 1, 8, 8), 0, draw, [0]) for draw in range(4)]
    assert torch.equal(noise[1], -noise[0]) and torch.equal(noise[3], -noise[2])


# ---- precision and context


def with_bf16_units(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})


def precisions(network: Gaussian) -> set[bool]:
    """Whether bf16 was open when the network was called."""
    return {autocast for _, autocast, *_ in network.calls}


@pytest.mark.parametrize(
    ("settings", "bf16"),
    [
        ({"tau": 0.95}, False),  # the difference of near numbers, divided by 0.05
        ({"tau": 0.0, "amp": False}, False),
        ({"tau": 0.0}, True),
        ({"tau": MAX_TAU_BF16}, True),
    ],
)
def test_bf16_where_no_digits_are_lost(monkeypatch, settings, bf16):
    with_bf16_units(monkeypatch)
    network = Gaussian()
    maps = method(guidance_scale=10, **settings)(images(), network, SLICES)
    assert precisions(network) == {bf16} and maps.dtype == torch.float32


def test_autocast_outside_changes_nothing():
    x_0, run = images(), method(guidance_scale=10)
    plain = run(x_0, Gaussian(), SLICES)
    network = Gaussian()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(x_0, network, SLICES)
    assert torch.equal(inside, plain) and inside.dtype == torch.float32
    assert {(dtype, autocast) for dtype, autocast, *_ in network.calls} == {(torch.float32, False)}


# ---- the exact derivative


def exact_map_by_differences(network, x_0, noise_level: int, num_steps: int, s: float, tau: float) -> torch.Tensor:
    """The limit tau -> 1 in float64, with the weight of the guidance kept at s / (1 - tau)."""
    near = 1 - 1e-5
    network, diffusion = network.double(), Diffusion().double()
    maps = []
    for i, index in enumerate(SLICES):
        t = torch.tensor([noise_level])
        noise = slice_noise(x_0[:1], 0, 0, [index])
        x = x_prime = diffusion.add_noise(x_0[i : i + 1].double(), noise.double(), t)
        a = torch.zeros_like(x)
        for _ in range(num_steps):
            steps = []
            for x_t, weights, y in ((x, [0.0, 1.0], 1), (x_prime, [1 - near, near], 0)):
                eps = network(x_t, t, torch.tensor([weights], dtype=torch.float64))
                scale = s / (1 - tau) * (1 - near) * (1 - diffusion.alpha_bar(t, x_t)).sqrt()
                steps.append(diffusion.ddim_step(x_t, eps - scale * classifier_gradient(network, x_t, t)[y], t))
            x, x_prime = steps
            a += (x - x_prime) / (1 - near)
            t = t - 1
        maps.append(a)
    return torch.cat(maps)


@pytest.mark.parametrize(("num_steps", "s"), [(1, 0), (1, 0.3), (4, 0), (4, 0.3)])
def test_exact_is_the_limit_of_the_finite_difference(num_steps, s):
    network, x_0 = tiny_network(), images()
    settings = {"noise_level": 300, "num_steps": num_steps, "guidance_scale": s, "tau": 0.9, "amp": False}
    maps = method(derivative="exact", **settings)(x_0, network, SLICES)
    expected = exact_map_by_differences(network, x_0, 300, num_steps, s, tau=0.9).float()
    torch.testing.assert_close(maps, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


def test_exact_keeps_its_digits_in_bf16(monkeypatch):
    with_bf16_units(monkeypatch)
    network, x_0 = tiny_network(), images()
    settings = {"noise_level": 300, "num_steps": 1, "tau": 0.95}
    exact = method(derivative="exact", amp=False, **settings)(x_0, network, SLICES)
    in_bf16 = method(derivative="exact", **settings)(x_0, network, SLICES)
    assert not torch.equal(in_bf16, exact)
    assert torch.nn.functional.cosine_similarity(in_bf16.flatten(1), exact.flatten(1)).min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_computed_in_float32(dtype):
    x_0 = images().half().to(dtype)  # the same numbers in every type
    maps = method()(x_0, Gaussian(), SLICES)
    assert torch.equal(maps, method()(x_0.float(), Gaussian(), SLICES)) and maps.dtype == torch.float32


def test_leaves_no_gradient_and_no_change_behind():
    x_0 = images()
    before = x_0.clone()
    maps = method(guidance_scale=10)(x_0, Gaussian(), SLICES)
    assert not maps.requires_grad and not x_0.requires_grad
    assert torch.equal(x_0, before)


# ---- settings


def test_alpha_bar_of_the_defaults():
    assert ABAR[400] == pytest.approx(0.194, abs=5e-4)  # DESIGN, section 4
    np.testing.assert_allclose(DIFFUSION.alphas_cumprod, ABAR, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_level": 0}, r"noise_level \(Q\) must be an integer in 1\.\.999.*got 0"),
        ({"noise_level": 1000}, r"noise_level \(Q\).*1\.\.999.*got 1000"),
        ({"noise_level": 400.5}, r"noise_level \(Q\).*integer.*got 400\.5"),
        ({"noise_level": "high"}, r"noise_level \(Q\).*integer.*got high"),
        ({"noise_level": []}, r"noise_level \(Q\).*got \[\]"),
        ({"noise_level": [400, -1]}, r"noise_level \(Q\).*got \[400, -1\]"),
        ({"num_steps": 500}, r"num_steps \(R\) must be .*<= noise_level \(Q\); got R=500, Q=400"),
        ({"num_steps": 0}, r"num_steps \(R\) must be .*>= 1.*got R=0, Q=400"),
        ({"num_steps": 2.5}, r"num_steps \(R\) must be an integer.*got R=2\.5"),
        ({"noise_level": [400, 5]}, r"num_steps \(R\).*<= noise_level \(Q\); got R=10, Q=\[400, 5\]"),
        ({"num_draws": 0}, r"num_draws must be .*>= 1; got 0"),
        ({"num_draws": 1.5}, r"num_draws must be an integer.*got 1\.5"),
        ({"tau": 1}, r"tau must be in \[0, 1\).*got 1"),
        ({"tau": -0.1}, r"tau must be in \[0, 1\).*got -0\.1"),
        ({"guidance_scale": -1}, r"guidance_scale \(s\) must be >= 0; got -1"),
        ({"derivative": "exakt"}, r"derivative must be one of \[.*'finite_difference'.*\]; got 'exakt'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)


def test_intensity_floor_lifts_intensities_to_be_positive():
    x_0 = torch.tensor([-1.0, 0.0, 0.25, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    saliency = IntensityFloor()(x_0, None, [0])
    assert torch.equal(saliency, torch.tensor([0.0, 1.0, 1.25, 2.0]).view(1, 1, 2, 2))  # x + 1
    assert saliency.dtype == torch.float32
