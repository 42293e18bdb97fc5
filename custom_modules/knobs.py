"""Checks of what the user set: a misspelt knob and a wrong choice are errors that name the right ones.

MONAI's bundles accept any `--id value` on the command line and silently ignore ids that the config does not have; and
they end an error with the config item that it came through, 40 lines below its cause.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType

import torch
from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from monai.bundle.utils import ID_SEP_KEY

RUN_ARGUMENTS = set(inspect.signature(run).parameters) | {"workflow_name", "workflow_type", "properties_path"}
OPTION = re.compile("--|-[a-zA-Z]")  # the start of a word that Fire takes for an option
PATH = re.compile(r"(.*_(dir|path|root)|datalist)$")  # names of knobs that hold a path
ABOVE_ZERO = re.compile(
    "((segmenter_)?(batch_size|epochs|size|lr)|(max_)?epochs|max_norm|lr_(denoiser|classifier)|(image|map)_size|"
    "epoch_length|val_interval|map_draws)$"
)
NOISE = (  # starts of warnings that dependencies give about themselves, whatever the user does
    "NvImgCodecPydicomReader",  # MONAI: a GPU's decoder of DICOM is not installed
    ".*always_return_as_numpy",  # MONAI: its metrics call its own old function
)
PASSED_ON = ("Failed to instantiate component", "Failed to evaluate", "applying transform")  # MONAI's errors of errors
EVALUATED = ("$", "@", "%")  # the start of a value that MONAI evaluates: an expression, a reference, a part of a file


def command_line(argv: Sequence[str] | None = None) -> tuple[dict[str, str], list[str]]:
    """Reads what `python -m monai.bundle run` was given: {id: the next word, or ""}, and its config files, in order.

    Both are empty when the process was started in another way (a test, MONAI Label, a notebook).
    """
    argv = list(sys.argv if argv is None else argv)
    given = {}
    for argument, following in zip(argv[1:], [*argv[2:], ""]):
        if OPTION.match(argument):
            name, equals, value = argument.lstrip("-").partition("=")
            given[name.replace("-", "_")] = value if equals or OPTION.match(following) else following
    if "config_file" not in given or "monai" not in argv[0]:
        return {}, []
    from fire.parser import DefaultParseValue

    files = DefaultParseValue(given.pop("config_file"))  # a text is split at its commas, as MONAI does
    return given, [str(file).strip() for file in (files.strip("[]").split(",") if isinstance(files, str) else files)]


def check_knobs(argv: Sequence[str] | None = None) -> None:
    """Compares the ids given to `python -m monai.bundle run` with those in its config files.

    As the first thing that a run does, it also sees to what the user reads: warnings that are no news are left out, and
    an error that ends the process ends with its cause. Does nothing when the process was started in another way.

    Raises:
        ValueError: if an id does not exist, with the closest ones that do, or a value cannot be right: of another kind,
            a path that Fire takes for a number or a list, a size or rate that is not above 0. Or if MLflow is asked for
            and is not installed.
    """
    given, files = command_line(argv)
    if files and argv is None:
        ignore_noise()
        sys.excepthook = end_with_cause
    config = ConfigParser.load_config_files(files) if files else {}
    if "mlflow" in given.get("tracking", "") and find_spec("mlflow") is None:
        raise ValueError(
            "--tracking mlflow needs MLflow, which is not installed: pip install '.[mlflow]' in the repository, or "
            "pip install 'weak-diffusion-segmentation[mlflow]' with a wheel."
        )
    if files and (values := _several_values(sys.argv if argv is None else argv)):
        raise ValueError(f'{values[0]} takes one value; write several as a list: {values[0]} "[{values[1]},...]".')
    for name in given:
        problem = None if name in RUN_ARGUMENTS else find_knob(name, config, given[name])
        if problem := problem or _wrong_value(name, given[name]):
            raise ValueError(problem)


def _wrong_value(name: str, value: str) -> str | None:
    """Says what is wrong with a path, a number that has to be above 0, a seed or a device, or returns None."""
    from fire.parser import DefaultParseValue

    parsed = DefaultParseValue(value)
    if value.startswith(EVALUATED):
        return None
    if PATH.match(name) and not (isinstance(parsed, str) and value or parsed is None):
        how = f"would be read as {type(parsed).__name__} {parsed!r}; write ./{value}" if value else "needs a path"
        return f"--{name} {value} {how}."
    if ABOVE_ZERO.match(name) and (isinstance(parsed, bool) or not isinstance(parsed, int | float) or not parsed > 0):
        return f"--{name} must be a number above 0; got {value!r}."
    if name in ("output_dir", "ckpt_dir") and os.path.exists(value) and not os.path.isdir(value):
        return f"--{name} {value} is a file; give a folder."
    if name == "seed" and (type(parsed) is not int or parsed < 0):
        return f"--seed must be a whole number from 0; got {value!r}."
    if name == "device" and not _usable(value):
        return f"--device must be one that this PyTorch can use, such as cpu; got {value!r}."
    return None


def _usable(device: str) -> bool:
    try:
        return torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        return False


def _several_values(argv: Sequence[str]) -> tuple[str, str] | None:
    """Finds an option that a second number follows, as in `--target_labels 1 4`: Fire would take it for a run id."""
    for option, value, further in zip(argv, argv[1:], argv[2:]):
        if OPTION.match(option) and not OPTION.match(value) and re.fullmatch(r"[\d.]+", further):
            return option, value
    return None


def ignore_noise() -> None:
    """Leaves out the warnings `NOISE`, unless Python was told which ones to show (`python -W default`)."""
    for start in () if sys.warnoptions else NOISE:
        warnings.filterwarnings("ignore", start)


def end_with_cause(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Takes the place of `sys.excepthook`: below the traceback stands the cause, which MONAI's last line hides."""
    sys.__excepthook__(kind, error, traceback)
    if isinstance(error, Exception) and explain(error) != str(error):  # and not Ctrl-C
        print(f"\nerror: {explain(error)}", file=sys.stderr)


def explain(error: BaseException) -> str:
    """Returns the message of an error or, where MONAI passed on another error, of that one.

    The type is added where the message was not written for a user, such as that of a KeyError.
    """
    while error.__cause__ is not None and str(error).startswith(PASSED_ON):
        error = error.__cause__
    return str(error) if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {error}"


def find_knob(name: str, config: Mapping, value: str = "") -> str | None:
    """Says what is wrong with an id and its value, or returns None.

    Args:
        name: the id: a, a#b or a::b.
        config: content of the config files.
        value: the word after the id on the command line; "" where there is none.
    """
    node, parts = config, name.replace("#", ID_SEP_KEY).split(ID_SEP_KEY)
    for part in parts:
        if isinstance(node, Sequence) and not isinstance(node, str) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, Mapping) and "_target_" in node and part == parts[-1]:
            return None  # an argument that the config leaves at its default
        else:
            known = [key for key in node if not key.startswith("_")] if isinstance(node, Mapping) else []
            close = difflib.get_close_matches(part, known, n=3) or sorted(known)
            hint = f"; did you mean one of {close}?" if close else "."
            return f"--{name}: there is no knob {part!r}{hint}"
    if isinstance(node, bool) and value not in ("", "True", "False") and not value.startswith(EVALUATED):
        return f"--{name} must be exactly True or False; got {value!r}, a text, which would count as True."
    if isinstance(node, list) and value and value[0] not in "[(" and not value.startswith(EVALUATED):
        return f'--{name} must be a list, such as --{name} "[{value}]"; got {value!r}.'
    return None


def choose(options: Mapping, name: str, knob: str):
    """Returns `options[name]`, or raises an error that lists what `knob` may be.

    Raises:
        ValueError: if there is no such option.
    """
    if name not in options:
        raise ValueError(f"{knob} must be one of {sorted(options)}; got {name!r}.")
    return options[name]


def method_profile(profiles: Mapping[str, Mapping], method: str) -> dict:
    """Returns the defaults of a method, {knob: value}: the row "default" of `profiles`, then the method's own row.

    Raises:
        ValueError: if a row has a knob that the row "default" lacks.
    """
    for name, row in profiles.items():
        for knob in row:
            if knob not in profiles["default"]:
                hint = difflib.get_close_matches(knob, profiles["default"], n=1) or sorted(profiles["default"])
                raise ValueError(f"profiles#{name}: there is no knob {knob!r}; did you mean one of {hint}?")
    return {**profiles["default"], **profiles.get(method, {})}


def choose_method(methods: Mapping, method: str, profiles: Mapping[str, Mapping]):
    """Returns `methods[method]`, once every row of `profiles` is known to be a method's.

    Raises:
        ValueError: if there is no such method, or a row of `profiles` is of none.
    """
    for name in profiles:
        choose({**methods, "default": None}, name, "a row of profiles")
    return choose(methods, method, "method")
