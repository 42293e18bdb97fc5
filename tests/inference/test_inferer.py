"""The inferer with methods that only copy or record what they are given: slices in, maps, region and facts out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import nn

from custom_modules.inference.body import body_mask
from custom_modules.inference.inferer import FACTS, smooth_along
from tests.helpers.inferers import DEPTH, SIZE, Copy, ball, inferer, tag_volume

AFFINE = torch.diag(torch.tensor([-0.7, -1.3, 6.0, 1.0], dtype=torch.float64))


# ---- slices in, volume out


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_volume_equals_its_stacked_slices(batch_size):
    image, method, network = ball(), Copy(), nn.Identity()
    output = inferer(method, batch_size=batch_size)(inputs=image, network=network)
    assert output.shape == (1, 2, SIZE, SIZE, DEPTH) and output.dtype == torch.float32
    assert torch.equal(output.as_tensor()[:, :1], image)
    assert method.slices == list(range(DEPTH)) and max(map(len, method.batches)) == min(batch_size, DEPTH)
    assert all(given is network for given in method.networks)


def test_a_volume_has_one_autocast_around_all_batches():
    """So torch keeps the bf16 copies of the weights from batch to batch; what is outermost is off."""
    depths = []

    def method(x_0, network, slices):
        depths.append(torch.autocast_increment_nesting() - 1)
        torch.autocast_decrement_nesting()
        assert not torch.is_autocast_enabled("cpu")
        return x_0

    inferer(method, batch_size=2)(ball(), nn.Identity())
    assert len(depths) == 3 and set(depths) == {1}


def test_each_volume_of_a_batch_for_itself():
    image = torch.cat([ball(seed=1), ball(seed=2)])
    run = inferer(gate="tags", batch_size=2)
    tags = torch.cat([tag_volume([1, 1, 1, 0, 0]), tag_volume([0, 0, 0, 0, 1])])
    together = run(image, nn.Identity(), slice_labels=tags)
    assert together.meta[FACTS]["n_slices"].tolist() == [3, 1]
    for i in range(2):
        alone = run(image[i : i + 1], nn.Identity(), slice_labels=tags[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


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
    facts = inferer(gate="tags", batch_size=1)(ball(), nn.Identity(), tag_volume([0, 1, 1, 0, 1])).meta[FACTS]
    assert facts["n_slices"].tolist() == [3] and facts["seconds_per_slice"].item() > 0


def test_facts_do_not_enter_the_meta_data_of_the_image():
    image = MetaTensor(ball())
    assert FACTS in inferer()(image, nn.Identity()).meta and FACTS not in image.meta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "tag"}, r"gate must be one of \['classifier', 'tags', 'all'\]; got 'tag'"),
        ({"gate_threshold": 1.5}, r"gate_threshold is a probability.*\[0, 1\]; got 1\.5"),
        ({"gate_threshold": -0.1}, r"gate_threshold is a probability.*\[0, 1\]; got -0\.1"),
        ({"batch_size": 0}, r"batch_size must be >= 1; got 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        inferer(**settings)


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


def test_a_batch_that_does_not_fit_is_halved(caplog):
    sizes = []

    def hungry(x_0, network, slices, most=2):
        sizes.append(len(x_0))
        if len(x_0) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x_0 + 2

    image = ball()
    found = inferer(hungry, batch_size=DEPTH)(image, nn.Identity())
    assert sizes == [5, 2, 2, 1] and "out of memory with batch_size 5; going on with 2" in caplog.text
    assert torch.equal(found, inferer(lambda x_0, *_: x_0 + 2, batch_size=2)(image, nn.Identity()))
    with pytest.raises(torch.OutOfMemoryError):
        inferer(lambda *given: hungry(*given, most=0), batch_size=DEPTH)(image, nn.Identity())
