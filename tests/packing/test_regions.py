"""The regions of the TorchScript program are those of SciPy, scikit-image, MONAI and the bundles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import KeepLargestConnectedComponent
from scipy import ndimage
from skimage.filters import threshold_otsu

from custom_modules.inference.body import body_mask
from packing import regions


@pytest.fixture(scope="module", params=range(4))
def blobs(request) -> np.ndarray:
    """Smooth random volume (9, 30, 26), slices first, with many components and holes above its median."""
    return ndimage.gaussian_filter(np.random.default_rng(request.param).normal(size=(9, 30, 26)), 1).astype(np.float32)


def test_otsu_is_scikit_images(blobs):
    for values in (blobs.ravel(), blobs[blobs > 0], np.float32([0, 0, 1, 5]), np.float32([2, 2])):
        assert torch.jit.script(regions.otsu)(torch.as_tensor(values)) == threshold_otsu(values)


@pytest.mark.parametrize("box", [False, True])
def test_components_are_scipys(blobs, box):
    mask = blobs > np.quantile(blobs, 0.6 if box else 0.5)
    labels = regions.components(torch.as_tensor(mask), [0, 1, 2], box).numpy()
    expected, count = ndimage.label(mask, ndimage.generate_binary_structure(3, 3 if box else 1))
    assert count > 2 and np.array_equal(labels > 0, mask)
    assert len({*zip(labels[mask], expected[mask])}) == count == len(np.unique(labels[mask]))


def test_components_follow_a_spiral():
    turns = np.zeros((1, 41, 41), bool)
    for ring in range(0, 20, 2):  # each ring opens into the next
        turns[0, ring, ring : 41 - ring] = turns[0, 40 - ring, ring : 41 - ring] = True
        turns[0, ring : 41 - ring, 40 - ring] = turns[0, ring + 2 : 41 - ring, ring] = True
        turns[0, ring + 2, ring + 1] = True
    expected = ndimage.label(turns)[1]
    assert len(regions.components(torch.as_tensor(turns), [0, 1, 2], False).unique()) == expected + 1 == 2


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_largest_components_are_kept(blobs, count):
    mask = blobs > np.quantile(blobs, 0.8)
    keep = KeepLargestConnectedComponent(is_onehot=False, num_components=count)
    expected = keep(torch.as_tensor(mask[None].astype(np.uint8)))[0].numpy() > 0
    assert np.array_equal(torch.jit.script(regions.largest)(torch.as_tensor(mask), count, True).numpy(), expected)
    assert not regions.largest(torch.zeros(2, 3, 4, dtype=torch.bool), count, True).any()


@pytest.mark.parametrize("erosion", [0, 2])
def test_the_body_is_that_of_the_bundle(blobs, erosion):
    image = blobs + 1.5 * (np.hypot(*np.mgrid[-15:15, -13:13]) < 12)
    expected = np.moveaxis(body_mask(np.moveaxis(image, 0, -1), erosion), -1, 0)
    found = regions.erode(regions.fill_holes(regions.tissue(torch.as_tensor(image))), erosion)
    assert expected.any() and np.array_equal(found.numpy(), expected)
