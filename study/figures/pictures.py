"""Parts of pictures: slices in grey, maps and masks over them, dark grids of panels, PNG files of limited size.

Planes are (rows, columns) arrays the way they are viewed (`study.volumes.Case.plane`), `pixel` is the distance in mm
between rows and between columns. The mask is orange, the truth a cyan line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from custom_modules.files import atomic_path
from study.volumes import Case

COLUMNS = ("image, true outline", "saliency", "mask, true outline")
MASK, TRUTH, GROUND, TEXT = "#ff9e1b", "#35e0e8", "#0d1014", "#e8ebee"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # for colour-blind eyes (Okabe and Ito)
PLACES = {"top": (0.5, 1.045, "center", "baseline"), "left": (-0.04, 0.5, "right", "center")}  # outside a panel
PLACES |= {"corner": (0.035, 0.03, "left", "bottom"), "upper": (0.035, 0.97, "left", "top")}  # inside it
GAP = 0.04  # inches between panels
BYTES = 400_000


class NothingToDraw(ValueError):
    """Raised where a results folder lacks what a figure is made of."""


def draw_image(axis: Axes, image: np.ndarray, pixel: Sequence[float] = (1, 1), frame: np.ndarray | None = None) -> None:
    """Show a real plane in grey, in mm; of `frame`, a bool plane, only the square around what it marks."""
    low, high = np.percentile(image, [1, 99.7])
    axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), extent=_extent(image, pixel))
    axis.set(xticks=[], yticks=[], facecolor="black")
    axis.spines[:].set_visible(False)
    if frame is not None and frame.any():
        edges = [(np.flatnonzero(frame.any(axis=1 - i))[[0, -1]] + (0, 1)) * pixel[i] for i in (0, 1)]
        half = 0.52 * max(edge[1] - edge[0] for edge in edges)
        y, x = (sum(edge) / 2 for edge in edges)
        axis.set(xlim=(x - half, x + half), ylim=(y + half, y - half))


def draw_heat(axis: Axes, saliency: np.ndarray, top: float, pixel: Sequence[float] = (1, 1)) -> None:
    """Lay a map over a slice: 0 is transparent, `top` is bright."""
    heat = np.clip(saliency / max(top, 1e-6), 0, 1)
    axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.75 * heat, extent=_extent(heat, pixel))


def draw_mask(axis: Axes, mask: np.ndarray | None, truth: np.ndarray | None, pixel: Sequence[float] = (1, 1)) -> None:
    """Lay a filled mask and the thin outline of the truth over a slice; binary planes, or None."""
    if mask is not None and mask.any():
        fill = np.ma.masked_equal(np.asarray(mask, float), 0)
        colour = ListedColormap([MASK])
        axis.imshow(fill, cmap=colour, alpha=0.55, interpolation="nearest", extent=_extent(mask, pixel))
    if truth is not None and truth.any():
        rows, columns = ((np.arange(n) + 0.5) * size for n, size in zip(truth.shape, pixel))
        axis.contour(columns, rows, truth, [0.5], colors=TRUTH, linewidths=0.9)


def draw_slice(
    axes: Sequence[Axes],
    image: np.ndarray,
    truth: np.ndarray | None,
    saliency: np.ndarray,
    mask: np.ndarray,
    top: float,
    pixel: Sequence[float] = (1, 1),
    frame: np.ndarray | None = None,
) -> None:
    """Draw one slice into three axes, in the order of `COLUMNS`, by the functions above."""
    for axis in axes:
        draw_image(axis, image, pixel, frame)
    draw_mask(axes[0], None, truth, pixel)
    draw_heat(axes[1], saliency, top, pixel)
    draw_mask(axes[2], mask, truth, pixel)


def draw_case(axes: Sequence[Axes], case: Case, index: int) -> None:
    """Draw one slice of a case into three axes, its map scaled to its own maximum."""
    image, truth, saliency, mask = (case.plane(v, index) for v in (case.image, case.truth, case.saliency, case.mask))
    top = float(np.percentile(saliency, 99.8))
    draw_slice(axes, image, truth, saliency, mask, top, case.pixel, tissue(image, truth, mask))


def tissue(image: np.ndarray, *masks: np.ndarray | None) -> np.ndarray:
    """Return where a slice shows tissue or one of the masks is set; a bool plane."""
    seen = image > image.min() + 0.15 * (np.percentile(image, 99.5) - image.min())
    return np.any([seen, *(mask > 0 for mask in masks if mask is not None)], axis=0)


def draw_gallery(cases: Sequence[tuple[Case, int, str]]) -> Figure:
    """Draw three pictures a case, as in `COLUMNS`, two cases a row; `cases` are (case, slice, heading)."""
    columns = min(2, len(cases))
    figure, axes = panels(-(-len(cases) // columns), 3 * columns, 1.9, between=0.2)
    for i, (case, index, heading) in enumerate(cases):
        row, first = i // columns, 3 * (i % columns)
        draw_case(axes[row, first : first + 3], case, index)
        axes[row, first].text(0, 1.02, heading, transform=axes[row, first].transAxes, **_style(7), va="bottom")
        if row == 0:
            for axis, name in zip(axes[0, first + 1 : first + 3], COLUMNS[1:]):
                annotate(axis, name, fontsize=7)
    return figure


def panels(
    rows: int, columns: int, pitch: float, left: float = 0.0, top: float = 0.26, between: float = 0.0, tall: float = 1.0
) -> tuple[Figure, np.ndarray]:
    """Make a dark figure of rows x columns empty panels.

    Args:
        rows, columns: number of panels.
        pitch: inches from one panel to the next; in tenths, so that panels start on whole pixels: those that show the
            same slice then have the same pixels, which PNG stores once.
        left, top, between: inches for headings, on the left, at the top, and between the rows.
        tall: height of a panel over its width.
    """
    size = pitch - GAP
    width, height = left + columns * pitch + GAP, top + rows * (tall * size + GAP) + (rows - 1) * between + GAP
    figure = Figure(figsize=(width, height), facecolor=GROUND)
    space = {"left": (left + GAP) / width, "right": 1 - GAP / width, "top": 1 - top / height, "bottom": GAP / height}
    space |= {"wspace": GAP / size, "hspace": (GAP + between) / (tall * size)}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=space)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], facecolor=GROUND)
        axis.spines[:].set_visible(False)
    return figure, axes


def annotate(axis: Axes, text: str, where: str = "top", **style) -> None:
    """Write above a panel (`top`), upwards at its `left`, or into its lower (`corner`) or `upper` left corner."""
    x, y, across, down = PLACES[where]
    style = _style(8) | {"ha": across, "va": down} | style
    if where == "left":
        style |= {"rotation": 90, "multialignment": "center"}
    if where in ("corner", "upper"):
        style |= {"bbox": {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.2}}
    axis.text(x, y, text, transform=axis.transAxes, **style)


def _style(fontsize: int) -> dict:
    return {"color": TEXT, "fontsize": fontsize, "parse_math": False, "linespacing": 1.35}  # a name may hold a $


def _extent(plane: np.ndarray, pixel: Sequence[float]) -> tuple[float, ...]:
    return 0, plane.shape[1] * pixel[1], plane.shape[0] * pixel[0], 0


def save(figure: Figure, output: Path, limit: int = BYTES) -> Path:
    """Write a PNG, with fewer pixels where it would have more than `limit` bytes; return its path."""
    for dpi in (160, 140, 120, 100, 85, 70):
        with atomic_path(output) as aside:
            figure.savefig(aside, dpi=dpi, format="png")
        if output.stat().st_size <= limit:
            break
    return output
