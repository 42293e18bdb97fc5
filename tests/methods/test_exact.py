"""The exact derivative against the limit of the finite difference."""

from __future__ import annotations

import pytest
import torch

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import slice_noise
from custom_modules.methods.guidance import classifier_gradient
from tests.helpers.gaussian import SLICES, cdm, pictures
from tests.helpers.tiny_network import tiny_network


@torch.no_grad()
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
    network, x_0 = tiny_network(), pictures()
    settings = {"noise_level": 300, "num_steps": num_steps, "guidance_scale": s, "tau": 0.9, "amp": False}
    maps = cdm(derivative="exact", **settings)(x_0, network, SLICES)
    expected = exact_map_by_differences(network, x_0, 300, num_steps, s, tau=0.9).float()
    torch.testing.assert_close(maps, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


def test_exact_keeps_its_digits_in_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    network, x_0 = tiny_network(), pictures()
    settings = {"noise_level": 300, "num_steps": 1, "tau": 0.95}
    exact = cdm(derivative="exact", amp=False, **settings)(x_0, network, SLICES)
    in_bf16 = cdm(derivative="exact", **settings)(x_0, network, SLICES)
    assert not torch.equal(in_bf16, exact)
    assert torch.nn.functional.cosine_similarity(in_bf16.flatten(1), exact.flatten(1)).min() > 0.999
