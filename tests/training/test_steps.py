"""One iteration: the two losses and their gradients, the drawn t, and the same draws in several processes."""

import re

import pytest
import torch

from custom_modules.diffusion import Diffusion
from custom_modules.training.steps import JointLoss, TagBatch, TrainingStep, warmup_cosine
from tests.helpers.tiny_network import tiny_network


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(size) % 2, torch.ones(size)


def has_gradient(module):
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()]


@pytest.mark.parametrize(("loss", "touched", "untouched"), [
    ("classification", "classifier", "denoiser"),
    ("denoising", "denoiser", "classifier"),
])  # fmt: skip
def test_the_losses_touch_disjoint_parameters(loss, touched, untouched):
    network = tiny_network()
    torch.manual_seed(0)
    TrainingStep(network, Diffusion(), amp=False)(*batch())[loss].mean().backward()
    assert all(has_gradient(getattr(network, touched)))
    assert not any(has_gradient(getattr(network, untouched)))


def test_the_joint_loss_equals_the_two_apart():
    gradients = []
    for losses in (["denoising", "classification"], ["joint"]):
        network = tiny_network()
        torch.manual_seed(0)
        pred = TrainingStep(network, Diffusion(), amp=False)(*batch())
        if losses == ["joint"]:
            JointLoss()(pred, batch()[1]).backward()
        else:
            for loss in losses:
                pred[loss].mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for apart, joint in zip(*gradients):
        torch.testing.assert_close(apart, joint)


def test_weights_count_in_the_denoisers_loss_alone():
    pred = {"denoising": torch.tensor([1.0, 2.0, 3.0]), "weight": torch.tensor([0.0, 1.0, 2.0])}
    pred |= {"classification": torch.tensor([0.3, 0.6, 0.9])}
    # (0 * 1 + 1 * 2 + 2 * 3) / 3 + (0.3 + 0.6 + 0.9) / 3
    assert JointLoss()(pred, torch.tensor([0, 1, 0])).item() == pytest.approx(8 / 3 + 0.6)


def test_a_slice_of_weight_0_teaches_the_denoiser_nothing():
    x_0, tags, weights = batch()
    changed, weights[2] = x_0.clone(), 0
    changed[2] = 0.5
    gradients = []
    for images in (x_0, changed):
        network = tiny_network()
        torch.manual_seed(0)
        pred = TrainingStep(network, Diffusion(), amp=False)(images, tags, weights)
        JointLoss()(pred, tags).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    same = {name: torch.allclose(g, gradients[1][name], rtol=1e-4, atol=1e-6) for name, g in gradients[0].items()}
    assert all(equal for name, equal in same.items() if name.startswith("denoiser"))
    assert not all(equal for name, equal in same.items() if name.startswith("classifier"))


def test_the_segmenter_waits_for_its_distillation():
    network = tiny_network(segmenter=True)
    step = TrainingStep(network, Diffusion(), amp=False)
    assert not any(parameter.requires_grad for parameter in network.segmenter.parameters())
    assert all(parameter.requires_grad for parameter in network.denoiser.parameters())
    JointLoss()(step(*batch()), batch()[1]).backward()  # DistributedDataParallel waits for all that require a gradient
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


class Oracle(torch.nn.Module):
    """Knows the images: returns the noise of Eq. (2) exactly, and logits that judge the tag by the first pixel."""

    def __init__(self, x_0, diffusion):
        super().__init__()
        self.x_0, self.diffusion, self.seen, self.segmenter = x_0, diffusion, None, None

    def forward(self, x_t, t, y):
        alpha_bar = self.diffusion.alpha_bar(t, x_t)
        return (x_t - alpha_bar.sqrt() * self.x_0) / (1 - alpha_bar).sqrt()

    def classify(self, x_t, t):
        self.seen = x_t, t
        return torch.tensor([[0.0, 2.0]]).expand(len(x_t), 2)


def test_losses_of_an_oracle():
    x_0, tags, weights = batch(64)
    oracle = Oracle(x_0, Diffusion())
    torch.manual_seed(0)
    pred = TrainingStep(oracle, oracle.diffusion, amp=False)(x_0, tags, weights)
    assert pred["denoising"].shape == (64,) and pred["denoising"].max() < 1e-6
    # softmax of (0, 2): p(y1) = 1 / (1 + e^-2) = 0.8808; cross entropy -log p of the tag
    assert pred["probability"].tolist() == pytest.approx([0.8808] * 64, abs=1e-4)
    torch.testing.assert_close(pred["classification"], torch.where(tags == 1, 0.1269, 2.1269), rtol=0, atol=1e-4)
    x, t = oracle.seen
    clean = t == 0
    assert 2 < clean.sum() < 30  # a quarter of 64, within 4 standard deviations
    assert torch.equal(x[clean], x_0[clean]) and not (x[~clean] == x_0[~clean]).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("wrong", [(-1, 500), (600, 200), (200, 1000), (5,), 5, (1, 2, 3)])
def test_a_range_outside_the_schedule_is_an_error(wrong):
    message = re.escape(f"timestep_range must be [low, high] with 0 <= low <= high < 1000; got {wrong}")
    with pytest.raises(ValueError, match=message):
        TrainingStep(tiny_network(), Diffusion(), timestep_range=wrong)


def test_a_share_outside_0_to_1_is_an_error():
    with pytest.raises(ValueError, match=r"timestep_focus is a share and must be in \[0, 1\]; got 1.5"):
        TrainingStep(tiny_network(), Diffusion(), timestep_focus=1.5)


def test_timesteps_are_in_range_and_focused():
    def draw(**settings):
        torch.manual_seed(0)
        return TrainingStep(tiny_network(), Diffusion(), (200, 203), **settings).sample_timesteps(4000, "cpu")

    assert set(draw(timestep_focus=1.0).tolist()) == {200, 201, 202, 203}
    anywhere = draw(timestep_focus=0.0)
    assert anywhere.dtype == torch.long and 0 <= anywhere.min() < 10 and 990 <= anywhere.max() < 1000
    inside = ((t := draw(timestep_focus=0.5)) >= 200) & (t <= 203)
    # 0.5 + 0.5 * 4 / 1000 = 0.502, its standard deviation in 4000 draws 0.008
    assert inside.float().mean().item() == pytest.approx(0.502, abs=0.03)


def test_processes_draw_what_one_draws_for_all_of_them(monkeypatch):
    network, parts = tiny_network(), batch(6)

    def losses(rank, processes):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda: rank)
        monkeypatch.setattr("ignite.distributed.get_world_size", lambda: processes)
        torch.manual_seed(0)
        return TrainingStep(network, Diffusion(), amp=False)(*(part[rank::processes] for part in parts))

    whole = losses(0, 1)
    for rank in range(3):
        for name, values in losses(rank, 3).items():
            torch.testing.assert_close(values, whole[name][rank::3])


def test_the_batch_goes_to_the_network_as_float_and_the_tags_twice():
    weights = torch.tensor([0.5, 1.0])
    batch = {"image": torch.ones(2, 1, 4, 4).half(), "tag": torch.tensor([0, 1]), "weight": weights}
    x_0, tags, args, kwargs = TagBatch()(batch)
    assert x_0.dtype == torch.float32 and tags.dtype == torch.long
    assert args == (tags, weights) and kwargs == {}


def test_rates_rise_and_fall_over_the_length_that_is_asked_for():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = warmup_cosine(optimizer, warmup_steps=2, total_steps=4), []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # min(1, k / 2) * (1 + cos(pi k / 4)) / 2
    assert rates == pytest.approx([0, 0.5 * 0.8536, 0.5, 0.1464, 0], abs=1e-4)
    longer = warmup_cosine(optimizer, warmup_steps=2, total_steps=10)
    longer.load_state_dict(schedule.state_dict())  # as a run that is resumed with more epochs does
    longer.step()
    assert longer.get_last_lr() == pytest.approx([0.3455], abs=1e-4)  # (1 + cos(6 pi / 10)) / 2 at step 6
