"""Slices resized by matrices: MONAI's `Resized`, there and back, but for rounding."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd, Resized

from custom_modules.inference.resize import ResizeSlicesd


@pytest.mark.parametrize("shape", [(1, 45, 70, 5), (1, 20, 60, 1), (1, 32, 32, 3)])  # shrunk, stretched, as it is
def test_it_equals_monai_there_and_back(shape):
    generator = torch.Generator().manual_seed(0)
    image = MetaTensor(torch.rand(shape, generator=generator), affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    theirs = Resized("image", spatial_size=[32, 32, -1], mode="trilinear", anti_aliasing=True)
    ours = ResizeSlicesd("image", 32)
    pred, found = torch.rand(2, 32, 32, shape[-1], generator=generator), []
    for transform in (theirs, ours):
        item = transform({"image": image})
        item["pred"] = MetaTensor(pred)
        back = Invertd("pred", transform, "image", nearest_interp=False)(item)["pred"]
        assert back.shape[1:] == shape[1:] and back.applied_operations == []
        found.append((item["image"], back))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.as_tensor(), b.as_tensor(), rtol=0, atol=1e-6)
        torch.testing.assert_close(a.affine, b.affine)
