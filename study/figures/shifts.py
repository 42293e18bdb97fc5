"""The shift study: Dice against strength, a line a kind of change, a panel a group of kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from study.figures.pictures import LINES


def draw_shifts(rows: Sequence[Mapping], groups: Mapping[str, str]) -> Figure:
    """Draw the volume Dice of the unchanged volumes and of the strengths of each kind.

    Args:
        rows: {"kind", "strength", "volume_dice"}, the unchanged volumes first, a kind's strengths in order.
        groups: {kind: title of its panel}.
    """
    titles = list(dict.fromkeys(groups.values()))
    figure = Figure(figsize=(4.2 * len(titles), 4.2), layout="constrained")
    for axis, title in zip(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0], titles):
        for colour, kind in zip(LINES, (kind for kind, group in groups.items() if group == title)):
            mine = [row for row in rows if row["kind"] == kind]
            label = f"{kind}: {', '.join(format(row['strength'], 'g') for row in mine)}"
            dice = [row["volume_dice"] for row in (rows[0], *mine)]
            axis.plot(range(len(dice)), dice, color=colour, marker="o", markersize=4.5, linewidth=1.6, label=label)
        axis.axhspan(rows[0]["volume_dice"] - 0.05, rows[0]["volume_dice"], color="0.92", zorder=0)
        axis.set(title=title, xticks=[0, 1, 2], xticklabels=["unchanged", "mild", "strong"], ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="lower left")
    figure.axes[0].set_ylabel("volume Dice")
    return figure
