"""How sure the masks are: masks and uncertainty of some cases, and the expected Dice of all against the true one.

The expected Dice needs no truth (see `custom_modules.inference.mask`), so on new data it ranks the cases to review.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from custom_modules.evaluation.metrics import number
from study.figures.pictures import (
    GROUND,
    MASK,
    TEXT,
    NothingToDraw,
    annotate,
    draw_heat,
    draw_image,
    draw_mask,
    panels,
    tissue,
)
from study.results import Results
from study.volumes import volume_file


def draw_uncertainty(results: Results) -> Figure:
    """Draw the surest, the median and the least sure case, a row each, and on the right a point for each case.

    Args:
        results: of an evaluation with `--uncertainty True`.

    Raises:
        NothingToDraw: the results hold no uncertainty.
    """
    run = results.runs[0]
    dice = {row["case"]: (number(row, "expected_dice"), number(row, "volume_dice")) for row in run.volumes}
    dice = {case: pair for case, pair in dice.items() if not np.isnan(pair).any()}
    order = sorted((case for case in dice if case in run.kept), key=lambda case: -dice[case][0])
    shown = [order[i] for i in sorted({0, len(order) // 2, len(order) - 1})] if order else []
    if not shown or not all(volume_file(run.kept[case][1], "uncertainty").is_file() for case in shown):
        raise NothingToDraw(f"{results.folder} holds no uncertainty maps: evaluate with --uncertainty True.")
    figure, axes = panels(len(shown), 6, 1.5, left=0.36)
    for line, case in zip(axes, shown):
        _, read = run.read(case)
        index, entropy = run.largest_slice(case), nib.load(volume_file(run.kept[case][1], "uncertainty"))
        entropy = entropy.get_fdata(dtype=np.float32)
        image, truth, mask, entropy = (read.plane(v, index) for v in (read.image, read.truth, read.mask, entropy))
        for axis in line[:3]:
            draw_image(axis, image, read.pixel, tissue(image, truth, mask))
        draw_mask(line[0], None, truth, read.pixel)
        draw_mask(line[1], mask, truth, read.pixel)
        draw_heat(line[2], entropy, 1.0, read.pixel)
        annotate(line[0], f"{case}\nslice {index}", "left", fontsize=6)
        annotate(line[1], "expected {:.2f}, true {:.2f}".format(*dice[case]), "corner", fontsize=6)
    for axis, name in zip(axes[0], ("image, true outline", "mask", "uncertainty")):
        annotate(axis, name)
    _scatter(figure, axes, np.array(list(dice.values())))
    return figure


def _scatter(figure: Figure, axes: np.ndarray, dice: np.ndarray) -> None:
    """Plot expected against true volume Dice, (cases, 2), in place of the last three columns of panels."""
    boxes = [axis.get_position() for axis in (axes[0, 3], axes[-1, -1])]
    for axis in axes[:, 3:].flat:
        axis.remove()
    left, right, bottom, top = boxes[0].x0 + 0.06, boxes[1].x1 - 0.01, boxes[1].y0 + 0.1, boxes[0].y1
    axis = figure.add_axes((left, bottom, right - left, top - bottom), facecolor=GROUND)
    axis.scatter(*dice.T, color=MASK, s=18)
    axis.set(xlabel="expected Dice", ylabel="true volume Dice")
    axis.tick_params(colors=TEXT, labelsize=7)
    for part in (axis.xaxis.label, axis.yaxis.label):
        part.set(color=TEXT, fontsize=8)
    axis.spines[:].set_color("0.4")
