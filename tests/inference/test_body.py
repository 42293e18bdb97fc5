"""The body: the filled disc without specks, whatever the intensity scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from custom_modules.inference.body import CROSS, _tissue, body_box, body_mask


def disc(radius=12, size=40, slices=3):
    x, y = np.mgrid[:size, :size] - size // 2
    return np.repeat((np.hypot(x, y) <= radius)[..., None], slices, axis=2)


def noisy_disc():
    """Tissue of 50 to 150 in noise of up to 12: half of Otsu's threshold lies between."""
    random = np.random.default_rng(0)
    return np.abs(random.normal(size=(40, 40, 3))) * 3 + random.uniform(50, 150, (40, 40, 3)) * disc()


def test_body_is_the_filled_disc_without_the_speck():
    body = disc()
    image = noisy_disc()
    image[17:22, 18:21, 1] = 0  # a ventricle, an air bubble
    image[2:5, 2:5, :] = 150  # a bright speck outside, large enough to survive the opening
    found = body_mask(image)
    opened = ndimage.binary_opening(body[..., 0], ndimage.generate_binary_structure(2, 1))
    assert (found == opened[..., None]).all()
    assert opened.sum() >= 0.98 * body[..., 0].sum()  # the opening takes single pixels off the rim only

    eroded = body_mask(image, erosion=3)
    expected = ndimage.binary_erosion(opened, ndimage.generate_binary_structure(2, 1), iterations=3)
    assert (eroded == expected[..., None]).all()


def test_body_does_not_depend_on_the_intensity_scale():
    image = noisy_disc()
    assert (body_mask(image) == body_mask(image / 500 - 1)).all()


def test_body_box_spans_all_slices_in_plane():
    image = np.zeros((40, 40, 2), np.float32)
    image[5:15, 20:30, 0] = image[10:25, 20:35, 1] = 1
    box = body_box(torch.as_tensor(image)[None])
    assert box.shape == (1, 40, 40, 2) and torch.equal(box[..., 0], box[..., 1])
    rows, columns = np.nonzero(box[0, ..., 0].numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 24, 20, 34)


@pytest.mark.parametrize("seed", range(9))
def test_slices_are_filled_and_eroded_one_by_one(seed):
    random = np.random.default_rng(seed)
    shape, erosion = (*random.integers(12, 40, 2), random.integers(1, 8)), int(random.integers(1, 4))
    image = ndimage.gaussian_filter(random.normal(size=shape), (2, 2, 0.5))
    filled = [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(_tissue(image), -1, 0)]
    assert np.array_equal(body_mask(image), np.stack(filled, axis=-1))
    eroded = [ndimage.binary_erosion(plane, CROSS, iterations=erosion) for plane in filled]
    assert np.array_equal(body_mask(image, erosion), np.stack(eroded, axis=-1))
