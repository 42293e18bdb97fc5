"""Parts of a self-contained HTML page: no other file, nothing loaded, light and dark, on screen and on paper."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --card: #f5f6f8; --text: #1a1d21; --faint: #5b636e;
  --line: #d9dde3; --accent: #b45309; --bar: #f2b36b; --other: #c3cad4; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1014; --card: #171b21; --text: #e8ebee; --faint: #a0a9b5;
  --line: #2c323b; --accent: #ffb454; --bar: #8a5a1c; --other: #3b444f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 3rem; max-width: 72rem; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.35rem;
  overflow-wrap: anywhere; }
header + h2 { margin-top: 1.5rem; }
h3 { margin: 2rem 0 0.5rem; font-size: 1.05rem; }
p { margin: 0.5rem 0; max-width: 50rem; }
.faint, small, caption, figcaption { color: var(--faint); }
small { font-size: 0.85em; }
dl.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1.25rem 0; }
dl.tiles div { flex: 1 1 11rem; max-width: 20rem; padding: 0.8rem 1rem; border-radius: 0.6rem;
  background: var(--card); }
dl.tiles div.best { box-shadow: inset 0.25rem 0 var(--accent); }
dl.tiles dt, dl.tiles dd + dd { color: var(--faint); font-size: 0.85rem; line-height: 1.35; overflow-wrap: anywhere; }
dl.tiles dd { margin: 0; }
dl.tiles dt + dd { font-size: 1.7rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
caption { padding: 0.6rem 0; caption-side: bottom; text-align: left; max-width: 60rem; font-size: 0.85rem; }
th, td { padding: 0.38rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; }
th small { font-weight: 400; }
td small { font-size: 0.8rem; }
tbody th, tbody td { line-height: 1.3; vertical-align: baseline; overflow-wrap: break-word; }
table.even { table-layout: fixed; min-width: 56rem; }
table.even thead th:first-child { width: 13rem; }
table.bars thead th { padding-right: 0; text-align: left; font-size: 0.8rem; overflow-wrap: anywhere; }
th:first-child, table.text th, table.text td { text-align: left; }
thead th { border-bottom: 2px solid var(--line); color: var(--faint); font-size: 0.85rem; vertical-align: bottom; }
tbody th[colspan] { padding-top: 1.1rem; color: var(--faint); font-size: 0.8rem; letter-spacing: 0.03em; }
td b { color: var(--accent); }
td.bar { min-width: 5.2rem; padding: 0.3rem 0.4rem; text-align: left; }
td.bar span { display: block; padding: 0.05rem 0.35rem; border-radius: 0.2rem; --fill: var(--other);
  background: linear-gradient(var(--fill), var(--fill)) 0 0 / var(--share) 100% no-repeat var(--card);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
td.bar.ours span { --fill: var(--bar); }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 0.5rem; }
figure.narrow img { max-width: 56rem; }
figcaption { padding-top: 0.5rem; max-width: 50rem; font-size: 0.85rem; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); gap: 0.5rem 1.5rem; }
.note { padding: 0.6rem 0.9rem; border-left: 0.25rem solid var(--accent); background: var(--card); }
pre { padding: 0.8rem 1rem; border-radius: 0.5rem; background: var(--card); white-space: pre-wrap; font-size: 0.8rem;
  overflow-wrap: anywhere; }
code { font-size: 0.92em; }
summary { cursor: pointer; padding: 0.3rem 0; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--faint);
  font-size: 0.85rem; }
@media print { html, body { font-size: 11px; } body { max-width: none; padding: 0; } .wide { overflow: visible; }
  table.even { min-width: 0; }
  h2, h3, tbody th[colspan], summary { break-after: avoid; } tr, figure { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def page(title: str, body: Iterable[str], style: str = "", script: str = "") -> str:
    """Returns a whole document, which may run `script` alone; `title` is text, `body` HTML, `style` more CSS."""
    sums = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    policy += f"script-src 'sha256-{sums}'" if script else "script-src 'none'"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    lines = ["<!doctype html>", f'<html lang="en"><head>{head}<title>{escape(title)}</title>']
    lines += [f"<style>{STYLE}{style}</style></head><body>", *body, f"<script>{script}</script>" if script else ""]
    return "\n".join([*lines, "</body></html>", ""])


def table(head: Sequence[str], bodies: Iterable[tuple[str, Sequence[str]]], caption: str = "", kind: str = "") -> str:
    """Returns a table.

    Args:
        head: HTML of the column heads.
        bodies: (heading or "", HTML of the rows, each from `row`).
        caption: HTML below it.
        kind: CSS class.
    """
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = [f'<div class="wide"><table class="{kind}">', f"<caption>{caption}</caption>" if caption else ""]
    lines.append(f"<thead><tr>{columns}</tr></thead>")
    for heading, rows in bodies:
        over = f'<tr><th scope="rowgroup" colspan="{len(head)}">{heading}</th></tr>' if heading else ""
        lines.append("\n".join(["<tbody>", over, *rows, "</tbody>"]))
    return "\n".join([*lines, "</table></div>"])


def row(name: str, cells: Iterable[str]) -> str:
    """Returns a table's row from the HTML of its name and cells; a cell that is no `<td>` yet is wrapped in one."""
    cells = (cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'


def note(text: str) -> str:
    """Returns a highlighted paragraph."""
    return f'<p class="note">{escape(text)}</p>'


def fold(summary: str, body: str) -> str:
    """Returns a part that can be unfolded; `summary` is text, `body` HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
