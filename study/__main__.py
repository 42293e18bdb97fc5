"""The command: `python -m study benchmark | shifts | labels | floor | report | figures ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from study.figures.comparison import draw_comparison
from study.figures.denoising import draw_denoising
from study.figures.pictures import save
from study.figures.sweeps import STRIPS, draw_ablation, draw_strips
from study.figures.uncertainty import draw_uncertainty
from study.floor import measure_floor
from study.label_study import measure_labels
from study.plan import read_knobs, read_plan
from study.report import write_gallery, write_report
from study.results import read_results
from study.runner import Study
from study.shifts.run import run_shifts

BENCHMARK = """
example:
  python -m study benchmark study/configs/methods.yaml --bundle bundles/brats_flair \\
    --dataset_dir DIR --datalist LIST --output_dir OUT

methods.yaml compares every method; ablation.yaml varies Q, R, tau and s one at a time, on validation patients. Where a
datalist has none (CHAOS), give --section training. Any other --knob value goes to every config that knows it.
The same command continues what was interrupted.
"""
SHIFTS = """
example:
  python -m study shifts --bundle bundles/brats_flair --dataset_dir DIR --datalist LIST --section validation \\
    --output_dir OUT

Any --knob value of inference.yaml may follow. The same command continues what was interrupted.
"""
LABELS = """
example:
  python -m study labels --bundle bundles/brats_flair --dataset_dir DIR --datalist LIST --maps_dir RUN/distill/maps

Any --knob value of training may follow, such as --label_power 3.
"""
FLOOR = """
example:
  python -m study floor --bundle bundles/brats_flair --dataset_dir DIR --datalist LIST

An oracle, not a method: the threshold is chosen with the masks. Any --knob value of inference.yaml may follow.
"""
REPORT = """
examples:
  python -m study report OUT                         OUT/report.html
  python -m study report OUT --output gallery.png    image, saliency and mask of each case, as a picture
"""
FIGURES = """
example:
  python -m study figures comparison OUT --output comparison.png
"""
DENOISING = """
example:
  python -m study figures denoising --config_file bundles/brats_flair/configs/inference.yaml --case FILE --output x.png
"""
OF_RESULTS = {  # {figure: (what it shows, how it is drawn from the results and the options)}
    "comparison": ("figure 2: the masks of all methods", lambda results, of: draw_comparison(results, cases=of.cases)),
    "ablation": ("figure 3: Dice over each swept setting", lambda results, of: draw_ablation(results)),
    "strips": ("figures 4 and 5: one slice over settings", lambda results, of: draw_strips(results, of.knobs)),
    "uncertainty": ("how sure the masks of an evaluation are", lambda results, of: draw_uncertainty(results)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error that the user can correct ends it with one message."""
    parser = argparse.ArgumentParser("python -m study", description="Compare methods or settings under one protocol.")
    parser.set_defaults(takes_knobs=False)
    commands = parser.add_subparsers(required=True)
    _add_benchmark(commands)
    _add_shifts(commands)
    _add_labels(commands)
    _add_floor(commands)
    _add_report(commands)
    _add_figures(commands)
    options, rest = parser.parse_known_args(argv)
    if rest and not options.takes_knobs:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.run(options, rest)
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "benchmark", "evaluate many methods or settings", BENCHMARK)
    parser.add_argument("plan", type=Path, help="YAML: study/configs/methods.yaml, ablation.yaml, or your own")
    parser.add_argument("--bundle", required=True, type=Path, help="its folder, e.g. bundles/brats_flair")
    parser.add_argument("--dataset_dir", required=True, help="folder that the datalist's paths start from")
    parser.add_argument("--datalist", required=True, nargs="+", help="one; or one for each fold, which is trained")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--runs", nargs="+", help="names of the runs to do (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the noise (default: those of the YAML)")
    text = "smallest targets that count, as fractions of the slice, a table each: 0 0.05 for CHAOS (default: 0)"
    parser.add_argument("--min_areas", nargs="+", type=float, help=text)
    parser.add_argument("--models_dir", type=Path, help="weights of the folds, from another study's OUT/models")
    parser.set_defaults(run=_benchmark, takes_knobs=True)


def _add_shifts(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "shifts", "measure what changes of scanner, protocol or export cost", SHIFTS)
    _add_volumes(parser)
    parser.add_argument("--section", default="validation", help="of the datalist (default: validation)")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.set_defaults(run=_shifts, takes_knobs=True)


def _add_labels(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "labels", "compare the student's labels with the masks of training cases", LABELS)
    _add_volumes(parser)
    parser.add_argument("--maps_dir", required=True, type=Path, help="RUN/distill/maps of a training")
    parser.add_argument("--number", type=int, default=0, help="cases to draw at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    parser.set_defaults(run=_labels, takes_knobs=True)


def _add_floor(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "floor", "measure the best intensity threshold that there is", FLOOR)
    _add_volumes(parser)
    parser.add_argument("--section", default="test", help="of the datalist (default: test)")
    parser.set_defaults(run=_floor, takes_knobs=True)


def _add_volumes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", required=True, type=Path, help="its folder, e.g. bundles/brats_flair")
    parser.add_argument("--dataset_dir", required=True, help="folder that the datalist's paths start from")
    parser.add_argument("--datalist", required=True)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "report", "make a report (HTML) or a gallery (PNG) of results", REPORT)
    parser.add_argument("results", type=Path, help="output folder of a study, an evaluation or an inference")
    parser.add_argument("--output", type=Path, help="*.html or *.png (default: <results>/report.html or study.html)")
    parser.add_argument("--cases", nargs="*", default=(), help="of a gallery: names of the cases (default: all)")
    parser.add_argument("--target_labels", nargs="*", type=int, help="of a gallery; none after it: all above 0")
    parser.set_defaults(run=_report)


def _add_figures(commands: argparse._SubParsersAction) -> None:
    parsers = _add(commands, "figures", "draw the paper's figures", FIGURES).add_subparsers(required=True)
    for name, (text, draw) in OF_RESULTS.items():
        parser = _add(parsers, name, text, f"example:\n  python -m study figures {name} OUT --output {name}.png")
        parser.add_argument("results", type=Path, help="output folder of a study, or of an evaluation")
        parser.set_defaults(run=_figure, draw=draw)
    parsers.choices["comparison"].add_argument("--cases", nargs="+", default=(), help="default: best, median, worst")
    parsers.choices["strips"].add_argument("--knobs", nargs="+", default=(), help=f"default: {' '.join(STRIPS)}")
    text = "figure 1: how CG-Diff and CDM arrive at their maps; knobs of the bundle may follow"
    parser = _add(parsers, "denoising", text, DENOISING)
    parser.add_argument("--config_file", required=True, help="inference.yaml of a bundle")
    parser.add_argument("--case", required=True, help="an image, or the folder of a DICOM series")
    parser.add_argument("--slice", type=int, help="after preprocessing (default: the one with the largest target)")
    parser.set_defaults(run=_denoising, takes_knobs=True)
    for parser in parsers.choices.values():
        parser.add_argument("--output", required=True, type=Path, help="PNG")


def _add(parsers: argparse._SubParsersAction, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return parsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog, **style)


def _benchmark(options: argparse.Namespace, rest: Sequence[str]) -> None:
    plan = read_plan(options.plan, options.bundle)
    plan = replace(plan, seeds=options.seeds or plan.seeds, min_areas=options.min_areas or plan.min_areas)
    knobs = read_knobs(rest, plan.all_configs())
    where = options.output_dir, options.dataset_dir, options.datalist
    Study(plan, *where, knobs, options.runs, options.models_dir).run()


def _shifts(options: argparse.Namespace, rest: Sequence[str]) -> None:
    knobs = read_knobs(rest, [[str(options.bundle / "configs" / "inference.yaml")]])
    where = options.bundle, options.dataset_dir, options.datalist, options.section, options.output_dir
    print(*run_shifts(*where, knobs), sep="\n")


def _labels(options: argparse.Namespace, rest: Sequence[str]) -> None:
    knobs = read_knobs(rest, [[str(options.bundle / "configs" / "train.yaml")]])
    where = options.bundle, options.dataset_dir, options.datalist, options.maps_dir
    print(*measure_labels(*where, options.number, options.seed, knobs), sep="\n")


def _floor(options: argparse.Namespace, rest: Sequence[str]) -> None:
    knobs = read_knobs(rest, [[str(options.bundle / "configs" / "inference.yaml")]])
    where = options.bundle, options.dataset_dir, options.datalist, options.section
    print(*measure_floor(*where, knobs), sep="\n")


def _report(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.output and options.output.suffix == ".png":
        print(write_gallery(options.results, options.output, options.cases, options.target_labels))
    else:
        print(write_report(options.results, options.output))


def _figure(options: argparse.Namespace, rest: Sequence[str]) -> None:
    print(save(options.draw(read_results(options.results), options), options.output))


def _denoising(options: argparse.Namespace, rest: Sequence[str]) -> None:
    knobs = read_knobs(rest, [[options.config_file]])
    print(save(draw_denoising(options.config_file, options.case, options.slice, knobs), options.output))


if __name__ == "__main__":
    main()
