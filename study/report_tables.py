"""The report's tables, as HTML: measures of every run, Dice by case, settings, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from custom_modules.evaluation.metrics import number
from custom_modules.report.html import fold, row, table
from study.page import bar, tiles
from study.results import REFERENCES, Results, Run
from study.tables import DIGITS, MEASURES
from study.volumes import case_folders, read_facts

DATA = ("dataset_dir", "datalist", "section")  # what a cell was evaluated on
LEGEND = (
    "Mean, and below it ± standard deviation over repeats (over patients). Dice, mIoU and HD95 are taken on the slices "
    "that show the target, volume Dice on whole volumes. An empty mask counts as Dice 0 and has no HD95 (undefined)."
)
TAGS = " Only slices known to show the target were processed, so volume Dice has no false positives on the others."


def key_numbers(results: Results, rows: Sequence[Mapping]) -> str:
    """Return tiles: best label-only run, floor and upper bound of one group; of a single run its measures."""
    if len(results.runs) == 1:
        r = rows[0]
        numbers = ((name, key, DIGITS[key]) for key, name in MEASURES.items())
        return tiles((name, mean_text(r[key], digits), _over(r[key], digits)) for name, key, digits in numbers)
    ours = best_row([r for r in rows if r["method"] not in REFERENCES], "dice")
    entries = [("Best label-only Dice", ours)] if ours else []
    entries += [(REFERENCES[r["method"]].capitalize(), r) for r in rows if r["method"] in REFERENCES]
    return tiles((name, mean_text(r["dice"]), f"{r['run']}, {_over(r['dice'])}") for name, r in entries)


def measures_of_runs(results: Results, rows: Sequence[Mapping], explained: bool = True) -> str:
    """Return a table of each run's measures: label-only methods, floor and bound, then each swept setting's values."""
    extra = {"n_volumes": "patients", "n_slices": "slices", "repeats": "repeats"}
    extra = {key: name for key, name in extra.items() if len({r[key] for r in rows}) > 1}
    bodies, starred = [], False
    for heading, members in _sections(results, rows):
        ours = [r for r in members if r["method"] not in REFERENCES]
        best = {key: best_row(ours, key) if len(ours) > 1 else None for key in MEASURES}
        starred = starred or any(best.values())
        lines = []
        for r in members:
            cells = [_measure(results, r, key, r is best[key]) for key in MEASURES]
            lines.append(row(_name(results, r), [*cells, _seconds(r), *(str(r[key]) for key in extra)]))
        bodies.append((heading, lines))
    tags = all(r["settings"].get("gate") == "tags" for r in rows)
    legend = LEGEND + TAGS * tags + " ★ best label-only value of its part." * starred
    head = ["run", *MEASURES.values(), "seconds a slice", *extra.values()]
    return table(head, bodies, escape(legend) if explained else "", "even")


def _sections(results: Results, rows: Sequence[Mapping]) -> list[tuple[str, list[Mapping]]]:
    """Return (heading, rows) of the parts of a table, in the study's order."""
    compared = {run.name for run in results.compared}
    parts: dict[str, list[Mapping]] = {"Label-only": [], "Reference points": []}
    for r in rows:
        kind = "Reference points" if r["method"] in REFERENCES else "Label-only"
        parts.setdefault(kind if r["run"] in compared else r["run"].partition("=")[0], []).append(r)
    parts = {heading: members for heading, members in parts.items() if members}
    plain = list(parts) == ["Label-only"]
    return [("" if plain else escape(heading), members) for heading, members in parts.items()]


def best_row(rows: Iterable[Mapping], key: str) -> Mapping | None:
    """Return the row with the best mean of a measure; None where no mean is defined."""
    sign = -1 if key == "hd95" else 1
    defined = (r for r in rows if r[key]["mean"] is not None)
    return max(defined, key=lambda r: sign * r[key]["mean"], default=None)


def _measure(results: Results, r: Mapping, key: str, best: bool) -> str:
    """Return a cell: the mean and, smaller, its spread and how often it is undefined."""
    digits = DIGITS[key]
    text = mean_text(r[key], digits)
    text = f'<b><span title="best label-only value">★</span> {text}</b>' if best else text
    spread = [f"± {r[key]['std']:.{digits}f}"] if r[key]["std"] is not None else []
    spread += [f"({r[key]['std_cases']:.{digits}f})"] if r[key]["std_cases"] is not None else []
    lines = [" ".join(spread)] if spread else []
    if undefined := r[key].get("n_undefined"):
        lines.append(f"{undefined} of {_n_measured(results, r, key)} undefined")
    return "".join([text, *(f"<br><small>{line}</small>" for line in lines)])


def _n_measured(results: Results, r: Mapping, key: str) -> int:
    """Return on how many slices (or volumes) of all repeats a measure of a run was taken."""
    run = next(run for run in results.runs if run.name == r["run"])
    if key == "volume_dice":
        return sum(volume["group"] == r["group"] for volume in run.volumes)
    least = r["min_area"] if results.kind == "study" else 0  # an evaluation leaves smaller targets out itself
    return sum(s["group"] == r["group"] and float(s["fraction"]) >= least for s in run.slices)


def _name(results: Results, r: Mapping) -> str:
    """Return the name of a run and, smaller, what it is."""
    knob, equals, value = r["run"].partition("=")
    if equals:
        name, remark = value, "default" if str(results.default_of(knob)) == value else ""
    else:
        name, remark = knob, REFERENCES.get(r["method"], "" if r["method"] == knob else r["method"])
    return f"{escape(name)}<br><small>{escape(remark)}</small>" if remark else escape(name)


def mean_text(measure: Mapping, digits: int = 3) -> str:
    """Return the mean of a measure, or a dash where it is undefined."""
    value = number(measure, "mean")
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _over(measure: Mapping, digits: int = 3) -> str:
    return "one patient" if measure["std_cases"] is None else f"± {measure['std_cases']:.{digits}f} over patients"


def _seconds(r: Mapping) -> str:
    seconds = number(r, "seconds_per_slice")
    return "–" if math.isnan(seconds) else "&lt; 0.001" if seconds < 0.0005 else f"{seconds:.3g}"


def dice_by_case(results: Results, group: str) -> str:
    """Return a table of the Dice of each case and method as bars; of a single method, with the other measures."""
    dice = {run.name: run.dice(group) for run in results.compared}
    first = dice.get("cdm") or dice[(results.best(group) or results.compared[0]).name]
    cases = sorted({case for values in dice.values() for case in values}, key=lambda case: (-first.get(case, -1), case))
    if len(dice) == 1:
        head, lines = _case_measures(results.compared[0], group, cases)
    else:
        ours = {run.name: run.method not in REFERENCES for run in results.compared}
        head, lines = ["case", *map(escape, dice)], []
        for case in cases:
            values = ((values.get(case), ours[name]) for name, values in dice.items())
            lines.append(row(escape(case), ("–" if v is None else bar(v, f"{v:.3f}", own) for v, own in values)))
    caption = "Dice of each case, the mean over its slices with target and over repeats."
    shown = table(head, [("", lines)], caption, "even bars" if len(dice) > 1 else "even")
    return shown if len(cases) <= 40 else fold(f"{len(cases)} cases", shown)


def _case_measures(run: Run, group: str, cases: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return head and rows of the table of one method's cases."""
    volumes, dice, lines = {v["case"]: v for v in run.volumes if v["group"] == group}, run.dice(group), []
    for case in cases:
        v = volumes[case]
        others = [mean_text({"mean": v[key]}, DIGITS[key]) for key in MEASURES if key != "dice"]
        cells = [bar(dice[case], f"{dice[case]:.3f}"), *others, escape(v["n_slices"]), _seconds(v)]
        lines.append(row(escape(case), cells))
    return ["case", *MEASURES.values(), "slices", "seconds a slice"], lines


def provenance_section(results: Results) -> list[str]:
    """Return weights, versions, data, settings and commands."""
    first = next((case for run in results.runs for folder in run.folders for case in case_folders(folder)), None)
    provenance = read_facts(first) if first else {}
    cells = [run.facts for run in results.runs if "command" in run.facts]
    versions = {**provenance.get("versions", {}), **(cells[0].get("versions", {}) if cells else {})}
    weights = [cell["weights_sha256"] for cell in cells] or [provenance.get("weights_sha256")]
    data = (str({**cell, **cell["given"]}.get(key, "")) for cell in cells for key in DATA)
    facts = {"weights, SHA-256": ", ".join(dict.fromkeys(filter(None, weights)))}
    facts |= {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}
    facts |= {"data": ", ".join(filter(None, dict.fromkeys(data)))}
    lines = [row(escape(name), [escape(text)]) for name, text in facts.items() if text]
    parts = [table(["fact", "value"], [("", lines)], kind="text"), *_settings(results)]
    if cells:
        commands = [f"# {run.name}\n{run.facts['command']}\n" for run in results.runs if "command" in run.facts]
        shown = "\n".join(map(escape, commands))
        parts.append(fold("Commands, of each run's first repeat", f"<pre>{shown}</pre>"))
    return parts


def _settings(results: Results) -> list[str]:
    """Return the settings that all runs share, and those in which the compared ones differ."""
    settings = [run.settings for run in results.runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    shared = [key for key in keys if all(values.get(key) == settings[0].get(key) for values in settings)]
    differing = [key for key in keys if key not in (*shared, "method", "seed")]
    lines = [row(escape(key), [escape(json.dumps(settings[0][key]))]) for key in shared]
    shown = table(["setting", "value"], [("", lines)], kind="text")
    parts = [fold("Settings of all runs" if len(settings) > 1 else "Settings", shown)]
    if differing and len(results.compared) > 1:
        lines = []
        for run in results.compared:
            lines.append(row(escape(run.name), (escape(json.dumps(run.settings.get(key))) for key in differing)))
        shown = table(["run", *map(escape, differing)], [("", lines)], "A method reads only the settings that it has.")
        parts.append(fold("Settings in which runs differ", shown))
    return parts
