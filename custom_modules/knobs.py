"""Checks of what the user turned: a misspelt knob and a wrong choice are errors that name the right ones.

MONAI's bundles accept any `--id value` on the command line and silently ignore ids that the config does not have.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence

from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from monai.bundle.utils import ID_SEP_KEY

RUN_ARGUMENTS = set(inspect.signature(run).parameters) | {"workflow_name", "workflow_type", "properties_path"}
OPTION = re.compile("--|-[a-zA-Z]")  # how a word starts that Fire takes for one
EVALUATED = ("$", "@", "%")  # how a value starts that MONAI evaluates: an expression, a reference, a part of a file


def command_line(argv: Sequence[str] | None = None) -> tuple[dict[str, str], list[str]]:
    """What `python -m monai.bundle run` was given: {id: the word after it, or ""}, and its config files, in order.

    Both are empty when the process was started otherwise (a test, MONAI Label, a notebook).
    """
    argv = list(sys.argv if argv is None else argv)
    given = {}
    for argument, following in zip(argv[1:], [*argv[2:], ""]):
        if OPTION.match(argument):
            name, equals, value = argument.lstrip("-").partition("=")
            given[name.replace("-", "_")] = value if equals or OPTION.match(following) else following
    if "config_file" not in given or "monai" not in argv[0]:
        return {}, []
    files = given.pop("config_file").strip("[]").replace("'", "").replace('"', "").split(",")
    return given, [file.strip() for file in files]


def check_knobs(argv: Sequence[str] | None = None) -> None:
    """Compares the ids given to `python -m monai.bundle run` with those that its config files know.

    Does nothing when the process was started otherwise.

    Raises:
        ValueError: if an id does not exist, with the closest ones that do, or a switch is neither True nor False.
    """
    given, files = command_line(argv)
    config = ConfigParser.load_config_files(files) if files else {}
    for name in given:
        if name not in RUN_ARGUMENTS and (problem := find_knob(name, config, given[name])):
            raise ValueError(problem)


def find_knob(name: str, config: Mapping, value: str = "") -> str | None:
    """None where `config` has the id `name` (a, a#b or a::b) and it may be `value`, else what is wrong, with the
    closest ids. `value` is the word after it on the command line; "" is none."""
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
        return f"--{name} must be True or False, so written; got {value!r}, a text, which would count as True."
    return None


def choose(options: Mapping, name: str, knob: str):
    """`options[name]`, or an error that lists what `knob` may be.

    Raises:
        ValueError: if there is no such option.
    """
    if name not in options:
        raise ValueError(f"{knob} must be one of {sorted(options)}; got {name!r}.")
    return options[name]


def own_settings(method: str, settings: Mapping[str, Mapping]) -> dict:
    """The settings of one method, {knob: value}, from a table {knob: {method: value, "others": value}}."""
    return {knob: values.get(method, values["others"]) for knob, values in settings.items()}
