"""The paper's figure 2: the masks of all methods on the same slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.figures.pictures import NothingToDraw, annotate, draw_image, draw_mask, panels, tissue
from study.results import Results, Run
from study.volumes import Case

RANKED_BY = "cdm"  # the run whose Dice ranks the cases


def draw_comparison(results: Results, groups: Sequence[str] | None = None, cases: Sequence[str] = ()) -> Figure:
    """Draw the masks of all runs, for the best, median and worst case of each group, on the slice with most target.

    The cases are ranked by the Dice of `cdm`, or where the study has no such run, of the best label-only one.

    Args:
        results: of a study.
        groups: those to draw; None: all.
        cases: draw these instead.

    Raises:
        NothingToDraw: there is nothing to compare, or no volumes of these cases.
    """
    rows = []
    for group in results.groups if groups is None else groups:
        if run := _ranking_run(results, group):
            dice = run.dice(group)
            picks = [("case", case) for case in cases if case in dice] if cases else ranked(dice)
            rows += [(run, rank, case, read) for rank, case in picks if (read := _read_all(results.compared, case))]
    if not rows:
        raise NothingToDraw(f"{results.folder} keeps no volumes of runs to compare, or their images are gone.")
    figure, axes = panels(len(rows), 2 + len(results.compared), 1.5, left=0.36)
    for line, (run, rank, case, read) in zip(axes, rows):
        index = run.largest_slice(case)
        _draw_row(line, results.compared, read, index)
        annotate(line[0], f"{rank}, slice {index}\n{case}", "left", fontsize=7)
    for axis, name in zip(axes[0], ("image", "truth", *(run.name for run in results.compared))):
        annotate(axis, name)
    return figure


def ranked(dice: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return [("best", case), ("median", case), ("worst", case)] by Dice; two cases are best and worst, one is best."""
    order = sorted(dice, key=lambda case: (-dice[case], case))
    ranks: dict[int, str] = {}
    for rank, place in (("best", 0), ("worst", len(order) - 1), ("median", len(order) // 2)):
        ranks.setdefault(place, rank)
    return [(rank, order[place]) for place, rank in sorted(ranks.items())] if order else []


def _ranking_run(results: Results, group: str) -> Run | None:
    named = next((run for run in results.compared if run.name == RANKED_BY), None)
    return named or results.best(group) or next(iter(results.compared), None)


def _read_all(runs: Sequence[Run], case: str) -> dict[str, tuple[int, Case]]:
    """Return {run: (repeat, case)} of the runs that keep the volumes of a case."""
    return {run.name: read for run in runs if (read := run.read(case))}


def _draw_row(line: Sequence[Axes], runs: Sequence[Run], read: Mapping[str, tuple[int, Case]], index: int) -> None:
    """Draw one row: image, truth, and the masks of `runs`."""
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
