"""The paper's figures, from a study's folder.

    python -m study.figures comparison OUT --output comparison.png     figure 2: the masks of all methods
    python -m study.figures ablation OUT --output ablation.png         figure 3: Dice over each swept setting
    python -m study.figures strips OUT --output strips.png             figures 4, 5: one slice over s and R
    python -m study.figures uncertainty OUT --output uncertainty.png   how sure the masks are
    python -m study.figures denoising --config_file bundles/X/configs/inference.yaml --case FILE --output x.png

`OUT` is the output folder of `study.runner`; of the fourth, of an evaluation. The last, figure 1, stands in
`study.denoising`: it alone needs the network. FILE is an image, beside which its label is looked for; knobs of
the bundle may follow.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.denoising import denoising
from study.pictures import NothingToDraw, annotate, draw_heat, draw_image, draw_mask, panels, save, tissue
from study.results import Case, Results, Run, read_results
from study.uncertainty import uncertainty

SYMBOLS = {"noise_level": "noise level Q", "num_steps": "steps R", "tau": "tau", "guidance_scale": "guidance scale s"}
STRIPS = ("guidance_scale", "num_steps")
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # told apart by colour-blind eyes (Okabe and Ito)


def draw_study(output_dir: str | Path) -> list[Path]:
    """Writes every figure that a study's folder has the runs and the volumes for, into that folder.

    Returns:
        The files: `comparison.png` where methods were compared, `ablation.png` and `strips.png` where settings were.
    """
    results, written = read_results(output_dir), []
    for name, draw in (("comparison", comparison), ("ablation", ablation), ("strips", strips)):
        try:
            written.append(save(draw(results), results.folder / f"{name}.png"))
        except NothingToDraw:  # not this kind of study, or the volumes are gone
            continue
    return written


# Figure 2: the masks of all methods


def comparison(
    results: Results, groups: Sequence[str] | None = None, reference: str = "cdm", cases: Sequence[str] = ()
) -> Figure:
    """The masks of all runs, for the best, median and worst case of each group, on the slice with the largest target.

    Args:
        results: of a study.
        groups: those to draw; None: all.
        reference: run by whose Dice the cases are ranked; where there is none, the best label-only run.
        cases: draw these instead.

    Raises:
        NothingToDraw: if there is nothing to compare, or no volumes of these cases.
    """
    rows = []
    for group in results.groups if groups is None else groups:
        if run := _ranking_run(results, group, reference):
            dice = run.dice(group)
            picks = [("case", case) for case in cases if case in dice] if cases else ranked(dice)
            rows += [(run, rank, case, read) for rank, case in picks if (read := _read_all(results.compared, case))]
    if not rows:
        raise NothingToDraw(f"{results.folder} keeps no volumes of runs to compare, or their images are gone.")
    figure, axes = panels(len(rows), 2 + len(results.compared), 1.5, left=0.36)
    for line, (run, rank, case, read) in zip(axes, rows):
        index = run.largest_slice(case)
        _compare(line, results.compared, read, index)
        annotate(line[0], f"{rank}, slice {index}\n{case}", "left", fontsize=7)
    for axis, name in zip(axes[0], ("image", "truth", *(run.name for run in results.compared))):
        annotate(axis, name)
    return figure


def ranked(dice: Mapping[str, float]) -> list[tuple[str, str]]:
    """[(best, case), (median, case), (worst, case)] by Dice; of two cases best and worst, of one the best."""
    order = sorted(dice, key=lambda case: (-dice[case], case))
    ranks: dict[int, str] = {}
    for rank, place in (("best", 0), ("worst", len(order) - 1), ("median", len(order) // 2)):
        ranks.setdefault(place, rank)
    return [(rank, order[place]) for place, rank in sorted(ranks.items())] if order else []


def _ranking_run(results: Results, group: str, name: str) -> Run | None:
    named = next((run for run in results.compared if run.name == name), None)
    return named or results.best(group) or next(iter(results.compared), None)


def _read_all(runs: Sequence[Run], case: str) -> dict[str, tuple[int, Case]]:
    """{run: (repeat, case)} of the runs that keep the volumes of a case."""
    return {run.name: read for run in runs if (read := run.read(case))}


def _compare(line: Sequence[Axes], runs: Sequence[Run], read: Mapping[str, tuple[int, Case]], index: int) -> None:
    """One row: image, truth, and the masks of `runs`."""
    some = next(iter(read.values()))[1]
    image, truth = some.plane(some.image, index), some.plane(some.truth, index)
    frame = tissue(image, truth)
    for axis in line:
        draw_image(axis, image, some.pixel, frame)
    draw_mask(line[1], truth, truth, some.pixel)
    for axis, run in zip(line[2:], runs):
        repeat, case = read.get(run.name, (0, None))
        if case is None:
            annotate(axis, "not kept", "corner")
            continue
        draw_mask(axis, case.plane(case.mask, index), truth, case.pixel)
        if (dice := run.slice_dice(case.name, index, repeat)) is not None:
            annotate(axis, f"{dice:.2f}", "corner")


# Figure 3: Dice over each setting


def ablation(results: Results) -> Figure:
    """Dice over each swept setting: mean and, as a band, standard deviation over patients; a line a group of cases.

    Raises:
        NothingToDraw: if no setting was swept.
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
        places = scale(axis, [value for value, _ in sweep], default_of(results, knob))
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


def default_of(results: Results, knob: str) -> object:
    """The value that a knob has where another one is swept; None where nothing tells."""
    others = [run for run in results.runs if not run.name.startswith(f"{knob}=") and knob in run.settings]
    others.sort(key=lambda run: "=" not in run.name)  # a method that is compared may have a setting of its own
    return others[0].settings[knob] if others else None


def scale(axis: Axes, values: Sequence[object], default: object = None) -> list[float]:
    """Sets up the x axis for the values of a setting and marks the default; returns the place of each value.

    Numbers over two decades or more get a logarithmic axis, on which 0 has a place of its own; what is no number
    stands in the order given.
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


def _sweep_line(axis: Axes, places: Sequence[float], runs: Sequence[str], table, colour: str, group: str) -> None:
    """One group's Dice over the runs of a sweep, in the order of their places."""
    rows = {row["run"]: row["dice"] for row in table}
    points = sorted((place, rows[run]) for place, run in zip(places, runs) if run in rows)
    x = [place for place, _ in points]
    mean, std = (np.array([dice[key] or 0.0 for _, dice in points]) for key in ("mean", "std_cases"))
    axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
    axis.plot(x, mean, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=group or "all cases")


# Figures 4 and 5: one slice over a setting


def strips(results: Results, knobs: Sequence[str] = (), case: str | None = None) -> Figure:
    """Map and mask of one slice, the one with the largest target, for each value of a setting; two rows a setting.

    Each map is as bright as its own brightest part: their scales differ by orders of magnitude.

    Args:
        results: of a study with sweeps.
        knobs: settings to show; without it guidance scale and steps, or where neither was swept all.
        case: None: the first whose volumes are kept.

    Raises:
        NothingToDraw: if nothing was swept, or no volumes are kept.
    """
    sweeps = results.sweeps
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
        _strip(pair, columns, default_of(results, knob))
        annotate(pair[0, 0], SYMBOLS.get(knob, knob), "left")
    return figure


def _strip(pair: np.ndarray, columns: Sequence[tuple[object, Run, int, Case]], default: object) -> None:
    """The two rows (2, columns) of one setting: image and truth first, then map and mask of each value."""
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the paper's figures.")
    figures = parser.add_subparsers(dest="figure", required=True)
    for name in ("comparison", "ablation", "strips", "uncertainty"):
        figures.add_parser(name).add_argument("results", type=Path, help="output folder of a study, or evaluation")
    figures.choices["comparison"].add_argument("--cases", nargs="+", default=(), help="best, median, worst without it")
    figures.choices["strips"].add_argument("--knobs", nargs="+", default=(), help=f"{', '.join(STRIPS)} without it")
    first = figures.add_parser("denoising")
    first.add_argument("--config_file", required=True, help="inference.yaml of a bundle")
    first.add_argument("--case", required=True, help="an image, or the folder of a DICOM series")
    first.add_argument("--slice", type=int, help="after preprocessing; the one with the largest target without it")
    for figure in figures.choices.values():
        figure.add_argument("--output", required=True, type=Path, help="PNG")
    options, rest = parser.parse_known_args(argv)
    if rest and options.figure != "denoising":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        print(save(_figure(options, rest), options.output))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


def _figure(options: argparse.Namespace, rest: Sequence[str]) -> Figure:
    if options.figure == "denoising":
        from study.runner import read_knobs  # which itself draws the others

        knobs = read_knobs(rest, {"config_file": [options.config_file], "training": {}})
        return denoising(options.config_file, options.case, options.slice, knobs)
    results = read_results(options.results)
    if options.figure == "comparison":
        return comparison(results, cases=options.cases)
    if options.figure == "strips":
        return strips(results, options.knobs)
    return ablation(results) if options.figure == "ablation" else uncertainty(results)


if __name__ == "__main__":
    main()
