"""A head as the transforms of preparation see it, its scale, and the box of its body."""

from __future__ import annotations

import numpy as np
import torch

from custom_modules.inference.body import ScaleToBodyd, body_box
from examples.phantom import head_phantom

TISSUE = 30  # of the phantom: above its background's noise


def small_head() -> np.ndarray:
    """A head (128, 128, 13) float32 of 0 to 255 with background noise."""
    return np.asarray(head_phantom()[0].dataobj)[::2, ::2, 3:29:2].astype(np.float32)


def scaled(image: np.ndarray) -> np.ndarray:
    return ScaleToBodyd("image")({"image": torch.as_tensor(image)[None]})["image"][0].numpy()


def sides(image: np.ndarray) -> list[int]:
    """First and last row and column of the body's box."""
    box = body_box(torch.as_tensor(scaled(image))[None])[0, ..., 0]
    return [int(edge) for axis in (1, 0) for edge in np.flatnonzero(box.any(axis=axis))[[0, -1]]]


def put(image: np.ndarray, where: tuple, value: float) -> np.ndarray:
    image = image.copy()
    image[where] = value
    return image


def ring_of_fat(ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """A head, (120, 120, 5) bool, and its image float32: tissue in a ring of fat, `ratio` times as bright."""
    random, radius = np.random.default_rng(0), np.hypot(*np.mgrid[-60:60, -60:60])[..., None].repeat(5, axis=2)
    noise = np.abs(random.normal(0, 0.5, radius.shape))
    tissue = random.uniform(5, 15, radius.shape) * np.where(radius <= 42, 1, ratio)
    return radius <= 48, (np.where(radius <= 48, tissue, 0) + noise).astype(np.float32)
