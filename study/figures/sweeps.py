"""The paper's figures 3 to 5: Dice over each swept setting, and the maps and masks of one slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.figures.pictures import LINES, NothingToDraw, annotate, draw_heat, draw_image, draw_mask, panels, tissue
from study.results import Results, Run
from study.volumes import Case

SYMBOLS = {"noise_level": "noise level Q", "num_steps": "steps R", "tau": "tau", "guidance_scale": "guidance scale s"}
STRIPS = ("guidance_scale", "num_steps")


def draw_ablation(results: Results) -> Figure:
    """Draw Dice over each swept setting: mean and, as a band, standard deviation over patients; a line a group.

    Raises:
        NothingToDraw: no setting was swept.
    """
    if not (sweeps := results.sweeps):
        raise NothingToDraw(f"{results.folder} has no runs named knob=value: nothing was swept.")
    columns = min(len(sweeps), 2)
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(sweeps) :]:
        axis.set_visible(False)
    for axis, (knob, sweep) in zip(axes.flat, sweeps.items()):
        places = _scale_axis(axis, [value for value, _ in sweep], results.default_of(knob))
        for colour, group in zip(LINES * len(results.groups), results.groups):
            _sweep_line(axis, places, [run.name for _, run in sweep], results.rows(group), colour, group)
        axis.set_xlabel(SYMBOLS.get(knob, knob), parse_math=False)
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("Dice")
    if len(results.groups) > 1:
        axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _scale_axis(axis: Axes, values: Sequence[object], default: object) -> list[float]:
    """Set up the x axis for the values of a setting and mark the default; return the place of each value.

    Numbers over two decades or more get a logarithmic axis, on which 0 has a place of its own; other values keep the
    order given.
    """
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        places, default = list(range(len(values))), values.index(default) if default in values else None
    else:
        places, positive = list(values), [value for value in values if value > 0]
        if min(values) >= 0 and positive and max(positive) >= 100 * min(positive):
            linear = {"linthresh": min(positive), "linscale": 0.4} if 0 in (*values, default) else {}
            axis.set_xscale("symlog" if linear else "log", **linear)
            axis.set_xticks(places, [f"{value:g}" for value in places])
            axis.minorticks_off()
    if isinstance(default, (int, float)):
        axis.axvline(default, color="0.6", linestyle=(0, (4, 3)), linewidth=1, zorder=0)
        note = {"textcoords": "offset points", "xytext": (3, -1), "fontsize": 8, "color": "0.35", "va": "top"}
        axis.annotate("default", (default, 1), xycoords=("data", "axes fraction"), **note)
    return places


def _sweep_line(
    axis: Axes, places: Sequence[float], runs: Sequence[str], table: Sequence[Mapping], colour: str, group: str
) -> None:
    """Draw one group's Dice over the runs of a sweep, in the order of their places."""
    rows = {row["run"]: row["dice"] for row in table}
    points = sorted((place, rows[run]) for place, run in zip(places, runs) if run in rows)
    x = [place for place, _ in points]
    mean, std = (np.array([dice[key] or 0.0 for _, dice in points]) for key in ("mean", "std_cases"))
    axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
    axis.plot(x, mean, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=group or "all cases")


def draw_strips(results: Results, knobs: Sequence[str] = ()) -> Figure:
    """Draw map and mask of one slice for each value of a setting; two rows a setting.

    The slice is the one with the largest target, of the first case whose volumes are kept. Each map is scaled to its
    own brightest part: their ranges differ by orders of magnitude.

    Args:
        results: of a study with sweeps.
        knobs: settings to show; empty: guidance scale and steps, or where neither was swept all.

    Raises:
        NothingToDraw: nothing was swept, or no volumes are kept.
    """
    sweeps, case = results.sweeps, None
    rows = {}
    for knob in knobs or [knob for knob in STRIPS if knob in sweeps] or sweeps:
        for value, run in sweeps.get(knob, ()):
            case = case or next(iter(run.kept), None)
            if case and (read := run.read(case)):
                rows.setdefault(knob, []).append((value, run, *read))
    if not rows:
        raise NothingToDraw(f"{results.folder} keeps no volumes of swept runs, or their images are gone.")
    figure, axes = panels(2 * len(rows), 1 + max(map(len, rows.values())), 1.3, left=0.36, top=0.04)
    for pair, (knob, columns) in zip(axes.reshape(len(rows), 2, -1), rows.items()):
        _draw_strip(pair, columns, results.default_of(knob))
        annotate(pair[0, 0], SYMBOLS.get(knob, knob), "left")
    return figure


def _draw_strip(pair: np.ndarray, columns: Sequence[tuple[object, Run, int, Case]], default: object) -> None:
    """Draw the two rows (2, columns) of one setting: image and truth first, then map and mask of each value."""
    _, run, _, some = columns[0]
    index = run.largest_slice(some.name)
    image, truth = some.plane(some.image, index), some.plane(some.truth, index)
    for axis in pair[:, : 1 + len(columns)].flat:
        draw_image(axis, image, some.pixel, tissue(image, truth))
    draw_mask(pair[1, 0], None, truth, some.pixel)
    annotate(pair[1, 0], f"{some.name}\nslice {index}", "left", fontsize=6)
    for (above, below), (value, run, repeat, case) in zip(pair[:, 1:].T, columns):
        saliency = case.plane(case.saliency, index)
        draw_heat(above, saliency, float(np.percentile(saliency, 99.8)), case.pixel)
        draw_mask(below, case.plane(case.mask, index), truth, case.pixel)
        annotate(above, f"{value} (default)" if value == default else f"{value}", "upper")
        if (dice := run.slice_dice(case.name, index, repeat)) is not None:
            annotate(below, f"{dice:.2f}", "corner")
