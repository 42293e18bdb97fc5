"""The floor: intensities lifted to be positive."""

import torch

from custom_modules.methods.intensity import IntensityFloor


def test_intensity_floor_lifts_intensities_to_be_positive():
    x_0 = torch.tensor([-1.0, 0.0, 0.25, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    saliency = IntensityFloor()(x_0, None, [0])
    assert torch.equal(saliency, torch.tensor([0.0, 1.0, 1.25, 2.0]).view(1, 1, 2, 2))  # x + 1
    assert saliency.dtype == torch.float32
