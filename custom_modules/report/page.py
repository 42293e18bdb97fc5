"""The page `report.html` of a run's results: a table of the cases, and each case with slices, numbers and warnings.

It shows all results in the folder, whichever run made them. What was measured and drawn for an earlier page is taken
over from it (`data-key`), so that a folder that grows does not take longer each time.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from html import escape, unescape
from pathlib import Path
from typing import Any, NamedTuple

from custom_modules import __version__
from custom_modules.files import atomic_path, read_json_or_empty
from custom_modules.report.cases import measure
from custom_modules.report.html import note, page, row, table

MAX_PICTURED = 200  # cases; a page of these has about 12 MB
SECTION = re.compile(r'<div data-key="(\w+)" data-numbers="([^"]*)">(.*?)</div><!-- end -->', re.DOTALL)
STYLE = """
.slices { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 10.4rem), 1fr)); gap: 0.4rem 0.6rem; }
.slices figure { margin: 0; }
.slices svg { display: block; width: 100%; height: auto; border-radius: 0.35rem; background: #000; }
.slices path { fill: none; stroke: #ff9d2e; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.slices path.truth { stroke: #35d6e6; }
.slices text { fill: #fff; stroke: #000; stroke-width: 0.15em; paint-order: stroke; text-anchor: middle;
  dominant-baseline: middle; font-family: system-ui, sans-serif; font-weight: 600; }
.slices text ~ text ~ text { dominant-baseline: auto; }
.slices figcaption { padding-top: 0.2rem; }
body:has(#outlines:not(:checked)) .slices path { display: none; }
section { margin-top: 2rem; padding-top: 1rem; border-top: 1px solid var(--line); }
section h2 { margin: 0 0 0.3rem; padding: 0; border: 0; }
.key { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; }
.key .mask::before, .key .truth::before { content: ""; display: inline-block; width: 1.4em; margin-right: 0.4em;
  border-top: 3px solid #e07b00; vertical-align: middle; }
.key .truth::before { border-color: #12a5b5; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--accent); }
th button:hover { text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
a { color: inherit; }
tbody th { min-width: 8.5rem; overflow-wrap: anywhere; }
tbody td { white-space: nowrap; }
table.text td { white-space: normal; overflow-wrap: anywhere; }
.warn { display: block; color: var(--accent); font-weight: 400; }
@media (max-width: 40rem) { body { padding: 1.2rem 0.9rem 2rem; } h1 { font-size: 1.5rem; } th, td { padding: 0.35rem; }
  table { font-size: 0.85rem; } table.sorted tr > :nth-child(3) { display: none; } }
"""
SCRIPT = """
const value = (row, i) => {
  const cell = row.cells[i];
  return "value" in cell.dataset ? (cell.dataset.value === "" ? NaN : Number(cell.dataset.value)) : cell.textContent;
};
const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
document.querySelectorAll("table.sorted thead th").forEach((head, i) => {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const empty = (row) => Number.isNaN(value(row, i));  // always last
    body.append(...[...body.rows].sort(
      (a, b) => empty(a) - empty(b) || (empty(a) ? 0 : way * compare(value(a, i), value(b, i)))));
  });
});
"""


class Run(NamedTuple):
    """What a page says beside the results on disk.

    Attributes:
        name: of the bundle.
        target: what a mask shows.
        failures: {case: why it failed}.
        labels: {stem: file of the truth}, of an evaluation.
        training_cases: names of the cases that the weights have learned from.
        probability_methods: methods whose maps are probabilities.
        doubts: {stem: what `doubts` returns of its entropy or probability}, of the cases that were done just now.
    """

    name: str
    target: str
    failures: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}
    training_cases: frozenset[str] = frozenset()
    probability_methods: tuple[str, ...] = ()
    doubts: Mapping[str, list] = {}


class Entry(NamedTuple):
    """A case of the page: provenance, `measure`'s numbers, rows of the evaluation (or {}), warnings, HTML."""

    stem: str
    facts: dict[str, Any]
    numbers: dict[str, Any]
    rows: dict[str, Any]
    warnings: list[str]
    html: str


def write_report(output_dir: str | Path, run: Run) -> Path:
    """Writes `<output_dir>/report.html` of all results in the folder; returns its path."""
    output = Path(output_dir) / "report.html"
    old = output.read_text(encoding="utf-8") if output.is_file() else ""
    known = {key: (json.loads(unescape(numbers)), html) for key, numbers, html in SECTION.findall(old)}
    files = sorted(Path(output_dir).glob("*/*_provenance.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    entries = [_entry(file, run, known, pictured=i < MAX_PICTURED) for i, file in enumerate(files)]
    entries.sort(key=lambda entry: entry.stem)
    with atomic_path(output) as aside:
        aside.write_text(_render(entries, run), encoding="utf-8")
    return output


def _entry(file: Path, run: Run, known: Mapping[str, tuple[dict, str]], pictured: bool) -> Entry:
    folder, facts = file.parent, read_json_or_empty(file)
    evaluated = run.labels.get(folder.name)
    rows = read_json_or_empty(folder.parent / "metrics" / "cases" / f"{folder.name}.json") if evaluated else {}
    label = evaluated or facts.get("label")
    method = facts.get("settings", {}).get("method")
    origin = json.dumps([__version__, facts, label, rows.get("measured"), pictured])
    key = hashlib.sha256(origin.encode()).hexdigest()
    if key in known:
        numbers, html = known[key]
    else:
        probabilities = method in run.probability_methods
        telling = probabilities or facts.get("settings", {}).get("uncertainty")  # as `measure` finds it on disk
        doubt = run.doubts.get(folder.name) if telling else None
        try:
            numbers, html = measure(folder, facts, label, probabilities, doubt)
        except Exception as error:  # whatever a file may hold: the other cases are shown
            numbers, html = {}, note(f"No pictures: {' '.join(str(error).split()) or type(error).__name__}")
        html = html if pictured else note(f"No pictures: they are of the {MAX_PICTURED} newest cases.")
    told = [*map(str, facts.get("warnings") or ())]  # what these say already is not said again
    learned = facts.get("case") in run.training_cases and not any("in the training" in one for one in told)
    empty = numbers.get("voxels") == 0 and not any("mask is empty" in one for one in told)
    warnings = ["in the training list of the weights"] * learned
    warnings += ["failed in the latest run: this result is older"] * (facts.get("case") in run.failures)
    warnings += ["nothing found"] * empty + told
    marked = f'<div data-key="{key}" data-numbers="{escape(json.dumps(numbers))}">{html}</div><!-- end -->'
    return Entry(folder.name, facts, numbers, rows.get("volume", {}), warnings, marked)


def _render(entries: list[Entry], run: Run) -> str:
    failed, count = len(run.failures), len(entries)
    title = f"{run.target}: {count} case{'s' * (count != 1)}" + (f", {failed} failed" if failed else "")
    methods = dict.fromkeys(str(entry.facts.get("settings", {}).get("method")) for entry in entries)
    made = [f"{run.name} {__version__}", ", ".join(methods), time.strftime("%Y-%m-%d %H:%M")]
    body = [f"<header><h1>{escape(title)}</h1>", f'<p class="faint">{escape(" · ".join(filter(None, made)))}</p>']
    body += ["</header>", *_failures(run.failures)]
    if entries:
        body += [_table(entries), _key(entries), *map(_section, entries)]
    footer = "<footer>Research only. Not a medical device. Slices are numbered from 0, as stored.</footer>"
    return page(title, [*body, footer], STYLE, SCRIPT)


def _failures(failures: Mapping[str, str]) -> Iterable[str]:
    if failures:
        rows = [row(escape(case), [f"<td>{escape(why)}</td>"]) for case, why in failures.items()]
        yield "<h2>Failed</h2>" + table(["Case", "Reason"], [("", rows)], kind="text")


def _key(entries: list[Entry]) -> str:
    truth = '<span class="truth">true outline</span>' if any('class="truth"' in entry.html for entry in entries) else ""
    box = '<label><input type="checkbox" id="outlines" checked> outlines</label>'
    return f'<p class="key"><span class="mask">outline of the mask</span>{truth}{box}</p>'


def _table(entries: list[Entry]) -> str:
    columns = {
        "Volume": lambda entry: _volume(entry.numbers),
        "Slices": lambda entry: _extent(entry.numbers),
        "Expected Dice": lambda entry: _number(entry.facts.get("expected_dice"), "{:.2f}"),
        "Dice": lambda entry: _number(entry.rows.get("volume_dice"), "{:.3f}"),
        "Warnings": lambda entry: _cell(str(len(entry.warnings) or ""), len(entry.warnings)),
    }
    cells = {name: [cell(entry) for entry in entries] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(not cell.endswith("></td>") for cell in column)}
    rows = [row(_name(entry), [column[i] for column in cells.values()]) for i, entry in enumerate(entries)]
    hint = "A click on a column's head sorts."
    if "Expected Dice" in cells:
        hint += " Expected Dice: what the method itself expects of its mask; the lowest are worth a look first."
    return f"<h2>Cases</h2>{table(['Case', *cells], [('', rows)], kind='sorted')}<p><small>{hint}</small></p>"


def _name(entry: Entry) -> str:
    warnings = "".join(f'<small class="warn">{escape(warning)}</small>' for warning in entry.warnings)
    return f'<a href="#{escape(entry.stem)}">{escape(str(entry.facts.get("case")))}</a>{warnings}'


def _volume(numbers: Mapping) -> str:
    if numbers.get("ml") is not None:
        return _number(numbers["ml"], "{:.1f} ml")
    return _number(numbers.get("voxels"), "{:,} voxels")


def _extent(numbers: Mapping) -> str:
    if numbers.get("first") is None:
        return _cell("", "")
    return _cell(f"{numbers['first']}–{numbers['last']}", numbers["first"])


def _number(value: float | None, form: str) -> str:
    return _cell("", "") if value is None else _cell(form.format(value), value)


def _cell(text: str, value: float | str) -> str:
    return f'<td data-value="{value}">{escape(text)}</td>'


def _section(entry: Entry) -> str:
    text = re.sub("<[^>]*>", "", _volume(entry.numbers))
    if entry.numbers.get("first") is not None:
        text += f", slices {entry.numbers['first']} to {entry.numbers['last']}"
    head = f'<section id="{escape(entry.stem)}"><h2>{escape(str(entry.facts.get("case")))}</h2><p>{text}</p>'
    return "\n".join([head, *map(note, entry.warnings), entry.html, "</section>"])
