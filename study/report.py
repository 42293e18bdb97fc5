"""A results folder as one self-contained HTML page: tables, Dice by case, pictures, provenance.

The folder is what a study, an evaluation or an inference wrote. The page says what no longer exists. It loads nothing
and runs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import nibabel as nib
from matplotlib.figure import Figure

from custom_modules.files import atomic_path
from custom_modules.report.html import note, page
from study.figures.comparison import draw_comparison, ranked
from study.figures.pictures import COLUMNS, NothingToDraw, annotate, draw_case, draw_gallery, panels, save
from study.figures.sweeps import draw_ablation, draw_strips
from study.page import picture
from study.report_tables import dice_by_case, key_numbers, measures_of_runs, provenance_section
from study.results import Results, Run, read_results
from study.volumes import Case, case_folders, read_case, read_facts

FOOTER = "<footer>Research only. Not a medical device.</footer>"
MAX_SHOWN = 60  # cases of an inference


def write_report(output_dir: str | Path, output: Path | None = None) -> Path:
    """Write the page of a results folder, by default `<output_dir>/report.html`; return its path.

    Of an evaluation or an inference it is `study.html`: they write a `report.html` of their own.

    Raises:
        FileNotFoundError: the folder holds no results.
    """
    results = read_results(output_dir)
    name = "report.html" if results.kind == "study" else "study.html"
    output = Path(output_dir) / name if output is None else Path(output)
    with atomic_path(output) as aside:
        aside.write_text(_render(results), encoding="utf-8")
    return output


def _render(results: Results) -> str:
    """Return the page of a results folder, HTML."""
    title = _title(results)
    body = [f"<header><h1>{escape(title)}</h1>", f'<p class="faint">{escape(_circumstances(results))}</p></header>']
    if known := _n_in_training(results):
        body.append(note(f"{known} of the cases were in the training list of the weights: their numbers flatter."))
    if results.kind == "inference":
        body += _cases(results)
    if results.sweeps:
        body += _sweeps(results)
    for group in results.groups:
        body += _group(results, group)
    body += ["<h2>How it was made</h2>", *provenance_section(results), FOOTER]
    return page(title, body)


def _title(results: Results) -> str:
    start = f"{results.bundle}: " if results.bundle else ""
    if results.kind != "study":
        return f"{start}{results.kind if start else results.kind.capitalize()} with {results.runs[0].name}"
    counts = ((len(results.compared), "method", "compared"), (len(results.sweeps), "setting", "varied"))
    return start + (" and ".join(f"{n} {what}{'s' * (n > 1)} {done}" for n, what, done in counts if n) or "no results")


def _circumstances(results: Results) -> str:
    """Return dates and hardware."""
    dates = sorted(run.facts["finished"][:10] for run in results.runs if "finished" in run.facts)
    if not dates:
        newest = max(path.stat().st_mtime for path in results.folder.rglob("*.json"))
        dates = [time.strftime("%Y-%m-%d", time.localtime(newest))]
    hardware = dict.fromkeys(r["hardware"] for r in results.table if r.get("hardware"))
    return " · ".join([" to ".join(dict.fromkeys([dates[0], dates[-1]])), *hardware])


def _n_in_training(results: Results) -> int:
    rows = (volume for run in results.runs for volume in run.volumes if volume.get("in_training") == "1")
    return len({(volume["group"], volume["case"]) for volume in rows})


# Of a study or an evaluation


def _group(results: Results, group: str) -> list[str]:
    """Return key numbers, tables, pictures and Dice by case of one group of cases."""
    rows = results.rows(group)
    parts = [f"<h2>{escape(group or 'All cases')}: {_size(rows)}</h2>", key_numbers(results, rows)]
    for i, min_area in enumerate(sorted({r["min_area"] for r in results.table})):
        if chosen := results.rows(group, min_area):
            parts += [f"<h3>{_area_text(min_area)}: {_size(chosen)}</h3>"] if min_area else []
            parts.append(measures_of_runs(results, chosen, explained=i == 0))
    if len(results.compared) > 1:
        parts += _comparison(results, group)
    if results.compared:
        parts += ["<h3>Dice by case</h3>", dice_by_case(results, group), *_best_run(results, group)]
    return parts


def _size(rows: Sequence[Mapping]) -> str:
    patients, slices = (max(r[key] for r in rows) for key in ("n_volumes", "n_slices"))
    return f"{patients} patient{'s' * (patients > 1)}, {slices} slice{'s' * (slices > 1)}"


def _area_text(min_area: float) -> str:
    least = f"{min_area:.3g} pixels" if min_area >= 1 else f"{100 * min_area:.3g} % of the slice"
    return f"Targets of at least {least}"


def _comparison(results: Results, group: str) -> list[str]:
    heading = "<h3>Masks of every method</h3>"
    try:
        figure = draw_comparison(results, [group])
    except NothingToDraw as gap:
        return [heading, note(f"No pictures: {gap}")]
    runs = ", ".join(run.name for run in results.compared)
    alt = f"Best, median and worst case of {group or 'all cases'}: image, truth, and the masks of {runs}."
    caption = "Orange: mask. Cyan line: truth. The slice with the largest target of each case, and its Dice there."
    return [heading, picture(figure, alt, caption)]


def _best_run(results: Results, group: str) -> list[str]:
    """Return best, median and worst case of the best label-only method (or of the only one), with the map."""
    run = results.best(group) or results.compared[0]
    dice = run.dice(group)
    read = [(rank, found[1]) for rank, case in ranked(dice) if (found := run.read(case))]
    heading = f"<h3>{escape(run.name)}: best, median and worst case</h3>"
    if not read:
        return [heading, note(f"No pictures: the volumes or images of {run.name} are not there any more.")]
    caption = "The slice with the largest target. Dice is the case's mean over its slices with target."
    cases = ", ".join(f"{rank} {case.name}" for rank, case in read)
    alt = f"Image with true outline, saliency map and mask of {run.name}: {cases}."
    return [heading, picture(_draw_ranked(run, read, dice), alt, caption, kind="narrow")]


def _draw_ranked(run: Run, read: Sequence[tuple[str, Case]], dice: Mapping[str, float]) -> Figure:
    figure, axes = panels(len(read), 3, 2.6, left=0.42)
    for line, (rank, case) in zip(axes, read):
        index = run.largest_slice(case.name)
        draw_case(line, case, index)
        annotate(line[0], f"{rank}, Dice {dice[case.name]:.3f}\n{case.name}, slice {index}", "left")
    for axis, column in zip(axes[0], COLUMNS):
        annotate(axis, column)
    return figure


def _sweeps(results: Results) -> list[str]:
    """Return curves and strips of swept settings."""
    knobs = ", ".join(results.sweeps)
    alt = f"Dice over {knobs}; the numbers are in the tables below."
    caption = "One setting at a time: mean Dice, and as a band its standard deviation over patients."
    heading = "<h2>Settings, one at a time</h2>"
    parts = [heading, picture(draw_ablation(results), alt, caption, vector=True, kind="narrow")]
    try:
        figure = draw_strips(results, list(results.sweeps))
    except NothingToDraw as gap:
        return [*parts, note(f"No pictures of maps and masks: {gap}")]
    caption = "Maps (each as bright as its own brightest part) and masks of one slice, with the slice's Dice."
    return [*parts, picture(figure, f"Map and mask of one slice for each value of {knobs}.", caption)]


# Of an inference


def _cases(results: Results) -> list[str]:
    """Return the cases, one picture each."""
    run, folders, parts = results.runs[0], case_folders(results.folder), []
    for folder in folders[:MAX_SHOWN]:
        facts = read_facts(folder)
        try:
            case = read_case(folder, run.settings.get("target_labels"), run.settings.get("slice_axis"))
        except (FileNotFoundError, ValueError) as gap:
            parts.append(note(f"{facts['case']}: no picture, {gap}"))
            continue
        figure, axes = panels(1, 3, 1.9, top=0.04)
        draw_case(axes[0], case, case.largest())
        millilitres = case.mask.sum() * nib.affines.voxel_sizes(case.affine).prod() / 1000
        text = f"{case.name}, slice {case.largest()}: mask {millilitres:.1f} ml"
        text += f", {facts['slices_processed']} slices processed" if "slices_processed" in facts else ""
        parts.append(picture(figure, f"Image, saliency map and mask of {case.name}.", text))
    intro = f"<p>{len(folders)} case{'s' * (len(folders) > 1)}: image, saliency and mask on the slice with the largest "
    intro += "target (cyan line: truth, where there is a label).</p>"
    more = [note(f"Shown are the first {MAX_SHOWN}.")] if len(folders) > MAX_SHOWN else []
    return [intro, *more, '<div class="gallery">', *parts, "</div>"]


def write_gallery(
    output_dir: Path, output: Path, names: Sequence[str] = (), target_labels: Sequence[int] | None = None
) -> Path:
    """Write image, saliency and mask of the cases of an evaluation or inference as PNG; return its path.

    Args:
        output_dir: of the evaluation or inference.
        output: PNG.
        names: of the cases; empty: all.
        target_labels: label values of the target, empty: all above 0. None: as recorded, or else no truth is drawn.

    Raises:
        ValueError: there is no such case.
    """
    settings, cases = read_results(output_dir).runs[0].settings, []
    folders = {read_facts(folder)["case"]: folder for folder in case_folders(output_dir)}
    for folder in (folder for name, folder in folders.items() if name in (names or folders)):
        recorded = {**settings, **read_facts(folder).get("settings", {})}
        wanted = recorded.get("target_labels") if target_labels is None else target_labels
        case = read_case(folder, wanted, recorded.get("slice_axis"))
        cases.append((case, case.largest(), f"{case.name}, slice {case.largest()}"))
    if not cases:
        raise NothingToDraw(f"no result to draw in {output_dir}; it holds {list(folders)}.")
    return save(draw_gallery(cases), output, limit=1_000_000)
