"""How sure a mask is: entropy and expected Dice by hand, from the votes of several maps or one map of probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from custom_modules.inference.mask import SaliencyToMaskd
from tests.helpers.inferers import LPS, answer, two_blobs


def votes() -> list[np.ndarray]:
    """Four maps (4, 4, 1) above 0.5 in 4, 4, 2 and 2 pixels of the first row; only two are in all of them."""
    maps = np.zeros((4, 4, 4, 1), np.float32)
    maps[:, 0, :2], maps[:2, 0, 2:] = 1, 0.8
    return list(maps)


def test_the_mask_of_several_maps_is_that_of_their_mean():
    maps = votes()
    settings = {"threshold": 0.5, "num_components": 0}
    out = SaliencyToMaskd(**settings)({"pred": answer(*maps)})
    assert "uncertainty" not in out and "expected_dice" not in out
    torch.testing.assert_close(out["saliency"][0].as_tensor(), torch.as_tensor(np.mean(maps, axis=0)))
    assert torch.equal(out["pred"][0, 0, :, 0].as_tensor(), torch.tensor([1, 1, 0, 0]).byte())  # means 1, 1, 0.4, 0.4
    unsure = SaliencyToMaskd(**settings, uncertainty=True)({"pred": answer(*maps)})
    assert torch.equal(unsure["pred"], out["pred"]) and torch.equal(unsure["saliency"], out["saliency"])


def test_uncertainty_is_the_entropy_of_the_votes():
    maps = votes()
    maps[0][0, 2:] = 0  # 1 of 4 is left there
    out = SaliencyToMaskd(threshold=0.5, num_components=0, uncertainty=True)({"pred": answer(*maps), "stem": "p1"})
    entropy = out["uncertainty"]
    assert entropy.shape == (1, 4, 4, 1) and entropy.dtype == torch.float32
    # H(1/4) = 1/4 log2 4 + 3/4 log2 (4/3); all agree about the others
    assert entropy[0, 0, :, 0].tolist() == pytest.approx([0, 0, 0.811278, 0.811278])
    assert not entropy[0, 1:].any() and entropy.isfinite().all()
    np.testing.assert_array_equal(entropy.affine, LPS)
    assert entropy.meta["filename_or_obj"] == "p1.nii.gz"
    # the mask is the first two pixels; the four masks hold 2, 4, 2 and 2: Dice 1, 2 * 2 / (2 + 4), 1, 1
    assert out["expected_dice"] == pytest.approx((1 + 4 / 6 + 1 + 1) / 4)


def test_halves_are_one_bit_and_disagreement_costs_dice():
    maps = [np.zeros((4, 4, 1), np.float32) for _ in range(2)]
    maps[0][0], maps[1][1] = 1, 1
    out = SaliencyToMaskd(threshold=0.4, num_components=0, uncertainty=True)({"pred": answer(*maps)})
    assert out["uncertainty"][0, :2].unique().tolist() == [1] and not out["uncertainty"][0, 2:].any()
    assert out["pred"].sum() == 8  # the mean is 0.5 in either row
    assert out["expected_dice"] == pytest.approx(2 * 4 / (8 + 4))


def test_each_vote_has_its_own_threshold_and_components():
    """Otsu of a map that is ten times as high, and the largest of its two components."""
    maps = [two_blobs() for _ in range(2)]
    maps[1] = 10 * np.where(maps[1] == 3, 1, maps[1]).astype(np.float32)
    out = SaliencyToMaskd(num_components=1, uncertainty=True)({"pred": answer(*maps)})
    one, ten = (SaliencyToMaskd(num_components=1)({"pred": answer(m)})["pred"].as_tensor() > 0 for m in maps)
    assert one.any() and not torch.equal(one, ten)
    assert torch.equal(out["uncertainty"].as_tensor() > 0.5, one ^ ten)  # 1 bit where the two disagree
    mask = out["pred"].as_tensor() > 0
    dice = [2 * (mask & vote).sum() / (mask.sum() + vote.sum()) for vote in (one, ten)]
    assert out["expected_dice"] == pytest.approx(float(sum(dice) / 2))


def test_of_a_single_map_the_value_is_the_probability():
    p = np.zeros((4, 4, 1), np.float32)
    p[0] = np.array([1, 0.75, 0.5, 0.25])[:, None]
    region = np.ones_like(p)
    region[3], p[3] = 0, 0.5  # does not count
    settings = {"threshold": 0.5, "num_components": 0, "uncertainty": True}
    out = SaliencyToMaskd(**settings)({"pred": answer(p, region=region)})
    assert out["uncertainty"][0, 0, :, 0].tolist() == pytest.approx([0, 0.811278, 1, 0.811278])
    assert not out["uncertainty"][0, 1:].any()
    # the mask is the pixels of 1 and 0.75: 2 sum(p mask) / (sum(p) + sum(mask)) = 2 * 1.75 / (2.5 + 2)
    assert out["expected_dice"] == pytest.approx(3.5 / 4.5)


@pytest.mark.parametrize("number", [1, 3])
def test_where_nothing_is_expected_there_is_no_dice(number):
    zero = [np.zeros((4, 4, 1), np.float32)] * number
    for region in (None, np.zeros((4, 4, 1), np.float32)):
        out = SaliencyToMaskd(uncertainty=True)({"pred": answer(*zero, region=region)})
        assert out["expected_dice"] is None and not out["uncertainty"].any() and not out["pred"].any()
