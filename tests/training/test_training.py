"""Training: the two losses and their gradients, seeds, clipping, and a run that continues as if never stopped."""

import re
from types import SimpleNamespace

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, RandFlipd

from custom_modules.diffusion import Diffusion
from custom_modules.networks.weights import load_weights, training_cases, training_list
from custom_modules.training.checkpoints import AveragedWeights, ResumableRun, ema_handler
from custom_modules.training.handlers import ClipGradients, EpochSeed, MeanLoss, TagMetrics
from custom_modules.training.sampling import BalancedSampler
from custom_modules.training.slices import SliceDataset
from custom_modules.training.steps import JointLoss, TagBatch, TrainingStep, parameter_groups
from tests.helpers.tiny_network import tiny_network


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(size) % 2, torch.ones(size)


def has_gradient(module):
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in module.parameters()]


# ---- one step


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


@pytest.mark.parametrize("wrong", [(-1, 500), (600, 200), (200, 1000)])
def test_a_range_outside_the_schedule_is_an_error(wrong):
    message = re.escape(f"timestep_range must be [low, high] with 0 <= low <= high < 1000; got {list(wrong)}")
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


# ---- handlers


def test_groups_have_their_own_rate_and_are_clipped_apart():
    network = tiny_network()
    groups = parameter_groups(network, lr_denoiser=1e-3, lr_classifier=2e-3)
    assert [group["lr"] for group in groups] == [1e-3, 2e-3]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    optimizer = torch.optim.AdamW(groups)
    for parameter in network.denoiser.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    for parameter in network.classifier.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    before = [parameter.grad.clone() for parameter in network.classifier.parameters()]
    ClipGradients(optimizer, max_norm=1.0)(engine=None)
    norm = torch.stack([parameter.grad.norm() for parameter in network.denoiser.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, abs=1e-3)
    # the small gradients are below the norm, so one clipping of all together would have shrunk them
    assert all(torch.equal(p.grad, b) for p, b in zip(network.classifier.parameters(), before))


def draws(handler, epoch):
    handler(SimpleNamespace(state=SimpleNamespace(epoch=epoch)))
    return torch.rand(3).tolist()


def test_an_epochs_draws_depend_on_seed_and_epoch():
    first = draws(EpochSeed(3), epoch=1)
    torch.rand(100)
    assert draws(EpochSeed(3), epoch=1) == first
    assert first not in (draws(EpochSeed(3), epoch=2), draws(EpochSeed(4), epoch=1))
    draws(EpochSeed(2**31), epoch=10**6)  # no seed is too large


def test_validation_draws_the_same_every_epoch():
    handler = EpochSeed(3, every_epoch=False)
    assert draws(handler, epoch=1) == draws(handler, epoch=2)


def test_the_loss_of_a_single_process_is_its_own():
    output = {"loss": torch.tensor(3.0, requires_grad=True) * 2}
    MeanLoss()(SimpleNamespace(state=SimpleNamespace(output=output)))
    assert output["loss"] == 6 and not output["loss"].requires_grad


def test_validation_metrics_by_hand():
    outputs = [
        {"pred": {"denoising": torch.tensor(losses), "probability": torch.tensor(p)}, "label": torch.tensor([0, 1])}
        for losses, p in (([1.0, 2.0], [0.2, 0.9]), ([3.0, 6.0], [0.5, 0.4]))
    ]
    engine = Engine(lambda engine, output: output)
    TagMetrics().attach(engine)
    for _ in range(2):  # each epoch starts anew
        engine.run(outputs)
        # AUC: of the pairs (y1, y0) (0.9, 0.2), (0.9, 0.5), (0.4, 0.2), (0.4, 0.5) three are in order
        assert engine.state.metrics == {"val_denoising_y0": 2.0, "val_denoising_y1": 4.0, "val_classifier_auc": 0.75}


# ---- a run


class Slices(SliceDataset):
    """Twelve slices without files."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        super().__init__([], Compose([]), Compose([RandFlipd(keys="image", prob=0.5, spatial_axis=0)]))
        self.images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=generator)
        self.tags, self.weights = torch.arange(12) % 3 % 2, torch.linspace(0.5, 1.5, 12)


def train(folder, max_epochs, num_workers=0, epoch_length=3):
    """The parts of `train.yaml` at their smallest; returns network and averaged network."""
    torch.manual_seed(torch.seed())  # nothing may depend on what was drawn before
    dataset, network = Slices(), tiny_network(seed=4).train()
    ema = ema_handler(network, decay=0.9)  # warms up over 2 / (1 - 0.9) = 20 iterations, more than the run has
    optimizer = torch.optim.AdamW(parameter_groups(network, 1e-3, 1e-3))
    scheduler = WarmupCosineSchedule(optimizer, warmup_steps=2, t_total=12)
    sampler = BalancedSampler(dataset, 4 * epoch_length)
    run = {"network": network, "ema": ema.ema_model, "optimizer": optimizer, "lr_scheduler": scheduler}
    handlers = [
        EpochSeed(0),
        ClipGradients(optimizer, max_norm=1.0),
        LrScheduleHandler(scheduler, epoch_level=False, print_lr=False),
        AveragedWeights(ema, str(folder / "model.pt"), ["p1", "pat 02-ü"]),
        ResumableRun(str(folder), run),
    ]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        epoch_length=epoch_length,
        train_data_loader=DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=num_workers),
        network=TrainingStep(network, Diffusion(), amp=False),
        optimizer=optimizer,
        loss_function=JointLoss(),
        prepare_batch=TagBatch(),
        train_handlers=handlers,
        decollate=False,
    )
    trainer.run()
    assert trainer.state.epoch == max_epochs and trainer.state.iteration == max_epochs * epoch_length
    return network.state_dict(), ema.ema_model.state_dict()


def test_fine_tuned_weights_have_seen_the_cases_of_those_they_start_from(tmp_path):
    ema = ema_handler(tiny_network(), decay=0.9)
    (tmp_path / "base.training.txt").write_text("p1\np2\n")
    AveragedWeights(ema, str(tmp_path / "model.pt"), ["p2", "p3"], start=str(tmp_path / "base.pt"))(
        SimpleNamespace(state=SimpleNamespace(rank=0))
    )
    assert training_cases(tmp_path / "model.pt") == ["p1", "p2", "p3"]


def test_processes_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "all_gather", lambda name: [name, "checkpoint_epoch=3.pt"])
    engine = SimpleNamespace(state=SimpleNamespace(rank=0))
    with pytest.raises(ValueError, match="checkpoint_epoch=3.pt.*none.*one folder that all machines share"):
        ResumableRun(str(tmp_path), {}).attach(engine)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four epochs in one go: folder, weights, averaged weights."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, *train(folder, max_epochs=4)


def test_a_resumed_run_equals_one_that_was_never_stopped(straight, tmp_path):
    train(tmp_path, max_epochs=2)
    network, averaged = train(tmp_path, max_epochs=4)
    assert_same(network, straight[1])
    assert_same(averaged, straight[2])
    assert any(not torch.equal(network[name], averaged[name]) for name in network)


def test_worker_processes_change_nothing(straight, tmp_path):
    assert_same(train(tmp_path, max_epochs=4, num_workers=1)[0], straight[1])


def test_a_finished_run_stays_as_it_is(straight):
    folder, network, averaged = straight
    again = train(folder, max_epochs=4)
    assert_same(again[0], network)
    assert_same(again[1], averaged)


def test_what_a_run_leaves_behind(straight):
    folder, _, averaged = straight
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint_epoch=3.pt",
        "checkpoint_epoch=4.pt",
        "model.pt",
        "model.training.txt",
    ]
    state = torch.load(folder / "model.pt", weights_only=True)
    assert {value.dtype for name, value in state.items() if name != "distilled"} == {torch.float16}
    assert_same(state, {name: value.to(state[name]) for name, value in averaged.items()})
    loaded = load_weights(tiny_network(seed=9), folder / "model.pt").state_dict()
    assert {value.dtype for name, value in loaded.items() if name != "distilled"} == {torch.float32}
    assert_same(loaded, {name: value.half().to(loaded[name]) for name, value in averaged.items()})


def test_the_training_list_stands_beside_the_weights(straight, tmp_path):
    assert training_list(straight[0] / "model.pt") == straight[0] / "model.training.txt"
    assert training_cases(straight[0] / "model.pt") == ["p1", "pat 02-ü"]
    assert training_cases(tmp_path / "model.pt") is None


def test_an_evaluator_runs_the_step(straight):
    """The validation half of `train.yaml`, on the averaged weights."""
    network = load_weights(tiny_network(), straight[0] / "model.pt")
    results = []
    for _ in range(2):
        dataset = Slices()
        dataset.augmentation = None
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(dataset, batch_size=5),
            network=TrainingStep(network, Diffusion(), amp=False),
            prepare_batch=TagBatch(),
            val_handlers=[EpochSeed(0, every_epoch=False), TagMetrics()],
            decollate=False,
        )
        evaluator.run()
        results.append(evaluator.state.metrics)
    assert results[0] == results[1] and set(results[0]) == {
        "val_denoising_y0",
        "val_denoising_y1",
        "val_classifier_auc",
    }
