"""The command line of `weakseg`: options and knobs are told apart, nothing is guessed, help has an example."""

from __future__ import annotations

import pytest

from weakseg.command import TASKS
from weakseg.options import parse

PREDICT = ["predict", "DIR", "--bundle", "brats_flair", "--out", "OUT"]


@pytest.mark.parametrize(
    ("words", "knobs"),
    [
        ([], {}),
        (["--method", "cg_cdm", "--seed=3"], {"method": ["cg_cdm"], "seed": ["3"]}),
        (["--target_labels", "1", "4", "--debug"], {"target_labels": ["1", "4"]}),
        (["--uncertainty", "--num-steps", "5"], {"uncertainty": [], "num_steps": ["5"]}),
        (["--seed", "-1", "--preprocessing#transforms#7#margin=[5,5,0]"],
         {"seed": ["-1"], "preprocessing#transforms#7#margin": ["[5,5,0]"]}),
        (["--blur", "1", "--blur", "2"], {"blur": ["2"]}),
    ],
)  # fmt: skip
def test_what_the_task_does_not_know_is_a_knob(words, knobs):
    for argv in ([*PREDICT, *words], [*PREDICT[:2], *words, *PREDICT[2:]]):
        options, found = parse(argv)
        assert found == knobs and str(options.folder) == "DIR" and str(options.out) == "OUT"
        assert options.bundle == "brats_flair" and options.task == "predict"


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["predict", "--bundle", "brats_flair", "--out", "OUT"], "DIR"),
        (["predict", "--method", "cdm", "DIR", "--bundle", "b", "--out", "OUT"], "DIR"),  # the knob takes both words
        (["predict", "DIR", "--bundle", "brats_flair"], "--out"),
        (["predict", "DIR", "--out", "OUT"], "one of the arguments --bundle --model is required"),
        (["train", "DIR", "--out", "RUN", "--bundle", "b"], "one of the arguments --tags --datalist is required"),
        (["train", "DIR", "--tags", "t.csv", "--bundle", "b"], "--out"),
        (["tags", "check", "DIR"], "CSV"),
        (["tags", "check", "DIR", "t.csv", "--method", "cdm"], "unrecognized arguments: --method cdm"),
        (["predicts"], "invalid choice: 'predicts'"),
        ([], "TASK"),
    ],
)
def test_nothing_is_guessed(argv, missing, capsys):
    with pytest.raises(SystemExit) as error:
        parse(argv)
    assert error.value.code == 2 and missing in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_help_shows_an_example_that_works_and_the_exit_codes(task, capsys):
    with pytest.raises(SystemExit) as error:
        parse([*task.split(), "--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0 and "Exit codes: 0 done" in text
    example = text.partition("Example:\n")[2].splitlines()[0].split()
    assert example[0] == "weakseg" and parse(example[1:])[0].task == task
