"""The tasks of `weakseg`, and how the command ends."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from weakseg.options import WrongCommand, parse

Knobs = dict[str, list[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code (`options.CODES`); the last lines of an error are its cause."""
    options, knobs = parse(sys.argv[1:] if argv is None else argv)
    try:
        _check_paths(options)
        if sys.stderr.isatty():  # what follows is imported in seconds
            print(f"weakseg {options.task}: loading ...", file=sys.stderr, flush=True)
        from weakseg.bundles import quiet

        quiet(options.debug)
        TASKS[options.task](options, knobs)
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, WrongCommand):
            print(f"\nerror: {error}", file=sys.stderr)
            return 2
        from custom_modules.knobs import explain

        print(f"\nerror: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def _check_paths(options: Namespace) -> None:
    """Checks that what the command line names is there, before anything else is loaded."""
    from weakseg.bundles import bundle_folder, read_record

    given = vars(options)
    for name in ("folder", "tags", "datalist"):
        if given.get(name) and not given[name].exists():
            raise WrongCommand(f"{given[name]} does not exist; check the path.")
    if given.get("bundle"):
        bundle_folder(options.bundle)
    if given.get("model"):
        read_record(options.model)


def _tag(options: Namespace, knobs: Knobs) -> None:
    from custom_modules.data.layouts import find_cases
    from weakseg.page import write_page

    settings = options.tags, options.slice_axis, options.first_slice
    skipped = write_page(find_cases(options.folder), options.out, *settings)
    print(f"page       {options.out}: open it in a browser, tag, and save tags.csv (among its downloads)")
    _suggest_training(options, "tags.csv")
    _end_if_left_out("on the page", skipped)


def _suggest_training(options: Namespace, tags: Path | str) -> None:
    from weakseg.bundles import next_command

    axis = () if options.slice_axis == 2 else ("--slice_axis", str(options.slice_axis))
    next_command("train", options.folder, "--tags", tags, "--bundle", "brats_flair", "--out", "RUN", *axis)


def _end_if_left_out(where: str, skipped: Sequence[str]) -> None:
    """Ends a task that could not do all volumes; the others are done.

    Raises:
        RuntimeError: volumes are left out; the message names them.
    """
    if skipped:
        raise RuntimeError(f"{len(skipped)} volume(s) are not {where}, for the reasons above: {', '.join(skipped)}; "
                           "export them again, or take them away.")  # fmt: skip


def _train(options: Namespace, knobs: Knobs) -> None:
    from weakseg.bundles import next_command
    from weakseg.train import train

    weights, skipped = train(options, knobs)
    print(f"\nweights    {weights}\nlosses     tensorboard --logdir {shlex.quote(str(options.out))}")
    next_command("predict", "NEW", "--model", options.out, "--out", "OUT", note="NEW: volumes that it has not seen")
    _end_if_left_out("in the training", skipped)


def _predict(options: Namespace, knobs: Knobs) -> None:
    from weakseg.predict import predict

    predict(options, knobs)


def _evaluate(options: Namespace, knobs: Knobs) -> None:
    from weakseg.predict import evaluate

    evaluate(options, knobs)


def _new_target(options: Namespace, knobs: Knobs) -> None:
    from weakseg.bundles import HOME

    sys.path.append(str(HOME.parent))  # packing is beside this package, and is not installed
    try:
        from packing.new_bundle import main as new_bundle
    except ModuleNotFoundError:
        raise RuntimeError("new-target needs the repository, not the installed package alone.") from None
    further = [word for knob, words in knobs.items() for word in (f"--{knob}", *words)]
    new_bundle([options.name, "--from", options.source, *further])


def _tags_template(options: Namespace, knobs: Knobs) -> None:
    from custom_modules.data.layouts import find_cases
    from custom_modules.data.tags import write_template
    from weakseg.bundles import next_command

    n_slices = write_template(find_cases(options.folder), options.out, options.slice_axis)
    print(f"template   {options.out}: {n_slices} rows; write 1 (shows the target) or 0 under label")
    next_command("tags", "check", options.folder, options.out)


def _tags_check(options: Namespace, knobs: Knobs) -> None:
    from custom_modules.data.layouts import find_cases
    from custom_modules.data.tags import read_tags, tag_cases

    tags = read_tags(options.tags, options.first_slice)
    cases, skipped, notes = tag_cases(find_cases(options.folder), tags, slice_axis=options.slice_axis)
    for case in cases:
        tags = case.get("slice_labels", ())
        shown = [index for index, tag in enumerate(tags) if tag]
        where = f", {shown[0]} to {shown[-1]} of 0 to {len(tags) - 1}" if shown else ""
        print(f"{case['case']} | {len(tags)} slices | {len(shown)} show the target{where}")
    for name, why in (skipped | notes).items():
        print(f"{name}: {why}")
    _end_if_left_out("checked", skipped)
    _suggest_training(options, options.tags)


TASKS = {
    "tag": _tag,
    "train": _train,
    "predict": _predict,
    "evaluate": _evaluate,
    "new-target": _new_target,
    "tags template": _tags_template,
    "tags check": _tags_check,
}
