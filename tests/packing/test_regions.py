"""The regions of the TorchScript program are those of SciPy, scikit-image, MONAI and the bundles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import KeepLargestConnectedComponent
from scipy import ndimage
from skimage.filters import threshold_otsu

from custom_modules.inference.body import ScaleToBodyd, body_box, body_mask, find_body
from packing import body, regions
from tests.helpers.heads import ring_of_fat


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
    bright = regions.above_half_otsu(torch.as_tensor(image - image.min()))
    found = regions.erode(regions.fill_holes(bright), erosion)
    assert expected.any() and np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("ratio", [4, 5])
def test_a_ring_of_bright_fat_is_not_the_body(ratio):
    """The body needs a second threshold (test_body.py)."""
    image = torch.as_tensor(np.moveaxis(ring_of_fat(ratio)[1], -1, 0).copy())
    mask = torch.jit.script(body.find_body)(image)[2]
    assert np.array_equal(mask.numpy(), np.moveaxis(find_body(np.moveaxis(image.numpy(), 0, -1)).mask, -1, 0))


@pytest.mark.parametrize("shape", [(9, 90, 78), (8, 91, 80), (1, 60, 50)])
@pytest.mark.parametrize("background", ["noise", "zeros", "padding", "z-scored", "bright slice", "dark", "dead"])
def test_scale_and_box_are_those_of_the_bundle(shape, background):
    """Volumes whose sides are multiples of the blocks, or not; of an even and an odd number of slices, or a single."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    inside = np.hypot(rows - shape[1] / 2, columns - shape[2] / 2) < 20
    image = ndimage.gaussian_filter(random.normal(0, 60, shape), (0, 1, 1)) + 100 * inside
    strays = {name: np.where(np.arange(shape[0])[:, None, None] == 4, image * gain, image)
              for name, gain in (("bright slice", 4), ("dark", 0.3), ("dead", 0))}  # fmt: skip
    image = {
        **strays,
        "noise": image,
        "zeros": image * inside,
        "padding": np.where(rows < 12, -1024, image),
        "z-scored": np.where(inside, image - 100, 0),
    }[background].astype(np.float32)
    volume = torch.as_tensor(np.moveaxis(image, 0, -1).copy())[None]
    expected = ScaleToBodyd("image")({"image": volume})["image"]
    scaled = torch.jit.script(body.scale_to_body)(torch.as_tensor(image))
    torch.testing.assert_close(scaled, expected[0].movedim(-1, 0), rtol=0, atol=1e-6)
    box = torch.as_tensor(body_box(expected)[0, ..., 0].copy())
    bounds = (*regions.bounds(box.any(dim=1), 4), *regions.bounds(box.any(dim=0), 0))
    assert torch.jit.script(body.body_box)(scaled, [4, 0]) == bounds
