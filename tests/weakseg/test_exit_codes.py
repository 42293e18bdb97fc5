"""`weakseg` without a training: what is partial ends with 1, a wrong command at once with 2; sections are chosen."""

from __future__ import annotations

import json
import subprocess
import sys
from unittest import mock

import pytest

from tests.helpers.bundles import REPO, TAGS, head, save_nifti
from weakseg.command import main

LABELLED = {"case": "h1", "image": "h1/h1_flair.nii.gz", "label": "h1/h1_seg.nii.gz"}


@pytest.fixture
def data(tmp_path):
    """A tagged head, one with a mask, and a file that is no volume."""
    folder = tmp_path / "data"
    for seed in range(2):
        image, lesion = head(seed)
        save_nifti(image, folder / f"h{seed}" / f"h{seed}_flair.nii.gz")
    save_nifti(lesion, folder / "h1" / "h1_seg.nii.gz")
    (folder / "h2").mkdir()
    (folder / "h2" / "h2_flair.nii.gz").write_bytes(b"cut short")
    rows = [f"h0,{index},{tag}" for index, tag in enumerate(TAGS)]
    (folder / "tags.csv").write_text("\n".join(["case,slice,label", *rows]))
    return folder


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("tags check {data} {data}/tags.csv", "checked"),
        ("tag {data} --out {data}/tags.html", "on the page"),
        ("train {data} --tags {data}/tags.csv --bundle brats_flair --out {data}/RUN", "in the training"),
    ],
)
def test_volumes_that_cannot_be_read_are_exit_code_1(words, where, data, capsys):
    with mock.patch("weakseg.train.run_bundle"):
        assert main(words.format(data=data).split()) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: 1 volume(s) are not {where}, for the reasons above: h2;")
    (data / "h2" / "h2_flair.nii.gz").unlink()
    with mock.patch("weakseg.train.run_bundle"):
        assert main(words.format(data=data).split()) == 0


def test_help_and_wrong_commands_load_nothing(tmp_path):
    script = "import sys; from weakseg.command import main; code = main(sys.argv[1:]); "
    script += "print(code, [name for name in ('torch', 'monai', 'numpy') if name in sys.modules])"
    wrong = ["predict", str(tmp_path), "--bundle", "b", "--out", "o"]
    done = subprocess.run([sys.executable, "-c", script, *wrong], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "2 []\n" and "there is no bundle 'b'" in done.stderr


def test_a_terminal_shows_at_once_that_something_happens(data, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main(["tags", "check", str(data), str(data / "tags.csv")])
    assert capsys.readouterr().err.startswith("weakseg tags check: loading ...\n")


def test_weights_of_another_training_are_not_replaced(data, capsys):
    (data / "RUN" / "models").mkdir(parents=True)
    (data / "RUN" / "models" / "model.pt").touch()
    words = ["train", data, "--tags", data / "tags.csv", "--bundle", "brats_flair", "--out", data / "RUN"]
    assert main(list(map(str, words))) == 1
    assert "model.pt exists and is of another training; give another folder as --out." in capsys.readouterr().err


def evaluated(*words: object) -> dict:
    """The datalist and the section with which `weakseg evaluate` runs the bundle."""
    with mock.patch("weakseg.predict.run_bundle") as run:
        assert main(["evaluate", *map(str, words)]) == 0
    return {name: run.call_args.args[2].get(name) for name in ("datalist", "section")}


def test_the_section_is_one_that_the_datalist_has(data, tmp_path, capsys):
    run, own, other = tmp_path / "RUN", tmp_path / "RUN" / "own.json", tmp_path / "other.json"
    run.mkdir()
    record = {"bundle": "brats_flair", "weights": "model.pt", "datalist": "own.json", "knobs": {}}
    (run / "weakseg.json").write_text(json.dumps(record))
    own.write_text(json.dumps({"training": [LABELLED], "test": [], "untagged": ["h0/h0_flair.nii.gz", LABELLED]}))
    other.write_text(json.dumps({"validation": [LABELLED]}))
    words = [data, "--model", run, "--out", tmp_path / "OUT"]
    assert evaluated(*words) == {"datalist": own, "section": "untagged"}
    assert evaluated(*words, "--section", "all") == {"datalist": own, "section": "all"}
    capsys.readouterr()
    assert evaluated(*words, "--datalist", other) == {"datalist": str(other), "section": "validation"}
    assert f"section validation of {other}, 1 cases with a mask (another: --section NAME)" in capsys.readouterr().out
    assert evaluated(*words, "--datalist", other, "--section", "test")["section"] == "test"
    words = [data, "--bundle", "brats_flair", "--out", tmp_path / "OUT"]
    assert evaluated(*words) == {"datalist": None, "section": None}, "all of the folder"
    assert evaluated(*words, "--datalist", other)["section"] == "validation"
    own.write_text(json.dumps({"training": [LABELLED]}))
    assert evaluated(*words[:1], "--model", run, "--out", tmp_path / "OUT")["datalist"] is None, "nothing was held out"
    words = [data, "--model", run, "--out", tmp_path / "OUT", "--section", "training"]
    assert evaluated(*words) == {"datalist": own, "section": "training"}, "as asked"
