"""The options of each task of `weakseg`, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

OVERVIEW = """\
Segment a target in 3D MR volumes, or learn one from slice tags: does a slice show it, yes or no.

  weakseg predict DIR --bundle brats_flair --out OUT      segment with the weights of a bundle

  weakseg tag DIR --out tags.html                         or learn a target of your own
  weakseg train DIR --tags tags.csv --bundle brats_flair --out RUN
  weakseg predict DIR --model RUN --out OUT

Research only: this is not a medical device.
"""
KNOBS = "\n\nAny knob of the bundle may follow as --KNOB VALUE (docs/knobs.md)."
CODES = """
Exit codes: 0 done; 1 an error, or volumes that are left out (the last lines say why); 2 a wrong command line:
an unknown option or knob, a bundle or a folder that does not exist; 130 stopped by Ctrl-C.
"""
BUNDLE = "brats_flair (brain tumour in FLAIR), chaos_kidney (kidneys in T2-SPIR), or the folder of another bundle"


class WrongCommand(ValueError):
    """What was typed cannot be meant: exit code 2, as argparse's own."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Reads a command line: the options of its task, and {knob: its words} for all that the task does not know.

    A knob takes the words up to the next option. argparse would take the first of them for DIR.
    """
    parser, tasks = _parsers()
    own: list[str] = []
    knobs: dict[str, list[str]] = {}
    words = own
    known = tasks[argv[0]]._option_string_actions if argv and argv[0] in tasks else None
    for word in argv:
        name, equals, value = word.partition("=")
        if known is None or not word.startswith("--"):
            words.append(word)
        elif name in known:
            words = own
            words.append(word)
        else:
            words = knobs[name.lstrip("-").replace("-", "_")] = [value] if equals else []
    return parser.parse_args(own), knobs


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Makes the parser, and those of the tasks to which knobs may be given."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="weakseg", description=OVERVIEW, epilog=CODES, **style)
    tasks = parser.add_subparsers(required=True, metavar="TASK")

    def add(task: str, about: str, example: str, knobs: str = "", within=tasks) -> argparse.ArgumentParser:
        text = {"help": about, "description": f"{about}.{knobs}", "epilog": f"Example:\n  {example}\n{CODES}"}
        added = within.add_parser(task.split()[-1], **text, **style)
        added.add_argument("--debug", action="store_true", help="show all log messages, and the traceback of an error")
        added.set_defaults(task=task)
        return added

    _tag(add("tag", "Write a page to tag slices on, in a browser", "weakseg tag DIR --out tags.html"))
    about = "Learn from slice tags; the same command continues what was stopped"
    example = "weakseg train DIR --tags tags.csv --bundle brats_flair --out RUN --max_epochs 30"
    _train(train := add("train", about, example, KNOBS))
    about = "Segment volumes: masks and saliency maps, in the geometry of each input"
    example = "weakseg predict DIR --bundle brats_flair --out OUT --method cg_cdm --seed 3"
    _weights(predict := add("predict", about, example, KNOBS))
    about = "Segment volumes that have a mask beside them, and compare the two"
    _weights(evaluate := add("evaluate", about, "weakseg evaluate DIR --model RUN --out OUT --gate all", KNOBS))
    example = "weakseg new-target liver --from chaos_kidney --target_labels 63 --label Liver"
    more = "\n\nFurther options (--label, --code, ...): python -m packing.new_bundle --help, docs/new_target.md."
    _new(new := add("new-target", "Make a bundle for another target, without weights", example, more))

    lists = tasks.add_parser("tags", help="Write a blank CSV of tags, or check one", allow_abbrev=False)
    lists = lists.add_subparsers(required=True, metavar="{template,check}")
    about = "Write a CSV with a row for each slice, to be filled in with 0 and 1"
    _template(add("tags template", about, "weakseg tags template DIR --out tags.csv", within=lists))
    about = "Compare a CSV of tags with the volumes, and list all that is wrong"
    _check(add("tags check", about, "weakseg tags check DIR tags.csv", within=lists))
    return parser, {"train": train, "predict": predict, "evaluate": evaluate, "new-target": new}


def _folder(parser: argparse.ArgumentParser) -> None:
    about = "folder that is searched for NIfTI files and DICOM series, or one volume"
    parser.add_argument("folder", type=Path, metavar="DIR", help=about)


def _first_slice(parser: argparse.ArgumentParser) -> None:
    about = "number of the first slice in the CSV: 1 if they are counted from 1 (default: 0)"
    parser.add_argument("--first_slice", type=int, choices=(0, 1), default=0, help=about)


def _slice_axis(parser: argparse.ArgumentParser) -> None:
    about = "stored axis along which the slices are counted (default: 2, the last); train takes the same option"
    parser.add_argument("--slice_axis", type=int, choices=(0, 1, 2), default=2, help=about)


def _tag(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--out", type=Path, default=Path("tags.html"), help="page to write (default: tags.html)")
    parser.add_argument("--tags", type=Path, metavar="CSV", help="tags to start with: to go on, or to check them")
    _first_slice(parser)
    _slice_axis(parser)


def _train(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    tags = parser.add_mutually_exclusive_group(required=True)
    tags.add_argument("--tags", type=Path, metavar="CSV", help="slice tags, columns case,slice,label (docs/data.md)")
    tags.add_argument("--datalist", type=Path, metavar="JSON", help="or a datalist of python -m custom_modules.data")
    parser.add_argument("--bundle", required=True, help=f"whose settings to train with: {BUNDLE}")
    parser.add_argument("--out", type=Path, metavar="RUN", required=True, help="folder of weights, logs, checkpoints")
    _first_slice(parser)
    about = "log to MLflow too (pip install '.[mlflow]'), into RUN/mlruns.db or MLFLOW_TRACKING_URI"
    parser.add_argument("--tracking", choices=["mlflow"], help=about)


def _weights(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--bundle", help=f"whose weights to use: {BUNDLE}")
    weights.add_argument("--model", type=Path, metavar="RUN", help="or those of your own: what `weakseg train` wrote")


def _new(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the bundle and its folder, such as liver")
    parser.add_argument("--from", dest="source", required=True, metavar="BUNDLE", help="bundle to start from")


def _template(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("--out", type=Path, metavar="CSV", required=True, help="file to write; it must not exist")
    _slice_axis(parser)


def _check(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    parser.add_argument("tags", type=Path, metavar="CSV", help="slice tags, columns case,slice,label")
    _first_slice(parser)
    _slice_axis(parser)
