"""Noise: draws and levels are averaged, pairs of draws kept apart, and a seed decides for every slice by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from custom_modules.methods.cdm import slice_noise
from tests.helpers.gaussian import SIZE, SLICES, Gaussian, cdm, pictures
from tests.helpers.tiny_network import tiny_network


def test_levels_and_draws_are_averaged():
    x_0, network = pictures(), Gaussian()
    both = cdm(noise_level=[400, 100])(x_0, network, SLICES)
    apart = [cdm(noise_level=q)(x_0, network, SLICES) for q in (400, 100)]
    torch.testing.assert_close(both, sum(apart) / 2)
    one, two, four = (cdm(num_draws=n)(x_0, tiny_network(), SLICES) for n in (1, 2, 4))
    assert not torch.allclose(one, two, rtol=1e-2) and not torch.allclose(two, four, rtol=1e-2)


@pytest.mark.parametrize("levels", [400, [400, 100]])
@pytest.mark.parametrize(("num_draws", "derivative"), [(4, "exact"), (8, "finite_difference")])
def test_draws_that_are_kept_have_the_ordinary_map_as_their_mean(num_draws, derivative, levels):
    x_0, network = pictures(), tiny_network()
    settings = {"noise_level": levels, "num_steps": 1, "num_draws": num_draws, "derivative": derivative}
    plain, kept = (cdm(uncertainty=keep, **settings)(x_0, network, SLICES) for keep in (False, True))
    assert plain.shape == x_0.shape and kept.shape == (3, num_draws // 2, SIZE, SIZE)
    torch.testing.assert_close(kept.mean(dim=1, keepdim=True), plain)


@pytest.mark.parametrize("num_draws", [1, 2])
def test_one_pair_of_draws_has_no_spread(num_draws):
    with pytest.raises(ValueError, match=rf"uncertainty needs .* num_draws >= 3; got {num_draws}"):
        cdm(num_draws=num_draws, uncertainty=True)


def test_pairs_of_draws_are_kept_apart_and_a_last_one_alone():
    x_0, network = pictures(), tiny_network()
    kept = cdm(num_draws=5, uncertainty=True)(x_0, network, SLICES)
    # of five draws the first two are the map of two, the first four twice the mean of two pairs, and the fifth is alone
    two, four, five = (cdm(num_draws=n)(x_0, network, SLICES) for n in (2, 4, 5))
    expected = torch.cat([two, 2 * four - two, 5 * five - 4 * four], dim=1)
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert kept.shape == (3, 3, SIZE, SIZE) and kept.std(dim=1).mean() > 0.01 * kept.abs().mean()


@pytest.mark.parametrize("s", [0, 10])
def test_batch_size_and_order_do_not_matter(s):
    x_0, network, run = pictures(), Gaussian(), cdm(guidance_scale=s, num_draws=2)
    together = run(x_0, network, SLICES)
    alone = torch.cat([run(x_0[i : i + 1], network, [index]) for i, index in enumerate(SLICES)])
    backwards = run(x_0.flip(0), network, SLICES[::-1]).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-5)
    torch.testing.assert_close(together, backwards, rtol=0, atol=5e-5)


def test_the_seed_decides():
    x_0, network = pictures(), Gaussian()
    torch.manual_seed(1)
    first = cdm(guidance_scale=10, seed=4)(x_0, network, SLICES)
    torch.manual_seed(2)  # the global generator is not used
    assert torch.equal(first, cdm(guidance_scale=10, seed=4)(x_0, network, SLICES))
    assert not torch.allclose(first, cdm(guidance_scale=10, seed=5)(x_0, network, SLICES), rtol=1e-3)


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
