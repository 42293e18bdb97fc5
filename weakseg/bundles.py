"""Bundles: found by name or folder, and run with the knobs of a command line, as `python -m monai.bundle` runs them."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom_modules.files import read_json
from weakseg.options import WrongCommand

RECORD = "weakseg.json"  # what a training is, in its folder
HOME = (Path(__file__).parent / "shipped").resolve()  # the shipped bundles: copies in a wheel, a link in the repository

SILENT = {  # loggers, and the level from which they are heard
    "monai.bundle.scripts": "WARNING",  # "input summary"
    "monai.bundle.workflows": "ERROR",  # "skipping logging": it is set here
    "monai.data.nvimgcodec_pydicom_plugin": "ERROR",  # a decoder nobody asked for
    "ignite.engine.engine": "CRITICAL",  # "resuming from iteration 0"; "terminating due to exception", which follows
    "highdicom": "WARNING",  # one line for each group of entries that it copies
    "custom_modules.report.handler": "WARNING",  # where the report is: `predict` says it
}


def quiet(debug: bool) -> None:
    """Shows what a user waits for: our own messages, and the warnings of others; with `debug` all, with their origin.

    What is left out is named in `SILENT` and in `knobs.NOISE`.
    """
    if debug:
        sys.warnoptions.append("default")  # which `ignore_noise` respects
        return
    warnings.filterwarnings("ignore", "parsing config_file")  # MONAI's advisory, about every config it reads
    import monai.bundle  # noqa: F401  # it sets its loggers to INFO

    from custom_modules.knobs import ignore_noise

    ignore_noise()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for name, level in SILENT.items():
        logging.getLogger(name).setLevel(level)


def bundle_folder(name: str | Path) -> Path:
    """Returns the folder of a bundle: a shipped one by its name, any other by its folder.

    Raises:
        WrongCommand: there is no such bundle; the message names those that there are.
    """
    for folder in (HOME / name, Path(name)):
        if (folder / "configs" / "inference.yaml").is_file():
            return folder.resolve()
    known = ", ".join(sorted(path.parents[1].name for path in HOME.glob("*/configs/inference.yaml")))
    raise WrongCommand(f"there is no bundle {str(name)!r}: give one of {known}, or the folder of another bundle.")


def read_record(run: Path) -> dict:
    """Reads what a training is: {"bundle", "weights", "datalist", "knobs"}.

    Raises:
        WrongCommand: `run` was not written by `weakseg train`.
    """
    if not (run / RECORD).is_file():
        raise WrongCommand(
            f"{run} holds no {RECORD}, which `weakseg train` writes; for weights of another training give "
            "--bundle and --ckpt_path."
        )
    return read_json(run / RECORD)


def config_files(bundle: Path, *names: str) -> list[str]:
    """Returns the paths of configs of a bundle."""
    return [str(bundle / "configs" / f"{name}.yaml") for name in names]


def checked_knobs(knobs: Mapping[str, Sequence[str]], config: Mapping, reserved: Mapping[str, str]) -> dict[str, str]:
    """Turns the words of a command line into the values of knobs.

    Several words are a list, and so is one word where the config has a list; no word is a switch that is turned on;
    `yes` and `true` in any case are True, `no` and `false` False, where the config has a switch.

    Args:
        knobs: {knob: its words}.
        config: content of the config files.
        reserved: {knob: the option of `weakseg` that sets it}.

    Raises:
        WrongCommand: a knob does not exist, has another kind of value, or is one of `reserved`.
    """
    from custom_modules.knobs import find_knob

    values = {}
    for name, words in knobs.items():
        if name in reserved:
            raise WrongCommand(f"--{name} is set by {reserved[name]}.")
        default = config.get(name)
        value = words[0] if len(words) == 1 else f"[{','.join(words)}]" if words else "True"
        if isinstance(default, bool):
            value = {"true": "True", "yes": "True", "false": "False", "no": "False"}.get(value.lower(), value)
        elif isinstance(default, list) and value[0] not in "[($@%":
            value = f"[{value}]"
        if problem := find_knob(name, config, value):
            raise WrongCommand(problem)
        values[name] = value
    return values


def run_bundle(files: Sequence[str], run_id: str, knobs: Mapping[str, Any], debug: bool = False) -> None:
    """Does what `python -m monai.bundle run RUN_ID --config_file FILES --knob=value ...` does, in this process.

    So a knob means the same in both, and the results record the same command.
    """
    from unittest import mock

    import fire
    from monai.bundle.scripts import run

    words = [run_id, f"--config_file={list(files)}", *(f"--{name}={value}" for name, value in knobs.items())]
    if debug:
        print("$ python -m monai.bundle run", shlex.join(words), file=sys.stderr, flush=True)
    else:
        words.append("--logging_file=False")  # the level and form of messages are those of `quiet`
    with mock.patch.object(sys, "argv", ["monai.bundle", "run", *words]), mock.patch.object(sys, "path", [*sys.path]):
        fire.Fire(run, command=words)


def next_command(*words: str | Path, note: str = "") -> None:
    """Prints the command that comes next."""
    print(f"next       weakseg {shlex.join(map(str, words))}{f'  ({note})' if note else ''}", flush=True)
