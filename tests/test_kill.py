"""SIGKILL at seeded random moments, and full disks: the same command finishes, and gives what it would have given.

`make test` kills each kind of run once; `make test-long` kills each 20 times from inside, and 20 times by a clock.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from custom_modules.data.__main__ import main as build_datalist
from custom_modules.files import is_whole, sha256
from tests.helpers.bundles import SHORT, TAGS, TINY, config, head, save_nifti
from tests.helpers.runs import command, save_random_weights, without_times
from tests.helpers.studies import BUNDLE, FAST, study_file
from tests.odd.kills import DENOISER, KILLED, MAPS, STUDENT, WHOLE, counted_moments, full_disk, run_until, start

long = pytest.mark.long
STAGES = [("training", DENOISER), ("training", MAPS), ("training", STUDENT)]
KINDS = [*STAGES, ("inference", WHOLE), ("evaluation", WHOLE), ("study", WHOLE)]
IN_A_ROW = 4  # kills before a run may finish


@pytest.fixture(scope="module")
def commands(trained, dataset, dataset_without_masks, tmp_path_factory) -> dict[str, Callable[[Path], list]]:
    """{kind of run: the words of its command for an output folder}."""
    folder = tmp_path_factory.mktemp("given")
    weights = save_random_weights(trained.weights, folder / "model.pt")
    items = []
    for seed in range(10):
        image, lesion = head(seed)
        files = {"image": f"p{seed}/p{seed}_flair.nii.gz", "label": f"p{seed}/p{seed}_seg.nii.gz"}
        for array, file in zip((image, lesion), files.values()):
            save_nifti(array, folder / file)
        items.append({"case": f"p{seed}", "slice_labels": TAGS} | files)
    (folder / "datalist.json").write_text(json.dumps({"test": items}))
    study = study_file(folder, {"maps": {"method": "cdm"}, "floor": {"method": "intensity"}}, seeds=[0, 5])
    where = ["--bundle", BUNDLE, "--dataset_dir", dataset, "--datalist", dataset / "datalist.json"]
    train = ["run", "--config_file", config("brats_flair", "train"), "--dataset_dir", dataset_without_masks]
    train += ["--datalist", dataset_without_masks / "tags_only.json", *TINY, *SHORT]
    return {
        "training": lambda out: [*train, "--output_dir", out],
        "inference": lambda out: command(folder, out, weights, "--gate=all", overlays=()),
        "evaluation": lambda out: command(folder, out, weights, "--gate=tags"),
        "study": lambda out: ["benchmark", study, *where, *FAST, "--ckpt_path", weights, "--output_dir", out],
    }


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory) -> Callable[[str], tuple[Path, Counter]]:
    """Runs a kind of command without interruption, once: its output folder, and the number of its moments."""
    runs = {}

    def run(kind: str) -> tuple[Path, Counter]:
        if kind not in runs:
            out = tmp_path_factory.mktemp(kind)
            with counted_moments() as moments:
                start(commands[kind](out))
            runs[kind] = out, moments
        return runs[kind]

    return run


def content(out: Path) -> dict[str, object]:
    """All files of a run, byte for byte; of tables, records and pages what does not depend on the clock or the folder.

    Logs are left out, and what a killed process had not finished: nothing reads it.
    """
    files = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith((".partial-", "events."))]
    return {_name(path, out): without_times(path) for path in files}


def _name(path: Path, out: Path) -> str:
    """A file's path in `out`; in the cache, where it depends on that of `out`, the hash of the file."""
    return f"cache/{sha256(path)}" if path.parent.name == "cache" else str(path.relative_to(out))


def assert_same(out: Path, expected: Path) -> None:
    one, other = content(out), content(expected)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def finish_over_kills(words: list, out: Path, expected: Path, n_kills: int, kill: Callable[[], dict]) -> None:
    """Starts a command until it was killed `n_kills` times, up to `IN_A_ROW` times before it may finish."""
    killed = 0
    while killed < n_kills:
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(min(IN_A_ROW, n_kills - killed)):
            code, text = run_until(words, **kill())
            assert code in (0, KILLED), text
            killed += code == KILLED
        start(words)
        assert_same(out, expected)


def check_kills(kind: str, stage: int, n_kills: int, commands, whole, out: Path) -> None:
    (expected, moments), chance = whole(kind), random.Random(f"{kind} {stage}")

    def kill() -> dict:
        return {"stage": stage, "moment": chance.randint(1, moments[stage])}

    finish_over_kills(commands[kind](out), out, expected, n_kills, kill)


def test_training_that_is_killed_in_each_stage_continues(commands, whole, tmp_path):
    """One run, killed three times."""
    (expected, moments), chance, out = whole("training"), random.Random(0), tmp_path / "out"
    for _, stage in STAGES:
        moment = chance.randint(1, moments[stage])
        code, text = run_until(commands["training"](out), stage, moment)
        assert code == KILLED, text
    start(commands["training"](out))
    assert_same(out, expected)


@pytest.mark.parametrize("kind", ["inference", "evaluation", "study"])
def test_what_is_killed_is_finished_by_the_same_command(kind, commands, whole, tmp_path):
    check_kills(kind, WHOLE, 1, commands, whole, tmp_path / "out")


@long
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_twenty_kills(kind, stage, commands, whole, tmp_path):
    check_kills(kind, stage, 20, commands, whole, tmp_path / "out")


@long
@pytest.mark.parametrize("kind", ["training", "inference", "evaluation", "study"])
def test_twenty_kills_by_a_clock(kind, commands, whole, tmp_path):
    """At moments that no code marks; how far a run comes by then depends on the machine."""
    chance, (expected, _) = random.Random(kind), whole(kind)
    finish_over_kills(
        commands[kind](tmp_path / "out"), tmp_path / "out", expected, 20, lambda: {"seconds": chance.uniform(0.5, 6)}
    )


# ---- a full disk

FULL = {  # paths: each alternative is the write of a case; where there are several, in one run
    "training": [
        *("cache/", r"models/checkpoint_epoch=1", r"models/model\.pt", r"model\.training", r"teacher_\w+\.pt"),
        *("p0_flair_mask|p1_flair_saliency", "p1_flair_prov", r"teacher_\w+/checkpoint_epoch=2"),
    ],
    "evaluation": ["p0_flair_mask|p1_flair_sal|p2_flair_prov|cases/p3", "per_slice", "per_volume", "summary"],
    "study": [*("study.json", r"seed5/cell\.json", r"results\.csv", r"results\.md", r"results\.json"),
              *("comparison.png", "report.html")],
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["evaluation", *(pytest.param(kind, marks=long) for kind in ("training", "study"))])
def test_a_full_disk_is_named_and_leaves_nothing_torn(kind, commands, whole, tmp_path):
    """At each kind of write in turn; then there is room, and the same command finishes."""
    words, out = commands[kind](tmp_path / "out"), tmp_path / "out"
    for pattern in FULL[kind]:
        with full_disk(pattern), pytest.raises(BaseException) as error:  # noqa: B017
            start(words)
        told = "".join(traceback.format_exception(error.value))
        for part in pattern.split("|"):
            assert re.search(rf"No space left on device: '[^']*{part}", told), (part, told)
        assert not list(out.rglob(".partial-*")), pattern
        assert all(is_whole(path) for path in out.rglob("*.pt"))
    start(words)
    assert_same(out, whole(kind)[0])


def test_a_full_disk_ends_the_builder_of_a_datalist_with_one_line(dataset, tmp_path):
    words = ["brats", "--root", str(dataset), "--output", str(tmp_path / "list.json")]
    with full_disk("list.json"), pytest.raises(SystemExit, match="^error: .*No space left on device: '.*list.json'$"):
        build_datalist(words)
    assert not list(tmp_path.iterdir())
