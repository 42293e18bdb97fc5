"""`monai.bundle` commands in processes that are forked from one which has imported MONAI, instead of starting afresh.

A fresh process imports MONAI for seconds of a core. A fork of a server that has only imported it (no threads, no CUDA)
starts at once and is as separate: it has memory, environment and output of its own, and may be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

from tests.helpers.bundles import REPO, monai_bundle

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["monai.bundle", "monai.engines", "monai.handlers", "torch.distributed"])
SECONDS = 300


def forked_bundle(*arguments, processes: int = 1, cwd: Path = REPO) -> CompletedProcess:
    """Runs `python -m monai.bundle *arguments` in `processes` processes, as `torchrun` does if there are several.

    Returns:
        As `returncode` that of the first process that failed, else 0; stdout and stderr of all come back together.
    """
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.NamedTemporaryFile() as output:
        workers = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            given = environment | ({name: str(value) for name, value in ranks.items()} if processes > 1 else {})
            workers.append(CONTEXT.Process(target=_work, args=(list(map(str, arguments)), cwd, given, output.name)))
            workers[-1].start()
        for worker in workers:
            worker.join(SECONDS)
            if worker.exitcode != 0:  # the others would wait for it
                for other in workers:
                    other.kill()
                    other.join()
        text = Path(output.name).read_text(encoding="utf-8")
    return CompletedProcess(arguments, next((w.exitcode for w in workers if w.exitcode), 0), text)


def _work(arguments: list[str], cwd: Path, environment: dict[str, str], output: str) -> None:
    with open(output, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    monai_bundle(*arguments, cwd=cwd)
