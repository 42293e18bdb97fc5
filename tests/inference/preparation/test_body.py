"""The body and the scale of intensities: what artefacts, offsets and padding do not change, and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, Invertd, Resized
from scipy import ndimage

from custom_modules.inference.body import (
    BLOCK,
    CROSS,
    UPPER,
    ScaleToBodyd,
    _largest_bright,
    body_box,
    body_mask,
    find_body,
)
from tests.helpers.heads import TISSUE, put, ring_of_fat, scaled, sides, small_head

BOX = (slice(40, 60), slice(50, 70), slice(2, 7))  # 400 pixels of 128 x 128, in five of 13 slices


@pytest.fixture(scope="module")
def phantom() -> np.ndarray:
    return small_head()


def salted(image: np.ndarray) -> np.ndarray:
    salt = np.random.default_rng(0).random(image.shape) < 0.03
    return np.where(salt, 4 * image.max(), image)


CHANGES = {  # name: (change, largest difference of the scaled tissue that is not itself changed)
    "scale": (lambda x: x * 3, 1e-6),
    "offset": (lambda x: x / 100 + 1000, 1e-3),  # float32 keeps four digits of the tissue's range
    "negative": (lambda x: x - 500, 1e-5),
    "cold voxel": (lambda x: put(x, (0, 0, 0), -5000), 1e-6),
    "hot voxel": (lambda x: put(x, (5, 5, 5), 1e6), 1e-6),
    "artefact": (lambda x: put(x, BOX, 4 * x.max()), 0.06),
    "salt": (salted, 0.03),
}


@pytest.mark.parametrize("name", CHANGES)
def test_body_and_scale_do_not_follow(name, phantom):
    change, tolerance = CHANGES[name]
    changed, expected = scaled(change(phantom)), scaled(phantom)
    same = phantom > TISSUE
    if name == "artefact":
        same[BOX] = False
    elif name == "salt":
        same &= changed < 0.999
    assert np.abs(changed - expected)[same].max() < tolerance
    assert np.abs(np.subtract(sides(change(phantom)), sides(phantom))).max() <= (
        BLOCK if name in ("artefact", "salt") else 0
    )


def test_the_scale_is_proportional(phantom):
    one, three = find_body(phantom), find_body(phantom * 3)
    assert (three.low, three.level) == (3 * one.low, 3 * one.level) and np.array_equal(one.mask, three.mask)


def test_padding_becomes_background(phantom):
    padded = np.pad(phantom, [(18, 18), (18, 18), (0, 0)], constant_values=-1024)
    found = scaled(padded)
    inside, rim = found[18:-18, 18:-18], np.ones(padded.shape, bool)
    rim[18:-18, 18:-18] = False
    assert np.abs(inside - scaled(phantom))[phantom > TISSUE].max() < 0.02
    assert found[rim].max() < 0.02
    assert np.abs(np.subtract(sides(padded), 18) - sides(phantom)).max() <= BLOCK


def test_zeros_around_z_scored_tissue_become_background(phantom):
    head = body_mask(scaled(phantom))
    plain, inside = np.where(head, phantom, 0), ndimage.binary_erosion(head, CROSS[..., None], iterations=3)
    z_scored = np.where(head, (phantom - phantom[head].mean()) / phantom[head].std(), 0).astype(np.float32)
    assert find_body(z_scored).filling is not None
    found, expected = scaled(z_scored), scaled(plain)
    assert found[~head].max() < 0.1
    assert np.corrcoef(found[inside], expected[inside])[0, 1] > 0.97
    assert np.abs(np.subtract(sides(z_scored), sides(plain))).max() <= BLOCK


def test_the_zeros_around_even_tissue_are_its_background():
    """No padding, though far below: an ellipse does not fill its box."""
    image = np.where(disc(15, 45), 100, 0).astype(np.float32)
    image[18:27, 18:27] = 180  # a lesion
    body = find_body(image)
    assert (body.low, body.level, body.filling) == (0, 180, None) and body.mask.sum() > 200


@pytest.mark.parametrize("ratio", [2, 4, 5, 20])
def test_a_ring_of_bright_fat_is_not_the_body(ratio):
    """At 4 and 5, half of Otsu's threshold lies above most of what the fat surrounds."""
    head, image = ring_of_fat(ratio)
    assert 9 * find_body(image).mask.sum() > 0.9 * head.sum()


def test_empty_slices_at_the_ends_do_not_count(phantom):
    longer = np.pad(phantom, [(0, 0), (0, 0), (3, 2)])
    assert np.abs(scaled(longer)[..., 3:-2] - scaled(phantom))[phantom > TISSUE].max() < 0.03
    assert sides(longer) == pytest.approx(sides(phantom), abs=BLOCK)


def test_one_slice_is_a_volume(phantom):
    one = phantom[..., 4:5]
    rows, columns = np.nonzero(ndimage.binary_opening(one[..., 0] > TISSUE, CROSS))
    assert sides(one) == pytest.approx([rows.min(), rows.max(), columns.min(), columns.max()], abs=2 * BLOCK)
    assert np.median(scaled(one)[one > 50]) == pytest.approx(np.median(scaled(phantom)[..., 4:5][one > 50]), abs=0.1)


def test_values_by_hand():
    """Blocks of one value each: the tissue is 100, 300 and 200, so its level is 200 (of 300, 300 and 200: 300)."""
    blocks = np.full((10, 10, 3), 20, np.float32)
    blocks[2:8, 2:8] = [100, 300, 200]
    image = np.kron(blocks, np.ones((3, 3, 1), np.float32))
    image[0, 0, :] = -9  # one pixel in a block is not its median
    body = find_body(image)
    opened = ndimage.binary_opening(blocks > 50, CROSS[..., None])
    assert (body.low, body.level, body.filling) == (20, 200, None) and np.array_equal(body.mask, opened)
    r = np.array([0, 80, 280, 180]) / (UPPER * 180)
    expected = r / (1 + r**8) ** 0.125
    found = scaled(image)
    assert found[0, 0, 0] == 0  # below the background
    np.testing.assert_allclose([found[5, 5, 0], *found[15, 15]], expected, rtol=1e-6)
    assert find_body(np.where(image == 100, 300, image)).level == 300


def test_any_input_becomes_float32_with_its_meta_data(phantom):
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1], dtype=torch.float64))
    expected = scaled(phantom)
    for dtype in (torch.float16, torch.float64, torch.uint8):
        image = MetaTensor(torch.as_tensor(phantom)[None].to(dtype), affine=affine)
        found = ScaleToBodyd("image")({"image": image})["image"]
        assert found.dtype == torch.float32 and torch.equal(found.affine, affine)
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def test_resizing_pads_with_the_background_and_inverts(phantom):
    """The image's rim is at 1000: resizing with anti-aliasing sees 0 beyond it, which the scale has made its own."""
    crop = CropForegroundd("image", source_key="image", select_fn=body_box, margin=[4, 4, 0], allow_smaller=True)
    size = Resized("image", spatial_size=[32, 32, -1], mode="trilinear", anti_aliasing=True)
    prepare = Compose([ScaleToBodyd("image"), crop, size])
    for offset in (0, 1000):
        item = prepare({"image": MetaTensor(torch.as_tensor(phantom + offset)[None])})
        assert 0 <= item["image"].min() and item["image"][0, :2].mean() < 0.1
    item["pred"] = MetaTensor(torch.ones_like(item["image"].as_tensor()))
    back = Invertd("pred", prepare, "image")(item)["pred"]
    rows, columns = np.nonzero(back[0, ..., 0].numpy())
    assert back.shape[1:] == phantom.shape
    expected = np.clip(np.add(sides(phantom), [-4, 4, -4, 4]), 0, 127)
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == expected.tolist()


@pytest.mark.parametrize(
    "image", [np.eye(40)[..., None], np.eye(2)[..., None], np.random.default_rng(0).random((6, 6, 2))]
)
def test_no_body_is_an_error_that_names_the_case(image):
    with pytest.raises(ValueError, match="case 'p7': the image shows no body.*leave the case out"):
        ScaleToBodyd("image")({"image": torch.as_tensor(image)[None], "case": "p7"})


def disc(radius=12, size=40, slices=3):
    x, y = np.mgrid[:size, :size] - size // 2
    return np.repeat((np.hypot(x, y) <= radius)[..., None], slices, axis=2)


def noisy_disc():
    """Tissue of 50 to 150 in noise of up to 12: half of Otsu's threshold lies between."""
    random = np.random.default_rng(0)
    return np.abs(random.normal(size=(40, 40, 3))) * 3 + random.uniform(50, 150, (40, 40, 3)) * disc()


def test_the_mask_is_the_filled_disc_without_the_speck():
    body = disc()
    image = noisy_disc()
    image[17:22, 18:21, 1] = 0  # a ventricle, an air bubble
    image[2:5, 2:5, :] = 150  # a bright speck outside, large enough to survive the opening
    found = body_mask(image)
    opened = ndimage.binary_opening(body[..., 0], CROSS)
    assert (found == opened[..., None]).all()
    assert opened.sum() >= 0.98 * body[..., 0].sum()  # the opening takes single pixels off the rim only
    eroded = body_mask(image, erosion=3)
    assert (eroded == ndimage.binary_erosion(opened, CROSS, iterations=3)[..., None]).all()
    assert (body_mask(image / 500 - 1) == found).all()


def test_body_box_spans_all_slices_in_plane():
    body = np.zeros((41, 40, 2), bool)  # 13 blocks of 3 and a rest, in both directions
    body[6:15, 21:30, 0] = body[9:24, 21:36, 1] = True
    image = body * np.random.default_rng(0).uniform(20, 150, body.shape)
    box = body_box(torch.as_tensor(image)[None])
    assert box.shape == (1, 41, 40, 2) and np.array_equal(box[..., 0], box[..., 1])
    rows, columns = np.nonzero(box[0, ..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 23, 21, 35)


@pytest.mark.parametrize("seed", range(9))
def test_slices_are_filled_and_eroded_one_by_one(seed):
    random = np.random.default_rng(seed)
    shape, erosion = (*random.integers(12, 40, 2), random.integers(1, 8)), int(random.integers(1, 4))
    image = ndimage.gaussian_filter(random.normal(size=shape), (2, 2, 0.5))
    filled = [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(_largest_bright(image - image.min()), -1, 0)]
    assert np.array_equal(body_mask(image), np.stack(filled, axis=-1))
    eroded = [ndimage.binary_erosion(plane, CROSS, iterations=erosion) for plane in filled]
    assert np.array_equal(body_mask(image, erosion), np.stack(eroded, axis=-1))
