"""Figures 3 to 5: the values of the results, in their places, with the default marked."""

from __future__ import annotations

import numpy as np
import pytest

from study.figures.sweeps import draw_ablation, draw_strips
from study.results import read_results
from tests.helpers.studies import LARGEST, texts


def test_ablation_shows_the_results(swept):
    results = read_results(swept)
    figure = draw_ablation(results)
    panel = dict(zip(("guidance_scale", "num_steps", "threshold"), figure.axes))
    dice = {row["run"]: row["dice"]["mean"] for row in results.table}
    for knob, axis in panel.items():
        line = next(line for line in axis.lines if line.get_marker() == "o")
        values = [value for value, _ in results.sweeps[knob]]
        assert line.get_ydata() == pytest.approx([dice[f"{knob}={value}"] for value in values])
        assert list(line.get_xdata()) == (values if knob != "threshold" else [0, 1])
    assert panel["guidance_scale"].get_xscale() == "symlog" and panel["num_steps"].get_xscale() == "linear"
    assert [tick.get_text() for tick in panel["guidance_scale"].get_xticklabels()] == ["0", "0.1", "10", "1000"]
    marks = [[line.get_xdata()[0] for line in axis.lines if line.get_marker() == "None"] for axis in panel.values()]
    assert marks == [[10], [10], []]
    assert results.default_of("guidance_scale") == 10 and results.default_of("threshold") is None


def test_strips(swept):
    axes = np.reshape(draw_strips(read_results(swept)).axes, (4, 5))
    assert [texts(axis)[0] for axis in axes[0, 1:]] == ["0", "0.1", "10 (default)", "1000"]
    assert [texts(axis)[:1] for axis in axes[2, 1:]] == [["1"], ["2"], [], []]
    assert texts(axes[0, 0]) == ["guidance scale s"] and texts(axes[2, 0]) == ["steps R"]
    assert texts(axes[1, 0]) == [f"p1\nslice {LARGEST}"], "the first case that is kept"
    assert texts(axes[3, 2])[0] == f"{1 - 4 / 8:.2f}", "p1 moved by 2, and by 2 of R = 2"
