"""Parts of a study's page that the report of an inference does without: bars, tiles and figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

from matplotlib.figure import Figure


def bar(share: float, text: str, ours: bool = True) -> str:
    """Return a cell with `text` over a bar that fills `share` (0 to 1) of it."""
    kind = "bar ours" if ours else "bar"
    return f'<td class="{kind}"><span style="--share: {100 * share:.1f}%">{escape(text)}</span></td>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return key numbers, (name, number, remark), all text; the first is highlighted."""
    entries = (map(escape, entry) for entry in entries)
    lines = (f"<dt>{name}</dt><dd>{number}</dd><dd>{remark}</dd>" for name, number, remark in entries)
    parts = (f"<div{' class=best' if i == 0 else ''}>{line}</div>" for i, line in enumerate(lines))
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def picture(figure: Figure, alt: str, caption: str = "", vector: bool = False, kind: str = "") -> str:
    """Return a figure inside the page, as WebP or SVG, with a description (`alt`) and a caption, both text."""
    stream = io.BytesIO()
    if vector:
        figure.savefig(stream, format="svg", metadata={"Date": None})
    else:
        figure.savefig(stream, format="webp", dpi=160, pil_kwargs={"quality": 80})
    data = base64.b64encode(stream.getvalue()).decode()
    source = f"data:image/{'svg+xml' if vector else 'webp'};base64,{data}"
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><img src="{source}" alt="{escape(alt)}">{below}</figure>'
