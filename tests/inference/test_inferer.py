"""The inferer with methods that only copy or record what they are given: which slices are worked on, and where it goes.

Its answer has two channels: the saliency, and the region in which it counts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import nn

from custom_modules.inference.body import body_mask
from custom_modules.inference.inferer import SaliencyInferer, smooth_along

SIZE, DEPTH = 16, 5
AFFINE = torch.diag(torch.tensor([-0.7, -1.3, 6.0, 1.0], dtype=torch.float64))


def ball(depth: int = DEPTH, seed: int = 0) -> torch.Tensor:
    """A volume (1, 1, 16, 16, depth) in [-1, 1]: a disc of random tissue in every slice, air (-1) around it."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = ((y - 7.5) ** 2 + (x - 7.5) ** 2 < 36)[..., None]
    tissue = 0.2 + 0.8 * torch.rand(SIZE, SIZE, depth, generator=generator)
    return torch.where(disc, tissue, -1.0)[None, None]


def tag_volume(tags: list[int], axis: int = 2) -> torch.Tensor:
    """Tags as `TagVolumed` hands them over, (1, 1, 16, 16, len(tags)) uint8 with the slices along `axis`."""
    volume = torch.tensor(tags, dtype=torch.uint8).expand(1, 1, SIZE, SIZE, len(tags))
    return volume.movedim(-1, 2 + axis).contiguous()


class Copy:
    """A method whose map is the slice itself; remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.networks: list = []

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: list[int]) -> torch.Tensor:
        assert x_0.ndim == 4 and x_0.shape[:2] == (len(slices), 1) and type(x_0) is torch.Tensor
        self.batches.append(list(slices))
        self.networks.append(network)
        return x_0.clone()

    @property
    def slices(self) -> list[int]:
        return sum(self.batches, [])


class BrightIsPositive(nn.Module):
    """Classifier whose logit of y1 is 10 x (mean of the slice's disc - 0.6): p > 0.5 where it is brighter than 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[int] = []

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        self.timesteps += timesteps.tolist()
        mean = x[:, 0, 5:11, 5:11].mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(mean), 10 * (mean - 0.6)], dim=1)


def inferer(method=None, **settings) -> SaliencyInferer:
    return SaliencyInferer(method or Copy(), **{"gate": "all", "amp": False, **settings})


# ---- slices in, volume out


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_volume_equals_its_stacked_slices(batch_size):
    image, method, network = ball(), Copy(), nn.Identity()
    output = inferer(method, batch_size=batch_size)(inputs=image, network=network)
    assert output.shape == (1, 2, SIZE, SIZE, DEPTH) and output.dtype == torch.float32
    assert torch.equal(output.as_tensor()[:, :1], image)
    assert method.slices == list(range(DEPTH)) and max(map(len, method.batches)) == min(batch_size, DEPTH)
    assert all(given is network for given in method.networks)


def test_each_volume_of_a_batch_for_itself():
    image = torch.cat([ball(seed=1), ball(seed=2)])
    run = inferer(gate="tags", batch_size=2)
    tags = torch.cat([tag_volume([1, 1, 1, 0, 0]), tag_volume([0, 0, 0, 0, 1])])
    together = run(image, nn.Identity(), slice_labels=tags)
    assert [facts["n_slices"] for facts in run.facts] == [3, 1]
    for i in range(2):
        alone = run(image[i : i + 1], nn.Identity(), slice_labels=tags[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_slice_axis_is_only_a_name(slice_axis):
    image, tags = ball(), [0, 1, 1, 0, 1]
    settings = {"gate": "tags", "erosion": 1, "smoothing": 1.0}
    expected = inferer(**settings)(image, nn.Identity(), tag_volume(tags))
    moved = image.movedim(-1, 2 + slice_axis)
    found = inferer(slice_axis=slice_axis, **settings)(moved, nn.Identity(), tag_volume(tags, slice_axis))
    assert torch.equal(found.as_tensor().movedim(2 + slice_axis, -1), expected.as_tensor())


def test_a_metatensor_keeps_its_geometry():
    image = MetaTensor(ball()[0], affine=AFFINE, meta={"filename_or_obj": "a.nii.gz"})
    image.applied_operations = [{"class": "Orientation"}]
    output = inferer()(image[None], nn.Identity())
    assert isinstance(output, MetaTensor)
    assert torch.equal(output.affine, AFFINE) and output.meta["filename_or_obj"] == "a.nii.gz"
    assert output.applied_operations == [{"class": "Orientation"}]  # what Invertd needs


def test_a_tensor_gives_a_metatensor_too():
    assert isinstance(inferer()(ball(), nn.Identity()), MetaTensor)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_method_may_give_several_maps(batch_size):
    """Each of them is treated as if it were alone."""
    settings = {"gate": "tags", "blur": 1.0, "intensity_power": 2.0, "erosion": 1, "smoothing": 1.0}
    settings |= {"batch_size": batch_size}
    image, tags, factors = ball(), tag_volume([0, 1, 1, 0, 1]), (1.0, -2.0, 0.5)
    several = inferer(lambda x, *_: torch.cat([f * x for f in factors], dim=1), **settings)(image, None, tags)
    assert several.shape == (1, 4, SIZE, SIZE, DEPTH)
    for k, factor in enumerate(factors):
        one = inferer(lambda x, *_, factor=factor: factor * x, **settings)(image, None, tags)
        torch.testing.assert_close(several[:, [k, 3]], one)


def test_one_slice():
    image = ball(depth=1)
    output = inferer(smoothing=2.0, erosion=1)(image, nn.Identity())
    torch.testing.assert_close(output.as_tensor()[:, :1], image)  # smoothing over one slice is none


# ---- gate


def test_gate_tags_passes_only_tagged_slices():
    image, method = ball(), Copy()
    output = inferer(method, gate="tags", batch_size=2)(image, nn.Identity(), tag_volume([0, 1, 0, 1, 1])).as_tensor()
    assert method.batches == [[1, 3], [4]]
    assert torch.equal(output[:, :1, ..., [1, 3, 4]], image[..., [1, 3, 4]])
    assert not output[..., [0, 2]].any()  # neither saliency nor region


@pytest.mark.parametrize("gate_threshold", [0.1, 0.5, 0.9])
def test_gate_classifier_compares_the_probability_at_t_0(gate_threshold):
    image, method, network = ball(depth=7, seed=3), Copy(), BrightIsPositive()
    inferer(method, gate="classifier", gate_threshold=gate_threshold, batch_size=1)(image, network)
    probability = 1 / (1 + np.exp(-10 * (image[0, 0, 5:11, 5:11].mean(dim=(0, 1)).numpy() - 0.6)))
    assert method.slices == np.flatnonzero(probability > gate_threshold).tolist()
    assert network.timesteps == [0] * 7


def test_gate_classifier_opens_bf16_only_where_asked(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    seen = []

    class Network(BrightIsPositive):
        def classify(self, x, timesteps):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().classify(x, timesteps)

    for amp in (True, False):
        inferer(gate="classifier", amp=amp)(ball(), Network())
    assert seen == [True, False]


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.5])
def test_the_gate_is_smoothed_over_the_logits_of_neighbours(sigma):
    image, network = ball(depth=9, seed=3), BrightIsPositive()
    run = inferer(gate="classifier", gate_smoothing=sigma, batch_size=1)
    run(image, network)
    logit = 10 * (image[0, 0, 5:11, 5:11].mean(dim=(0, 1)).double().numpy() - 0.6)
    weight = ndimage.gaussian_filter1d(np.ones(9), sigma, mode="constant")  # what of the Gaussian lies in the volume
    smooth = ndimage.gaussian_filter1d(logit, sigma, mode="constant") / weight
    assert run.facts[0]["gate_probability"] == pytest.approx(1 / (1 + np.exp(-smooth)), abs=1e-5)
    assert np.abs(smooth - logit).max() > 0.05


def test_a_slice_between_positive_ones_is_processed():
    image, chosen = ball(depth=5), []
    for k, value in enumerate([0.7, 0.75, 0.58, 0.75, 0.2]):  # logits 1, 1.5, -0.2, 1.5, -4
        image[0, 0, 5:11, 5:11, k] = value
    for sigma in (0.0, 0.5):
        method = Copy()
        inferer(method, gate="classifier", gate_smoothing=sigma)(image, BrightIsPositive())
        chosen.append(method.slices)
    assert chosen == [[0, 1, 3], [0, 1, 2, 3]]


def test_the_gate_is_not_smoothed_by_default():
    image = ball(depth=7, seed=3)
    default, off = (inferer(gate="classifier", **knobs) for knobs in ({}, {"gate_smoothing": 0.0}))
    for run in (default, off):
        run(image, BrightIsPositive())
    probability = 1 / (1 + np.exp(-10 * (image[0, 0, 5:11, 5:11].mean(dim=(0, 1)).numpy() - 0.6)))
    assert default.facts[0]["gate_probability"] == off.facts[0]["gate_probability"] == pytest.approx(probability)


class Sizes(BrightIsPositive):
    """Remembers what the classifier got, and says y1."""

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)


def test_the_classifier_gets_slices_of_its_own_size():
    image, network, method = ball(), Sizes(), Copy()
    inferer(method, gate="classifier", gate_size=8)(image, network)
    assert network.seen.shape == (DEPTH, 1, 8, 8) and method.slices == list(range(DEPTH))
    triangle = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8  # the tent of half width 2 at distances 1.5 and 0.5: anti-aliased
    windows = image[0, :, 1:15, 1:15].movedim(-1, 0).unfold(2, 4, 2).unfold(3, 4, 2)  # not those over the edge
    expected = torch.einsum("dchwij,i,j->dchw", windows, triangle, triangle)
    torch.testing.assert_close(network.seen[..., 1:7, 1:7], expected)


@pytest.mark.parametrize("gate_size", [None, SIZE])
def test_slices_of_the_classifiers_size_are_left_alone(gate_size):
    image, network = ball(), Sizes()
    inferer(gate="classifier", gate_size=gate_size)(image, network)
    assert torch.equal(network.seen, image[0].movedim(-1, 0))


def test_gate_all_leaves_out_slices_without_body():
    image, method = ball(), Copy()
    image[..., 0] = -1
    inferer(method)(image, nn.Identity())
    assert method.slices == [1, 2, 3, 4]


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_an_empty_gate_gives_an_empty_map_and_calls_nothing(smoothing):
    method = Copy()
    run = inferer(method, gate="tags", smoothing=smoothing)
    output = run(ball(), nn.Identity(), tag_volume([0] * DEPTH))
    assert output.shape == (1, 2, SIZE, SIZE, DEPTH) and not output.any()
    assert method.batches == []
    assert run.facts == [{"seconds_per_slice": 0, "n_slices": 0}]


# ---- region and smoothing


@pytest.mark.parametrize("erosion", [0, 2])
def test_the_region_is_the_eroded_body_of_the_processed_slices(erosion):
    image, tags = ball(), [0, 1, 1, 0, 1]
    region = inferer(gate="tags", erosion=erosion)(image, nn.Identity(), tag_volume(tags)).as_tensor()[0, 1].numpy()
    cross = ndimage.generate_binary_structure(2, 1)
    for k, tag in enumerate(tags):
        body = ndimage.binary_fill_holes(ndimage.binary_opening(image[0, 0, ..., k] > -0.5, cross))
        body = ndimage.binary_erosion(body, cross, iterations=erosion) if erosion else body
        assert np.array_equal(region[..., k], body * tag)


def test_the_body_is_that_of_transforms():
    image = ball()
    region = inferer(erosion=1)(image, nn.Identity()).as_tensor()[0, 1].numpy()
    assert np.array_equal(region, body_mask(image[0, 0].numpy(), 1))
    assert not region[0].any() and not region[:, 0].any()  # the rim is off


def gaussian(distance: int, sigma: float) -> float:
    return float(np.exp(-(distance**2) / (2 * sigma**2)))


def test_smoothing_is_normalised_at_unprocessed_neighbours():
    values, chosen, sigma = [0.0, 4.0, 1.0, 0.0, 2.0], torch.tensor([False, True, True, False, True]), 0.8
    saliency = torch.tensor(values).view(5, 1, 1, 1).expand(5, 1, 2, 2).clone()
    smooth = smooth_along(saliency, chosen, sigma)
    for k in range(5):  # the weighted mean over the processed slices, written out
        weights = [gaussian(k - j, sigma) * bool(chosen[j]) for j in range(5)]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) if chosen[k] else 0.0
        # scipy cuts the kernel at 4 sigma = 3.2, so distance 3 is in and the rest is rounding
        assert smooth[k].flatten().tolist() == pytest.approx([expected] * 4, rel=1e-4)


def test_smoothing_keeps_a_constant_map_constant():
    chosen = torch.tensor([True, False, True, True, False, False, True])
    saliency = torch.where(chosen, 3.0, 0.0).view(7, 1, 1, 1).expand(7, 1, 2, 2).clone()
    torch.testing.assert_close(smooth_along(saliency, chosen, 1.5), saliency)


def test_no_smoothing_is_no_change():
    saliency = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(smooth_along(saliency, torch.tensor([True, True, False, True]), 0.0), saliency)


def test_the_inferer_smooths_along_its_slices():
    image, tags = ball(), [1, 1, 0, 1, 1]
    output = inferer(gate="tags", smoothing=1.0)(image, nn.Identity(), tag_volume(tags)).as_tensor()[0, 0]
    chosen = torch.tensor(tags).bool()
    expected = smooth_along(image[0].movedim(-1, 0) * chosen.view(-1, 1, 1, 1), chosen, 1.0)
    torch.testing.assert_close(output, expected[:, 0].movedim(0, -1))


# ---- facts and errors


def test_facts_tell_seconds_and_slices():
    run = inferer(gate="tags", batch_size=1)
    run(ball(), nn.Identity(), tag_volume([0, 1, 1, 0, 1]))
    (facts,) = run.facts
    assert facts["n_slices"] == 3 and facts["seconds_per_slice"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "tag"}, r"gate must be one of \['classifier', 'tags', 'all'\]; got 'tag'"),
        ({"gate_threshold": 1.5}, r"gate_threshold is a probability.*\[0, 1\]; got 1\.5"),
        ({"gate_threshold": -0.1}, r"gate_threshold is a probability.*\[0, 1\]; got -0\.1"),
        ({"batch_size": 0}, r"batch_size must be >= 1; got 0"),
        ({"slice_axis": 3}, r"slice_axis must be 0, 1 or 2; got 3"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        inferer(**settings)


def test_gate_tags_needs_tags():
    with pytest.raises(ValueError, match="gate is 'tags' but the case has no slice_labels.*--gate classifier"):
        inferer(gate="tags")(ball(), nn.Identity())


def test_gate_tags_refuses_tags_along_another_axis():
    tags = tag_volume([0, 1] * 8, axis=0)[..., :DEPTH]  # 16 tags along the first axis
    with pytest.raises(ValueError, match="slice_labels run along another axis.*slice_axis"):
        inferer(gate="tags")(ball(), nn.Identity(), tags)


# ---- blur and intensity


def test_the_map_is_multiplied_by_the_intensity():
    volume = ball()
    ones = inferer(lambda x, network, slices: torch.ones_like(x), intensity_power=2.0)(volume, None)
    assert torch.allclose(ones[:, :1], ((volume + 1) / 2) ** 2, atol=1e-6)
    alone = inferer(lambda x, network, slices: -torch.ones_like(x))(volume, None)
    assert torch.equal(alone[:, :1].as_tensor(), -torch.ones_like(volume))  # 0: the map as it is, signs included


def test_the_map_is_blurred_in_the_slice_and_before_the_intensity():
    volume = ball()

    def point(x: torch.Tensor, network: nn.Module, slices: list[int]) -> torch.Tensor:
        a = torch.zeros_like(x)
        a[:, :, 8, 8] = torch.tensor(slices).float()[:, None] + 1  # another height in every slice
        return a

    blurred = inferer(point, blur=2.0)(volume, None)[0, 0]
    expected = ndimage.gaussian_filter(inferer(point)(volume, None)[0, 0].numpy(), (2, 2, 0), truncate=4)
    assert np.allclose(blurred, expected, atol=5e-3) and blurred[8, 9, 4] > 0.1  # of a peak of 0.2
    both = inferer(point, blur=2.0, intensity_power=1.0)(volume, None)[0, 0]
    assert torch.allclose(both, blurred * (volume[0, 0] + 1) / 2, atol=1e-6)


@pytest.mark.parametrize("setting", ["gate_smoothing", "blur", "intensity_power", "erosion", "smoothing"])
def test_negative_weights_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting} must be >= 0; got -1"):
        inferer(**{setting: -1})
