"""A synthetic FLAIR volume of a head with a lesion whose true mask is known, so that the demo needs no data set.

The look follows routine FLAIR with the skull on: scalp fat brighter than anything else, a dark skull, dark CSF in
folded sulci and ventricles, a cortex a little brighter than the white matter, bright caps at the ventricles, a coil
profile, thick slices and Rician noise. The lesion is a blurred, lobed brightening of the white matter that several
healthy structures match in intensity, so a threshold on the intensities does not find it.

Coordinates are millimetres, (x, y, z) towards left, posterior and superior, 0 between the lateral ventricles.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
from scipy import ndimage

SHAPE = (256, 256, 32)  # thick axial slices
SPACING = (0.9, 0.9, 4.0)  # mm
CENTRE = (127.5, 124.0, 12.0)  # the index at 0 mm

# Intensities before coil profile and noise, in the 0..255 of an 8-bit export
CSF, WHITE, GREY, DEEP_GREY, SKULL, MUSCLE, FAT, EYE = 16, 56, 68, 63, 9, 42, 190, 16
LESION_GAIN = 0.60  # relative brightening in the middle of the lesion


def head_phantom(seed: int = 0) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Draw one head.

    Args:
        seed: of the folds, the lesion's outline and place, the coil profile and the noise.

    Returns:
        The volume (256, 256, 32) uint8 and its lesion mask (same shape and affine) uint8 0/1, both stored L, P, S.
    """
    rng = np.random.default_rng(seed)
    at = np.meshgrid(*[(np.arange(n) - c) * s for n, c, s in zip(SHAPE, CENTRE, SPACING)], indexing="ij", sparse=True)
    at = [a + 2.5 * _field(rng, 110) for a in at]  # nobody's head is a set of ellipsoids

    cavity, cerebellum = _cranial_cavity(at)
    fluid = _fluid(rng, at, cavity, cerebellum)
    image = np.where(cavity, _brain(rng, at, cerebellum, **fluid), _outside(rng, at, cavity))

    cerebrum = cavity & ~cerebellum & (np.minimum.reduce(list(fluid.values())) > 0)
    lesion, weight = _lesion(rng, at, cerebrum)
    image = image * (1 + LESION_GAIN * weight)

    image = ndimage.gaussian_filter(image, [0.6 / s for s in SPACING])  # point spread
    image = image * np.exp(0.13 * _field(rng, 75) + 0.05 * _field(rng, 30))  # coil profile
    noise = rng.normal(0, 2.2, (2, *SHAPE))
    image = np.hypot(image + noise[0], noise[1])  # Rician
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])  # NIfTI counts right, anterior, superior
    affine[:3, 3] = -affine[:3, :3] @ CENTRE
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return nib.Nifti1Image(image, affine), nib.Nifti1Image(lesion.astype(np.uint8), affine)


def _field(rng: np.random.Generator, wavelength: float) -> np.ndarray:
    """A smooth Gaussian random field over the volume, mean 0, deviation 1; `wavelength` in mm."""
    coarse = [max(1.0, wavelength / 10 / s) for s in SPACING]  # filtered on a coarse grid: the same field, sooner
    small = rng.standard_normal([int(np.ceil(n / c)) + 1 for n, c in zip(SHAPE, coarse)], dtype=np.float32)
    small = ndimage.gaussian_filter(small, [wavelength / 4 / (s * c) for s, c in zip(SPACING, coarse)])
    grid = [np.arange(n) / c for n, c in zip(SHAPE, coarse)]
    for axis, points in enumerate(grid):  # separable linear interpolation
        low = np.floor(points).astype(int)
        part = (points - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        small = small.take(low, axis) * (1 - part) + small.take(low + 1, axis) * part
    return (small - small.mean()) / small.std()


def _ellipsoid(at, centre, radii, power: float = 2.0) -> np.ndarray:
    """Below 1 inside, about 1 + distance / radius outside; `power` above 2 makes it boxier."""
    return sum(np.abs((a - c) / r) ** power for a, c, r in zip(at, centre, radii)) ** (1 / power)


def _distance(mask: np.ndarray) -> np.ndarray:
    """Distance in mm of each voxel of `mask` to the nearest voxel outside it."""
    return ndimage.distance_transform_edt(mask, sampling=SPACING)


def _tube(at, points, radii) -> np.ndarray:
    """Signed distance in mm (negative inside) to a tube along a polyline whose radius changes linearly."""
    nearest = np.inf
    for p, q, r, s in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
        line = np.subtract(q, p)
        along = sum((a - c) * d for a, c, d in zip(at, p, line)) / (line @ line)
        along = np.clip(along, 0, 1)
        gap = np.sqrt(sum((a - c - along * d) ** 2 for a, c, d in zip(at, p, line)))
        nearest = np.minimum(nearest, gap - (r + (s - r) * along))
    return nearest


def _both_sides(at) -> list:
    """Coordinates with x folded at the midline, for structures that come in pairs."""
    return [np.abs(at[0]), at[1], at[2]]


def _cranial_cavity(at) -> tuple[np.ndarray, np.ndarray]:
    """What the skull encloses, and the cerebellum with the brain stem in it; both (H, W, D) bool."""
    pair = _both_sides(at)
    vault = _ellipsoid(at, (0, 2, 2), (65, 86, 68), 2.25)
    vault = np.where(at[2] < -16, 9.0, vault)
    temporal = _ellipsoid(pair, (37, 6, -18), (29, 44, 24))
    fossa = _ellipsoid(at, (0, 42, -32), (56, 40, 36))
    stem = _tube(at, [(0, 14, -80), (0, 10, -34)], [13, 14]) < 0
    cerebellum = stem | (_ellipsoid(at, (0, 44, -42), (52, 34, 27)) < 1)
    return np.minimum(np.minimum(vault, temporal), fossa) < 1, cerebellum


def _outside(rng, at, cavity: np.ndarray) -> np.ndarray:
    """Skull, scalp, orbits and face around the cavity, air elsewhere: intensities (H, W, D)."""
    pair = _both_sides(at)
    outward = _distance(~cavity)
    skull = 5.5 + 0.9 * _field(rng, 60)
    scalp = skull + 5.0 + 0.8 * _field(rng, 70) + 2.0 * (at[1] > 60)
    face = _ellipsoid(at, (0, -52, -48), (56, 52, 52)) < 1
    head = (outward < scalp) | face | (_ellipsoid(at, (0, 20, -60), (62, 70, 40)) < 1)
    depth = _distance(head)

    image = np.where(head, MUSCLE * (1 + 0.35 * _field(rng, 9)), 0.0)
    image = np.where(head & (_field(rng, 16) > 1.1), 0.7 * FAT, image)
    fat = FAT * (0.8 + 0.12 * _field(rng, 14) + 0.12 * _field(rng, 60))
    fat = fat * (1 - 0.5 * np.clip((at[2] - 45) / 25, 0, 1))  # at the vertex thick slices cut the layers aslant
    image = np.where(head & (depth < 4.5), fat, image)
    image = np.where(head & (depth < 1.5), 0.4 * FAT, image)  # skin
    image = np.where(outward < skull, SKULL, image)
    marrow = np.abs(outward - 0.5 * skull) < 0.9 + 0.6 * _field(rng, 30)
    image = np.where(marrow & head, 40 * (1 + 0.3 * _field(rng, 12)), image)
    image = np.where(_ellipsoid(at, (0, -72, -50), (13, 26, 26)) < 1, SKULL, image)  # nasal cavity
    image = np.where(_ellipsoid(at, (0, -84, -6), (20, 6, 9)) < 1, SKULL, image)  # frontal sinus
    orbit = ~cavity & (_ellipsoid(pair, (32, -68, -30), (18, 27, 15)) < 1)
    image = np.where(orbit, 0.8 * FAT, image)
    muscle, nerve = ([(24, -40, -30), front] for front in ((20, -72, -30), (32, -70, -30)))
    image = np.where(orbit & (np.minimum(_tube(pair, muscle, [2, 3]), _tube(pair, nerve, [2, 2])) < 0), MUSCLE, image)
    return np.where(_ellipsoid(pair, (32, -79, -30), (12, 12, 12)) < 1, EYE, image)


def _core(at) -> np.ndarray:
    """Below 1 in the callosum and the nuclei, where the hemispheres are joined and nothing folds."""
    return _ellipsoid(at, (0, 4, 2), (30, 46, 26))


def _fluid(rng, at, cavity: np.ndarray, cerebellum: np.ndarray) -> dict[str, np.ndarray]:
    """CSF spaces in the cavity as signed distances, (H, W, D), about mm and negative in the fluid."""
    pair = _both_sides(at)
    depth = _distance(cavity)
    fold = [_field(rng, 24), _field(rng, 24)]
    steep = [np.sqrt(sum(g**2 for g in np.gradient(f, *SPACING))) + 0.02 for f in fold]
    sulci = np.minimum(np.abs(fold[0]) / steep[0], np.abs(fold[1]) / steep[1])  # mm to the zero sheets of two fields
    sulci = sulci + 0.14 * np.maximum(depth - 3, 0)  # they end in the depth
    sulci = sulci - 1.1 - 0.6 * _field(rng, 40)  # and differ in width
    falx = np.abs(at[0] + 1.5 * _field(rng, 30)) - 1.1 + 4 * np.clip(1.15 - _core(at), 0, None)
    sylvian = _tube(pair, [(66, -4, -4), (44, -10, -2), (41, 14, 6), (50, 26, 14)], [2.6, 2.2, 1.6, 0.4])
    cleft = np.abs(_distance(cerebellum) - _distance(~cerebellum)) - 1.1
    cistern = _tube(at, [(0, -14, -22), (0, -2, -20), (0, 30, -16)], [9, 7, 6])
    outer = depth - 1.6 - 0.7 * _field(rng, 30)
    lateral = [(7, -36, 4), (8, -14, 14), (11, 8, 19), (20, 28, 10), (25, 40, 4), (24, 54, 2)]
    uneven = [pair[0] + np.sign(at[0]), *pair[1:]]
    ventricles = np.minimum.reduce(
        [
            _tube(uneven, lateral, [5.0, 5.2, 4.6, 6.5, 5.5, 1.5]),
            _tube(at, [(0, -8, -10), (0, 14, -4)], [1.8, 1.8]),
            _tube(at, [(0, 28, -50), (0, 30, -34)], [5, 3]),
        ]
    )
    folds = np.minimum.reduce([outer, sylvian, np.where(cerebellum, 9.0, np.minimum(sulci, falx))])
    cisterns = np.minimum(cleft, np.where(cerebellum, 9.0, cistern))
    return {"folds": folds, "sylvian": sylvian, "ventricles": ventricles, "cisterns": cisterns}


def _brain(rng, at, cerebellum: np.ndarray, folds, sylvian, ventricles, cisterns) -> np.ndarray:
    """Intensities of brain and CSF, (H, W, D), given the distances of `_fluid`."""
    pair, core = _both_sides(at), _core(at)
    ribbon = _soft(3.0 + 0.6 * _field(rng, 20) - folds) * (core > 0.9)  # cortex lines the folds
    image = WHITE + (GREY - WHITE) * ribbon
    nuclei = np.minimum.reduce(
        [
            _ellipsoid(pair, (11, 10, 0), (8, 14, 9)),  # thalamus
            _ellipsoid(pair, (26, -4, -2), (5, 16, 10)),  # putamen
            _ellipsoid(pair, (13, -22, 8), (4, 9, 9)),  # head of the caudate
        ]
    )
    image = image + (DEEP_GREY - WHITE) * _soft(8 * (1 - nuclei))
    caps = np.exp(-((np.maximum(ventricles, 0) / 3.2) ** 2)) * np.clip(0.55 + 0.5 * _field(rng, 22), 0, 1.3)
    image = image * (1 + 0.55 * caps * (core < 1.5) * ~cerebellum)
    image = image * (1 + 0.15 * np.exp(-((np.maximum(sylvian, 0) / 5.0) ** 2)))  # the insula stands out on FLAIR
    folia = np.sin(_ellipsoid(at, (0, 22, -30), (40, 30, 24)) * 28 + 1.5 * _field(rng, 20))
    image = np.where(cerebellum, 61 + 4 * folia * (np.abs(at[0]) > 9), image)
    image = image * (1 + 0.03 * _field(rng, 8) + 0.05 * _field(rng, 30))

    fluid = _soft(-np.minimum.reduce([folds, ventricles, cisterns]), 1.0)
    plexus = np.exp(-((_ellipsoid(pair, (21, 32, 8), (4, 6, 5)) / 0.9) ** 2))
    return image * (1 - fluid) + fluid * (CSF + 75 * plexus)


def _soft(mm: np.ndarray, width: float = 0.9) -> np.ndarray:
    """0 to 1 across a border at 0 mm; `width` models partial volume."""
    return 0.5 * (1 + np.tanh(mm / width))


def _lesion(rng, at, tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A lobed lesion of the white matter: mask (H, W, D) bool, and its weight in [0, 1] with a blurred border."""
    side = rng.choice((-1, 1))
    centre = (side * rng.uniform(31, 37), rng.uniform(-22, 20), rng.uniform(20, 30))
    radius = rng.uniform(18, 21)
    level = _ellipsoid(at, centre, (radius, 1.3 * radius, radius)) + 0.17 * _field(rng, 26) + 0.05 * _field(rng, 10)
    lesion = tissue & (level < 1)
    labels, _ = ndimage.label(lesion)
    lesion = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    weight = _soft(radius * (1 - level), 2.5) * np.clip(0.9 + 0.16 * _field(rng, 18), 0, 1.25)
    return lesion, weight * tissue
