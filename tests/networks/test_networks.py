"""Networks: mixtures of conditions, volumes, sizes, and weights that must not be half loaded."""

import pytest
import torch
from monai.networks.nets import BasicUNet, DiffusionModelUNet

from custom_modules.networks.denoiser import ConditionalUNet, SoftEmbedding
from custom_modules.networks.segmenter import Segmenter
from custom_modules.networks.weights import load_weights
from tests.helpers.tiny_network import SIZES, tiny_network


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return tiny_network().requires_grad_(False)


# ---- the condition


def test_one_hot_rows_equal_the_lookup_and_mixtures_are_linear():
    embedding = SoftEmbedding(2, 5)
    labels = torch.tensor([1, 0, 1])
    looked_up = embedding(labels)
    torch.testing.assert_close(embedding(torch.nn.functional.one_hot(labels, 2).float()), looked_up, rtol=0, atol=0)
    mixed = embedding(torch.tensor([[0.05, 0.95]]))  # tau = 0.95
    torch.testing.assert_close(mixed[0], 0.95 * embedding.weight[1] + 0.05 * embedding.weight[0])


def test_soft_labels_reach_the_prediction(network):
    x, t = randn(2, 1, 8, 8), torch.tensor([400, 400])
    hard = network(x, t, torch.tensor([0, 1]))
    torch.testing.assert_close(network(x, t, torch.eye(2)), hard)
    assert (network(x, t, torch.tensor([[0.5, 0.5]] * 2)) - hard).abs().min() > 0  # between, so neither


def test_derivative_with_respect_to_the_condition_is_the_networks_own():
    """Along f(y1) - f(y0), by forward mode in float64, against a central difference.

    Forward mode of group norm needs contiguous activations, so the network leaves channels-last here.
    """
    network = tiny_network().double().requires_grad_(False).to(memory_format=torch.contiguous_format)
    x, t = randn(1, 1, 8, 8).double(), torch.tensor([400])
    y, direction = torch.tensor([[0.3, 0.7]]).double(), torch.tensor([[-1.0, 1.0]]).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # fused attention has no forward mode
        _, exact = torch.func.jvp(lambda y: network(x, t, y), (y,), (direction,))
        difference = (network(x, t, y + 1e-5 * direction) - network(x, t, y - 1e-5 * direction)) / 2e-5
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(exact, difference, rtol=1e-5, atol=1e-7)


# ---- shapes


def test_image_alone_means_clean_and_positive(network):
    x = randn(3, 1, 8, 12)
    expected = network(x, torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(network(x), expected)
    assert expected.shape == x.shape and expected.abs().max() > 0


def test_a_volume_equals_its_stacked_slices(network):
    x, t, y = randn(2, 1, 8, 12, 3), torch.tensor([5, 400]), torch.tensor([[0.0, 1.0], [0.4, 0.6]])
    slices = torch.stack([network(x[..., k], t, y) for k in range(3)], dim=-1)
    torch.testing.assert_close(network(x, t, y), slices)
    torch.testing.assert_close(network(x), torch.stack([network(x[..., k]) for k in range(3)], dim=-1))
    assert (slices[0] - slices[1]).abs().max() > 0


def test_sizes_that_do_not_divide_are_an_error(network):
    with pytest.raises(ValueError, match=r"image_size must be divisible by 4 .*got a slice of \(8, 10\)"):
        network(torch.zeros(1, 1, 8, 10))


def test_patch_size_one_is_monais_own_network():
    sizes = {**SIZES, "patch_size": 1}
    ours = ConditionalUNet(**sizes)
    monais = DiffusionModelUNet(2, 1, 1, num_class_embeds=2, **{k: v for k, v in SIZES.items() if k != "in_channels"})
    monais.load_state_dict({k: randn(*v.shape) * 0.1 for k, v in monais.state_dict().items()})
    ours.load_state_dict(monais.state_dict())
    x, t, y = randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1])
    torch.testing.assert_close(ours(x, t, class_labels=y), monais(x, t, class_labels=y), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_classifier_takes_any_resolution(network, size):
    x = randn(2, 1, *size)
    early, late = (network.classify(x, torch.full((2,), t)) for t in (0, 900))
    assert early.shape == (2, 2) and early.isfinite().all()
    assert (early - late).abs().min() > 0  # it knows t
    assert network.classifier.features(x, torch.zeros(2)).shape == (2, 16, size[0] // 4, size[1] // 4)


@pytest.mark.parametrize("size", [(64, 48), (40, 32)])
def test_the_segmenters_sizes_that_do_not_divide_are_an_error(size):
    message = rf"segmenter_size must be divisible by 32 for this segmenter; got a slice of \({size[0]}, {size[1]}\)"
    with pytest.raises(ValueError, match=message):
        Segmenter(2, [8] * 6, norm_num_groups=4)(torch.zeros(1, 1, *size))
    assert Segmenter(1, [8] * 6, norm_num_groups=4)(torch.zeros(1, 1, 64, 48)).shape == (1, 1, 64, 48)


def test_a_segmenter_of_patch_size_one_is_monais_unet():
    ours = Segmenter(1, [8] * 6, norm_num_groups=4).eval()
    monais = BasicUNet(2, 1, 1, [8] * 6, norm=("group", {"num_groups": 4})).eval()
    monais.load_state_dict(ours.unet.state_dict())
    x = randn(2, 1, 32, 48)
    torch.testing.assert_close(ours(x), monais(x), rtol=0, atol=0)


def test_patches_of_a_segmenter_hold_their_own_pixels():
    """Around a U-Net that returns its input, space to depth and back changes nothing."""
    segmenter, x = Segmenter(4, [8] * 6), randn(2, 1, 64, 128)
    segmenter.unet = torch.nn.Identity()
    assert torch.equal(segmenter(x), x)


# ---- weights


def test_weights_come_back(tmp_path):
    source, target = tiny_network(seed=1), tiny_network(seed=2)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    assert load_weights(target, tmp_path / "model.pt") is target
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    assert load_weights(target, None) is target


@pytest.mark.parametrize("part", ["denoiser", "classifier"])
@pytest.mark.parametrize("strict", [False, True])
def test_missing_tensors_raise_even_non_strictly(part, strict):
    network = tiny_network()
    state = network.state_dict()
    partial = {name: value for name, value in state.items() if not name.startswith(part)}
    lacking = len(state) - len(partial)
    with pytest.raises(RuntimeError, match=f"lacks {lacking} of the network's {len(state)} tensors, such as {part}"):
        network.load_state_dict(partial, strict=strict)
    wrapped = torch.nn.ModuleDict({"module": network})  # as a host, or DistributedDataParallel, holds it
    with pytest.raises(RuntimeError, match=f"lacks {lacking} of"):
        wrapped.load_state_dict({f"module.{name}": value for name, value in partial.items()}, strict=strict)
    network.load_state_dict(state | {"segmenter.weight": torch.zeros(1)}, strict=False)  # more is no harm


def without_segmenter(network):
    """What 0.3.0 wrote for this network."""
    names = ("segmenter.", "distilled")
    return {name: value for name, value in network.state_dict().items() if not name.startswith(names)}


@pytest.mark.parametrize("segmenter", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_weights_without_a_segmenter_load_as_not_distilled(segmenter, strict):
    source, target = tiny_network(seed=1), tiny_network(seed=2, segmenter=segmenter)
    target.distilled.fill_(1)  # whatever it was before
    before = target.state_dict()
    before = {name: value.clone() for name, value in before.items() if name.startswith("segmenter.")}
    given = without_segmenter(source)
    assert bool(before) == segmenter and target.load_state_dict(given, strict=strict).missing_keys == []
    assert target.distilled == 0 and given.keys() == without_segmenter(source).keys()  # the caller's dict is its own
    state = target.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in (without_segmenter(source) | before).items())


def test_weights_of_a_host_without_a_segmenter_load_too():
    """As a host, or DistributedDataParallel, holds it: under a prefix."""
    source, network = tiny_network(seed=1), tiny_network(seed=2, segmenter=True)
    network.distilled.fill_(1)
    given = {f"module.{name}": value for name, value in without_segmenter(source).items()}
    torch.nn.ModuleDict({"module": network}).load_state_dict(given)
    state = network.state_dict()
    assert network.distilled == 0 and all(torch.equal(v, state[k]) for k, v in without_segmenter(source).items())


def test_distilled_weights_come_back_distilled(tmp_path):
    source, target = tiny_network(seed=1, segmenter=True), tiny_network(seed=2, segmenter=True)
    source.distilled.fill_(1)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}, tmp_path / "m.pt")
    load_weights(target, tmp_path / "m.pt")
    assert target.distilled == 1 and target.distilled.dtype == torch.long
    weights = zip(source.segmenter.parameters(), target.segmenter.parameters(), strict=True)
    assert all(torch.equal(a.half().float(), b) for a, b in weights)


@pytest.mark.parametrize("part", ["denoiser.conv_in", "segmenter.unet.conv_0", "distilled"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_part_of_a_segmenter_is_no_excuse(part, strict):
    network = tiny_network(segmenter=True)
    partial = {name: value for name, value in network.state_dict().items() if not name.startswith(part)}
    with pytest.raises(RuntimeError, match=f"the checkpoint lacks .* such as {part}"):
        network.load_state_dict(partial, strict=strict)
    no_student = {name: v for name, v in without_segmenter(network).items() if not name.startswith("denoiser.conv_in")}
    with pytest.raises(RuntimeError, match="the checkpoint lacks .* such as denoiser.conv_in"):
        network.load_state_dict(no_student, strict=strict)


CONTENTS = {
    "other network": lambda path: torch.save(tiny_network(channels=[8, 8]).state_dict(), path),
    "whole run": lambda path: torch.save({"network": tiny_network().state_dict(), "trainer": {"epoch": 3}}, path),
    "no dict": lambda path: torch.save([1, 2], path),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_files_without_these_weights_are_named(tmp_path, content):
    CONTENTS[content](tmp_path / "model.pt")
    with pytest.raises(ValueError, match="ckpt_path '.*model.pt' does not hold weights of this network_def"):
        load_weights(tiny_network(), tmp_path / "model.pt")


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt' does not exist; train first, or give --ckpt_path"):
        load_weights(tiny_network(), tmp_path / "nowhere.pt")
