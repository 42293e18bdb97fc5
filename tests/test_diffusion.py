"""The diffusion process against MONAI's scheduler, the paper and closed forms."""

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler

from custom_modules.diffusion import Diffusion


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def diffusion():
    return Diffusion()


@pytest.fixture
def scheduler():
    """With as many inference steps as training steps, its step is t -> t - 1."""
    scheduler = DDIMScheduler(1000, schedule="linear_beta", clip_sample=False, beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(num_inference_steps=1000)
    return scheduler


def test_alpha_bar_at_the_papers_noise_level(diffusion):
    # abar_400 = 0.194 for T = 1000 and linear beta; here by the product itself
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.cumprod(1 - betas, dim=0)[400].item()
    value = diffusion.alpha_bar(torch.tensor([400]), randn(1, 1, 4, 4))
    assert value.shape == (1, 1, 1, 1)
    assert value.item() == pytest.approx(0.194, abs=5e-4) and value.item() == pytest.approx(expected, rel=1e-5)


def test_noising_equals_monais(diffusion, scheduler):
    x_0, eps, t = randn(4, 1, 4, 4), randn(4, 1, 4, 4, seed=1), torch.tensor([0, 10, 400, 999])
    torch.testing.assert_close(diffusion.add_noise(x_0, eps, t), scheduler.add_noise(x_0, eps, t))


@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_step_equals_monais(diffusion, scheduler, t):
    x_t, eps_hat = randn(2, 1, 4, 4) * 3, randn(2, 1, 4, 4, seed=1)  # large, so that clipping would show
    expected, _ = scheduler.step(eps_hat, t, x_t, eta=0.0)
    torch.testing.assert_close(diffusion.ddim_step(x_t, eps_hat, torch.tensor([t, t])), expected)


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("t", [0, 4, 400, 989])
def test_steps_of_several_timesteps_down_and_up_equal_monais(diffusion, scheduler, t, k):
    scheduler.set_timesteps(1000 // k)  # MONAI's steps are T // num_inference_steps = k long
    x_t, eps_hat, ts = randn(2, 1, 4, 4) * 3, randn(2, 1, 4, 4, seed=1), torch.tensor([t, t])
    down, _ = scheduler.step(eps_hat, t, x_t, eta=0.0)  # below index 0 it takes abar = 1, as our index -1
    torch.testing.assert_close(diffusion.ddim_step(x_t, eps_hat, ts, (ts - k).clamp(min=-1)), down)
    up, _ = scheduler.reversed_step(eps_hat, t, x_t)
    torch.testing.assert_close(diffusion.ddim_step(x_t, eps_hat, ts, ts + k), up)


def test_a_step_up_from_the_clean_image_is_noising(diffusion):
    """At t = -1, x0_hat is the image itself and Eq. (5) becomes Eq. (2). MONAI's reversed_step(-1) would read the last
    entry of its table, so it is no reference here."""
    x_0, eps, t = randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1), torch.tensor([0, 400, 999])
    encoded = diffusion.ddim_step(x_0, eps, torch.full((3,), -1), t)
    torch.testing.assert_close(encoded, diffusion.add_noise(x_0, eps, t))


def test_a_batch_may_mix_timesteps(diffusion):
    x_t, eps_hat, t = randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1), torch.tensor([0, 7, 400])
    together = diffusion.ddim_step(x_t, eps_hat, t)
    alone = [diffusion.ddim_step(x_t[i : i + 1], eps_hat[i : i + 1], t[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_true_noise_leads_back_to_the_image(diffusion):
    """Eq. (5) inverts Eq. (2): with eps itself, t -> t - 1 gives x_{t-1} of the same eps, and t = 0 gives x_0."""
    x_0, eps, t = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1), torch.tensor([30, 30])
    x_t = diffusion.add_noise(x_0, eps, t)
    torch.testing.assert_close(diffusion.ddim_step(x_t, eps, t), diffusion.add_noise(x_0, eps, t - 1))
    for step in range(30, -1, -1):
        x_t = diffusion.ddim_step(x_t, eps, torch.full((2,), step))
    torch.testing.assert_close(x_t, x_0, rtol=1e-4, atol=1e-4)


def test_the_last_step_returns_the_estimate_of_the_image(diffusion):
    x_t, eps_hat, t = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1), torch.tensor([0])
    assert diffusion.alpha_bar(t - 1, x_t).item() == 1  # abar_{-1}
    # abar_0 = 1 - beta_0 = 0.9999
    torch.testing.assert_close(diffusion.ddim_step(x_t, eps_hat, t), (x_t - 0.0001**0.5 * eps_hat) / 0.9999**0.5)


def test_an_analytic_denoiser_keeps_a_gaussian_gaussian(diffusion):
    """For x_0 ~ N(0, s^2), E[eps | x_t] = sqrt(1 - abar) x_t / (abar s^2 + 1 - abar), and the probability flow, which
    DDIM integrates, scales x from one marginal's standard deviation to the next."""
    s, x_t = 0.5, randn(1, 1, 8, 8)

    def std(t):
        alpha_bar = diffusion.alpha_bar(torch.tensor([t]), x_t).item()
        return (alpha_bar * s**2 + 1 - alpha_bar) ** 0.5

    x = x_t * std(400)
    for t in range(400, -1, -1):
        noise_std = (1 - diffusion.alpha_bar(torch.tensor([t]), x_t)).sqrt()
        x = diffusion.ddim_step(x, noise_std * x / std(t) ** 2, torch.tensor([t]))
    torch.testing.assert_close(x, s * x_t, rtol=0.02, atol=0)  # 401 Euler steps


def test_the_tables_follow_the_images_to_their_device():
    x = torch.empty(2, 1, 4, 4, device="meta")  # tensors without data, on a device of their own
    t = torch.tensor([5, 9], device="meta")
    diffusion = Diffusion()
    assert diffusion.add_noise(x, x, 7).device.type == diffusion.ddim_step(x, x, t).device.type == "meta"
    assert diffusion.alphas_cumprod.device.type == "cpu"


def test_half_precision_leaves_the_tables_alone(diffusion):
    before = diffusion.alphas_cumprod.clone()
    x_0, eps, t = randn(1, 1, 4, 4).half(), randn(1, 1, 4, 4, seed=1).half(), torch.tensor([400])
    assert diffusion.add_noise(x_0, eps, t).dtype == torch.float32  # the tables' precision wins
    assert diffusion.alphas_cumprod.dtype == torch.float32 and torch.equal(diffusion.alphas_cumprod, before)


def test_the_step_is_differentiable(diffusion):
    x_t = randn(1, 1, 4, 4).requires_grad_()
    diffusion.ddim_step(x_t, 2 * x_t, torch.tensor([400])).sum().backward()
    assert x_t.grad.isfinite().all() and x_t.grad.abs().min() > 0


def test_a_checkpoint_holds_nothing_of_it(diffusion):
    assert diffusion.state_dict() == {} and not list(diffusion.parameters())
