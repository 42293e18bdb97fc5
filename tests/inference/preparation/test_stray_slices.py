"""One bad slice of a volume: brought to its neighbours' level, or replaced by them; lesions are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.heads import TISSUE, put, scaled, sides, small_head


@pytest.fixture(scope="module")
def phantom() -> np.ndarray:
    return small_head()


@pytest.mark.parametrize("factor", [4.0, 2.0, 0.4, 0.2])
def test_one_slice_of_another_brightness_is_brought_to_its_neighbours_level(factor, phantom, caplog):
    """The middle one of 13, to what the median of three on either side have: within a tenth of what it was."""
    expected = scaled(phantom)
    assert not caplog.text  # in the plain volume no slice strays
    changed = phantom.copy()
    changed[..., 6] *= factor
    found = scaled(changed)
    assert "slices [6] are far brighter or darker" in caplog.text
    assert np.abs(np.delete(found - expected, 6, axis=2))[np.delete(phantom, 6, axis=2) > TISSUE].max() < 0.1
    tissue = phantom[..., 6] > TISSUE
    assert np.median(found[..., 6][tissue] / expected[..., 6][tissue]) == pytest.approx(1, abs=0.1)


def test_a_dead_slice_is_the_mean_of_its_neighbours(phantom):
    found = scaled(put(phantom, (..., 6), 3.0))
    difference = np.abs(found[..., 6] - scaled(phantom)[..., [5, 7]].mean(-1))
    assert np.percentile(difference, 95) < 0.02  # the mean is taken before what is bright saturates
    assert np.array_equal(sides(put(phantom, (..., 6), 3.0)), sides(phantom))


def test_a_bright_lesion_makes_no_stray_slice(phantom, caplog):
    """In two of 13 slices, over a tenth of the head, three times as bright as its surroundings."""
    lesion = phantom.copy()
    lesion[40:80, 40:70, 6:8] *= 3
    scaled(lesion)
    assert not caplog.text


def test_a_dark_slice_at_an_end_stays(phantom):
    dark = phantom.copy()
    dark[..., 0] *= 0.1
    assert scaled(dark)[..., 0].max() < 0.25
