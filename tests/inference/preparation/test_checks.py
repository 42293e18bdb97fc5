"""Volumes that no method can work on are refused with their case and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom_modules.inference.checks import CheckVolumed


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(array, **case):
    return CheckVolumed(keys="image")({"image": MetaTensor(torch.as_tensor(array)), "case": "p7", **case})["image"]


def with_value(array, value):
    array[0, 0, 0, 1] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (noise(1, 4, 4), "one 3D volume; got 2 dimensions"),
        (noise(3, 4, 4, 2), "4D with 3 channels or time points; split it .*\"channel\": 0"),
        (with_value(noise(1, 4, 4, 2), np.nan), "holds 1 NaN or infinite voxels"),
        (with_value(noise(1, 4, 4, 2), np.inf), "holds 1 NaN or infinite voxels"),
        (np.full((1, 4, 4, 2), 7.5), r"constant \(7.5 everywhere\)"),
    ],
)  # fmt: skip
def test_volumes_no_method_can_work_on(array, message):
    with pytest.raises(ValueError, match=f"case 'p7': the image .*{message}"):
        check(array)


def test_a_channel_is_chosen_by_the_case():
    array = noise(3, 4, 5, 2)
    kept = check(array, channel=1)
    assert kept.shape == (1, 4, 5, 2) and torch.equal(kept[0].as_tensor(), torch.as_tensor(array[1]))
    assert check(array[:1]).shape == (1, 4, 5, 2)
    with pytest.raises(ValueError, match="has 3 channels, but the datalist names channel 3"):
        check(array, channel=3)
