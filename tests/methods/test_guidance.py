"""Classifier guidance: its gradient by formula, and what it takes off each prediction."""

from __future__ import annotations

import math

import torch

from custom_modules.diffusion import Diffusion
from custom_modules.methods.guidance import ClassifierGuidance, ConditionalDenoiser, classifier_gradient
from tests.helpers.gaussian import ABAR, Gaussian, pictures


def test_classifier_gradient_by_its_formula():
    network, x_t = Gaussian(), pictures()
    t = torch.tensor([400, 10, 0])
    with torch.no_grad():  # as inside MONAI's evaluator
        gradients = classifier_gradient(network, x_t, t)
    for y, gradient in enumerate(gradients):
        expected = [network.log_p_gradient(x_t[i : i + 1].double(), t[i : i + 1], y) for i in range(3)]
        torch.testing.assert_close(gradient.double(), torch.cat(expected), rtol=1e-4, atol=1e-6)
    assert not x_t.requires_grad


def test_each_trajectory_is_led_towards_its_class():
    network, x, x_prime, s = Gaussian(), pictures(), pictures().flip(0), 3.0
    plain = ConditionalDenoiser(network, torch.tensor([1, 0]))
    guided = ClassifierGuidance(plain, network, Diffusion(), s, towards=(1, 0))
    t = torch.tensor([400])
    for x_t, y, eps_hat, eps in zip((x, x_prime), (1, 0), plain([x, x_prime], 400), guided([x, x_prime], 400)):
        gradient = torch.cat([network.log_p_gradient(x_t[i : i + 1].double(), t, y) for i in range(len(x_t))])
        expected = eps_hat.double() - s * math.sqrt(1 - ABAR[400]) * gradient
        torch.testing.assert_close(eps.double(), expected, rtol=1e-4, atol=1e-5)


def test_one_gradient_serves_two_trajectories_that_are_still_one():
    network, x = Gaussian(), pictures()
    guided = ClassifierGuidance(
        ConditionalDenoiser(network, torch.tensor([1, 0])), network, Diffusion(), 3.0, towards=(1, 0)
    )
    once, twice = guided([x, x], 400), guided([x, x.clone()], 400)
    assert [len(t) for t in network.classified] == [len(x), 2 * len(x)]
    torch.testing.assert_close(once, twice)
