"""Checks that a config says what the TorchScript program does.

The program (`packing.torchscript`) repeats in torch operations what the shared `configs/inference.yaml` puts together.
So these sections of a config must be those of the shared one, and the shared one must be as it was when the program was
written: its fingerprint is kept here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from monai.bundle import ConfigParser

from packing.configs import SHARED, expand

SECTIONS = ("slice_size", "preprocessing", "methods#segmenter", "method_factory", "inferer", "postprocessing")
WRITTEN_FOR = "a9575c8cbd466aeb"  # fingerprint of these sections
# ids that may differ: what the program is given, how a host writes its files, and what only warns
FREE = re.compile(
    "^preprocessing#transforms#7#margin#[01]$|^inferer#appearance#|"
    "^postprocessing#transforms#([2-5]#(output_dir|output_postfix|print_log|writer|algorithm|segment.*)|5#_disabled_)$"
)
NOTHING = "nothing"


def check_program(parser: ConfigParser) -> None:
    """Compares the config with the one that `packing.torchscript` is written for, the shared `configs/inference.yaml`.

    Raises:
        ValueError: if the config says something that the program does not do, or the shared one has changed.
    """
    shared = yaml.safe_load(expand((SHARED / "inference.yaml").read_text(encoding="utf-8")))
    expected, found = _facts(ConfigParser(shared)), _facts(parser)
    for name in [*expected, *found]:
        if expected.get(name, NOTHING) != found.get(name, NOTHING):
            raise ValueError(
                f"the TorchScript program is written for {name} {expected.get(name, NOTHING)!r}; got "
                f"{found.get(name, NOTHING)!r}. Leave it as it was, or change packing/torchscript.py with it."
            )
    if (fingerprint := hashlib.sha256(json.dumps(expected).encode()).hexdigest()[:16]) != WRITTEN_FOR:
        raise ValueError(
            f"configs/inference.yaml has changed in {', '.join(SECTIONS)}. Make packing/torchscript.py do the same, "
            f"then set WRITTEN_FOR in packing/program.py to {fingerprint!r}."
        )


def _facts(parser: ConfigParser) -> dict[str, Any]:
    """Lists what `SECTIONS` of a config say, {id: value}, but for `FREE`."""
    facts, nodes = {}, [(name, parser.get(name, NOTHING)) for name in SECTIONS]
    while nodes:
        name, node = nodes.pop(0)
        if isinstance(node, Mapping | list) and node:
            items = node.items() if isinstance(node, Mapping) else enumerate(node)
            nodes = [(f"{name}#{key}", value) for key, value in items] + nodes
        elif not FREE.search(name):
            facts[name] = node
    return facts
