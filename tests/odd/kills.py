"""Runs that are killed at a chosen moment, and disks that are full for some files.

The moments of a run are the events of its engines (a start, an iteration, an end of an epoch) and the steps of its
writes (half written, written, renamed): the same command has the same moments.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from ignite.engine import Engine

from tests.helpers.bundles import monai_bundle
from tests.helpers.processes import CONTEXT

WHOLE, DENOISER, MAPS, STUDENT = range(4)  # a run, or one of the three stages of training
KILLED = -signal.SIGKILL


def start(words: list) -> None:
    """Runs `python -m monai.bundle *words` in this process, or `python -m study *words` if the first is `benchmark`."""
    if words[0] == "benchmark":
        from study.__main__ import main

        main([str(word) for word in words])
    else:
        monai_bundle(*words)


def run_until(words: list, stage: int = WHOLE, moment: int = 0, seconds: float | None = None) -> tuple[int, str]:
    """Starts a command in a process of its own, and kills it at a moment of a stage, or after some seconds.

    Args:
        words: as of `start`.
        stage: of training; `WHOLE` counts all moments.
        moment: number of the moment, from 1; 0: none.
        seconds: when to kill it; None: never.

    Returns:
        The exit code and the output.
    """
    with tempfile.NamedTemporaryFile() as output:
        process = CONTEXT.Process(target=_work, args=([str(word) for word in words], stage, moment, output.name))
        process.start()
        process.join(300 if seconds is None else seconds)
        process.kill()
        process.join()
        return process.exitcode, Path(output.name).read_text(encoding="utf-8")


def _work(words: list[str], stage: int, moment: int, output: str) -> None:
    with open(output, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    with counted_moments(stage, moment):
        start(words)


@contextlib.contextmanager
def counted_moments(stage: int = WHOLE, moment: int = 0) -> Iterator[Counter]:
    """Counts the moments of each stage and of the whole run, and ends this process at the chosen one."""
    counts, now = Counter(), DENOISER
    fire, fsync, replace = Engine._fire_event, os.fsync, os.replace

    def count(before: Callable = lambda: None) -> None:
        counts.update([WHOLE, now])
        if counts[stage] == moment and stage in (WHOLE, now):
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_fire(engine: Engine, *args, **kwargs) -> None:
        nonlocal now
        evaluates = type(engine).__name__ == "VolumeEvaluator"
        now = MAPS if evaluates else STUDENT if now == MAPS else now
        count()
        fire(engine, *args, **kwargs)

    def counted_fsync(number: int) -> None:
        count(lambda: os.ftruncate(number, os.fstat(number).st_size // 2))
        fsync(number)

    def counted_replace(*args, **kwargs) -> None:
        count()
        replace(*args, **kwargs)
        count()

    patches = {"fsync": counted_fsync, "replace": counted_replace}
    with mock.patch.object(Engine, "_fire_event", counted_fire), mock.patch.multiple(os, **patches):
        yield counts


@contextlib.contextmanager
def full_disk(pattern: str) -> Iterator[None]:
    """Makes the disk full for files whose path has `pattern` in it: what is written aside for them goes to /dev/full,
    which fails each write as a full disk does."""
    with_name = Path.with_name

    def on_full_disk(path: Path, name: str) -> Path:
        aside = with_name(path, name)
        if name.startswith(".partial-") and re.search(pattern, str(path)):
            aside.symlink_to("/dev/full")
        return aside

    with mock.patch.object(Path, "with_name", on_full_disk):
        yield
