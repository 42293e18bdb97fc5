"""All that is measured on a GPU, part after part, each in a process of its own with a time limit; `gpu.sh` calls it.

    python -m benchmarks.gpu --output gpu.json [--quick] [--only speed,volume]

A part that fails is logged with its traceback, the others run all the same, and the command ends non-zero. On a CPU
everything runs, too, and says so in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).parents[2]
BUNDLE = REPO / "bundles" / "brats_flair"
PARTS = {  # in order, with their limits in seconds
    "phantoms": 60,
    "speed": 100,
    "throughput": 80,
    "volume": 60,
    "tests": 100,
    "nccl": 90,
    "resume": 60,
}
TINY = [f"--network_def#{part}#channels=[8,8,8]" for part in ("denoiser", "classifier")]
TINY += [f"--network_def#{part}#num_head_channels=8" for part in ("denoiser", "classifier")]
TINY += ["--network_def#segmenter#features=[8,8,8,8,8,8]", "--image_size=32", "--batch_size=4", "--segmenter_size=64"]


def bundle_command(config: str, data: Path, *more: str) -> list[str]:
    """Return `monai.bundle run` of a config, or of several joined by "+", on the phantoms."""
    files = ",".join(f"'{BUNDLE}/configs/{name}.yaml'" for name in config.split("+"))
    return ["monai.bundle", "run", "--config_file", f"[{files}]", "--dataset_dir", str(data), *more]


def nccl_command(work: Path, epochs: int, quick: bool) -> list[str]:
    """Return a training of all three stages by torchrun with one process; a second call with more epochs resumes it."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"]
    where = ["--output_dir", str(work / "runs"), "--ckpt_dir", str(work / "models"), f"--max_epochs={epochs}"]
    knobs = ["--epoch_length=2", *TINY] if quick else ["--epoch_length=20", "--image_size=128", "--val_interval=1"]
    config = "train+multi_gpu_train"
    return [*launch, *bundle_command(config, work / "data", *where, *knobs, "--segmenter_epochs=2")]


def commands(work: Path, quick: bool) -> dict[str, list[str]]:
    """Return what each part runs, as arguments of `python -m`."""
    measured = [f"--folder={work}", *(["--quick"] if quick else [])]
    pytest = ["pytest", "-q", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "default", "-rs"]
    return {
        "phantoms": ["benchmarks.gpu.parts", "phantoms", *measured],
        "speed": ["benchmarks.gpu.parts", "speed", *measured],
        "throughput": ["benchmarks.gpu.parts", "throughput", *measured],
        "volume": ["benchmarks.gpu.parts", "volume", *measured],
        "tests": [*pytest, "-o", "addopts=--import-mode=importlib", "tests/gpu"],
        "nccl": nccl_command(work, 2, quick),
        "resume": nccl_command(work, 3, quick),
    }


def run(name: str, command: list[str], limit: float) -> dict:
    """Run one part, print what it prints, and return its status and seconds."""
    print(f"\n==== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=REPO, start_new_session=True)
    try:
        code = process.wait(limit)
        status = "passed" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
        process.wait()
        status = f"stopped after {limit:.0f} s"
    seconds = round(time.perf_counter() - start, 1)
    print(f"==== {name}: {status}, {seconds} s", flush=True)
    return {"status": status, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--quick", action="store_true", help="every part at its smallest")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma; `phantoms` always runs")
    options = parser.parse_args(argv)
    chosen = {"phantoms", *options.only.split(",")}
    if unknown := chosen - PARTS.keys():
        parser.error(f"--only: there is no part {sorted(unknown)}; there are {list(PARTS)}")
    report = {"quick": options.quick, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(Path(folder), options.quick).items():
            if name not in chosen:
                continue
            report["parts"][name] = run(name, command, PARTS[name] * (3 if options.quick else 1))
            if (result := Path(folder, f"{name}.json")).is_file():
                report["parts"][name] |= json.loads(result.read_text())
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")  # after each part: a limit may end all
    failed = [name for name, part in report["parts"].items() if part["status"] != "passed"]
    print(f"\nwritten to {options.output}; " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
