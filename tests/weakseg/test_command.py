"""`weakseg` from tags to masks on tiny volumes: what it prints, what it refuses, how it ends and continues."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from custom_modules.training.checkpoints import WholeFiles
from tests.helpers.bundles import REPO, SHAPE, SHORT, TAGS, TINY, head, save_nifti
from weakseg.bundles import SILENT, read_record
from weakseg.command import main
from weakseg.options import WrongCommand
from weakseg.train import stopped

KNOBS = [word for word in TINY if not word.startswith("--logging_file")]


@pytest.fixture(autouse=True)
def levels():
    """The levels and handlers of loggers as they were: a command changes those of its process."""
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in ("", *SILENT)}
    yield
    for name, (level, handlers) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three heads, two of them tagged in a CSV as Excel writes it; the third has a mask."""
    folder = tmp_path_factory.mktemp("data")
    rows = ["sep=;", "Case;Slice;Label"]
    for seed in range(3):
        image, lesion = head(seed)
        save_nifti(image, folder / f"h{seed}" / f"h{seed}_flair.nii.gz")
        rows += [f"h{seed}.nii.gz;{i};{tag}.0" for i, tag in enumerate(TAGS)] if seed < 2 else []
    save_nifti(lesion, folder / "h2" / "h2_seg.nii.gz")
    (folder / "tags.csv").write_text("\n".join(rows))
    return folder


def train(data: Path, run: Path, *more: str) -> int:
    words = ["train", data, "--tags", data / "tags.csv", "--bundle", "brats_flair", "--out", run, *KNOBS, *SHORT, *more]
    return main(list(map(str, words)))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A training that is interrupted while it writes the checkpoint of its second epoch, and then finished."""
    run, texts, write = tmp_path_factory.mktemp("trained") / "RUN", [], WholeFiles.__call__

    def interrupted(self, checkpoint, filename, metadata=None):
        if filename == "checkpoint_epoch=2.pt":
            raise KeyboardInterrupt
        write(self, checkpoint, filename, metadata)

    capture = pytest.MonkeyPatch()
    capture.setattr("builtins.print", lambda *words, **_: texts.append(" ".join(map(str, words))))
    with mock.patch.object(WholeFiles, "__call__", interrupted):
        codes = [train(data, run)]
    codes.append(train(data, run))
    capture.undo()
    return SimpleNamespace(run=run, codes=codes, text="\n".join(texts))


def test_a_stopped_training_says_where_and_the_same_command_continues(trained, data):
    assert trained.codes == [130, 0]
    assert "stopped after epoch 1 of 2 (stage 1 of 3); the same command continues" in trained.text
    assert f"weights    {trained.run}/models/model.pt" in trained.text
    assert f"next       weakseg predict NEW --model {trained.run} --out OUT" in trained.text
    sections = json.loads((trained.run / "datalist.json").read_text())
    found = {name: [case["case"] for case in sections[name]] for name in ("training", "test", "untagged")}
    assert "target_labels" not in sections, "tags do not tell which values of a mask they mean"
    assert found == {"training": ["h0", "h1"], "test": [], "untagged": ["h2"]}


def test_another_training_in_its_folder_is_refused(trained, data, tmp_path, capsys):
    weights = (trained.run / "models" / "model.pt").read_bytes()
    assert train(data, trained.run, "--seed", "7") == 1
    assert "holds a training with other settings: seed was the default and is now 7" in capsys.readouterr().err
    shutil.copy(trained.run / "datalist.json", tmp_path / "other.json")
    (tmp_path / "other.json").write_text((tmp_path / "other.json").read_text() + "\n")
    words = ["train", data, "--datalist", tmp_path / "other.json", "--bundle", "brats_flair", "--out", trained.run]
    assert main(list(map(str, [*words, *KNOBS, *SHORT]))) == 1
    assert "holds a training with other tags or volumes" in capsys.readouterr().err
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "tags.csv").write_text("case,slice,label\nh0,2,1\nh0,3,0\nh1,3,1\n")
    assert train(tmp_path / "data", trained.run) == 1
    assert "holds a training with other tags or volumes" in capsys.readouterr().err
    assert (trained.run / "models" / "model.pt").read_bytes() == weights


def test_a_start_that_failed_is_not_a_training(data, tmp_path, capsys):
    for rate in ("-1", "-2"):  # the second is not told to repeat the first
        assert train(data, tmp_path / "RUN", f"--segmenter_lr={rate}") == 1
        assert f"--segmenter_lr must be a number above 0; got '{rate}'" in capsys.readouterr().err


@pytest.mark.parametrize("knob", ["--annotated=True", "--ckpt_dir=$@bundle_root + '/models'"])
def test_no_knob_leads_to_a_bundles_own_weights(knob, data, tmp_path, capsys):
    assert train(data, tmp_path / "RUN", knob) == 1
    assert "must be paths, and annotated is for MONAI Label alone" in capsys.readouterr().err


def test_predict_and_evaluate_with_the_weights_of_a_training(trained, data, tmp_path, capsys):
    out = tmp_path / "OUT"
    assert main(["predict", str(data), "--model", str(trained.run), "--out", str(out), "--device=cpu"]) == 0
    printed = capsys.readouterr().out
    for case in ("h0", "h1", "h2"):
        assert (out / f"{case}_flair" / f"{case}_flair_mask.nii.gz").is_file()
        assert f"{case} | 6 slices | " in printed
    assert f"masks      {out}/CASE/CASE_mask.nii.gz (3 cases)" in printed
    assert f"next       weakseg evaluate {data} --model {trained.run} --out {out}_evaluation" in printed
    settings = json.loads((out / "h0_flair" / "h0_flair_provenance.json").read_text())["settings"]
    assert (settings["image_size"], settings["segmenter_size"]) == (32, 64), "those of the training"

    words = ["evaluate", str(data), "--model", str(trained.run), "--out", str(tmp_path / "E"), "--device=cpu"]
    assert main(words) == 0
    with open(tmp_path / "E" / "metrics" / "per_volume.csv", newline="") as file:
        assert [(row["case"], row["in_training"], row["group"]) for row in csv.DictReader(file)] == [
            ("h2", "0", data.name)
        ]
    assert f"measures   {tmp_path}/E/metrics" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, "predict {data} --bundle brats_flair --out {out} --metod cdm", "did you mean one of ['method', 'methods']"),
        (1, "predict {data} --bundle brats_flair --out {out} --method cmd --device cpu", "method must be one of"),
        (2, "predict {data}/gone --bundle brats_flair --out {out}", "{data}/gone does not exist; check the path."),
        (2, "predict {data} --bundle brats --out {out}", "there is no bundle 'brats': give one of brats_flair"),
        (2, "predict {data} --model {data} --out {out}", "holds no weakseg.json, which `weakseg train` writes"),
        (2, "train {data} --tags {data}/gone.csv --bundle brats_flair --out {out}", "gone.csv does not exist; check"),
        (1, "train {data} --tags {data}/tags.csv --bundle brats_flair --out {repo}/bundles/brats_flair",
         "is the place of a bundle's own weights, which are never overwritten; give another folder as --out."),
        (1, "tags check {data} {data}/h0/h0_flair.nii.gz", "save it as CSV in UTF-8"),
        (1, "tags template {data} --out {data}/tags.csv", "exists and may hold tags"),
    ],
)  # fmt: skip
def test_an_error_is_one_message_at_the_end_and_an_exit_code(code, words, message, data, tmp_path, capsys):
    names = {"data": data, "out": tmp_path / "out", "repo": REPO}
    assert main(words.format(**names).split()) == code
    text = capsys.readouterr().err
    assert message.format(**names) in text.strip().splitlines()[-1] and "Traceback" not in text
    assert not (tmp_path / "out" / "models").exists()


def test_debug_gives_the_whole_error(tmp_path):
    with pytest.raises(WrongCommand, match="there is no bundle"):
        main(["predict", str(tmp_path), "--bundle", "b", "--out", str(tmp_path), "--debug"])


def test_a_template_is_filled_in_and_checked(data, tmp_path, capsys):
    tags = tmp_path / "tags.csv"
    assert main(["tags", "template", str(data), "--out", str(tags)]) == 0
    assert "18 rows" in capsys.readouterr().out
    other = ["--slice_axis", "0", "--out", str(tmp_path / "other.csv")]
    assert main(["tags", "template", str(data), *other]) == 0
    assert (tmp_path / "other.csv").read_text().count("h0,") == SHAPE[0] > tags.read_text().count("h0,")
    tags.write_text(tags.read_text().replace("h0,2,", "h0,2,yes"))
    assert main(["tags", "check", str(data), str(tags)]) == 0
    printed = capsys.readouterr().out
    assert "h0 | 6 slices | 1 show the target, 2 to 2 of 0 to 5" in printed
    assert "h0: 5 of 6 slices are not in the tags; they count as 0." in printed and "h1: no tags" in printed


def test_a_new_target_is_made_from_a_bundle():
    with mock.patch("packing.new_bundle.main") as new_bundle:
        assert main(["new-target", "liver", "--from", "chaos_kidney", "--target_labels", "1", "2"]) == 0
    assert new_bundle.call_args.args == (["liver", "--from", "chaos_kidney", "--target_labels", "1", "2"],)


def test_where_a_training_was_stopped(tmp_path):
    config = {"max_epochs": 90, "segmenter_epochs": "50"}
    assert stopped(tmp_path, config) == "stopped before the end of epoch 1"
    (tmp_path / "checkpoint_epoch=90.pt").touch()
    assert stopped(tmp_path, config) == "stopped after stage 1 of 3"
    (tmp_path / "distill" / "teacher").mkdir(parents=True)
    (tmp_path / "distill" / "teacher" / "checkpoint_epoch=3.pt").touch()
    assert stopped(tmp_path, config) == "stopped after epoch 3 of 50 (stage 3 of 3)"


def test_a_process_prints_no_noise(data, tmp_path):
    bundle = tmp_path / 'it\'s, a "bundle"'  # a path that needs care in a list
    shutil.copytree(REPO / "bundles" / "brats_flair" / "configs", bundle / "configs")
    (bundle / "models").symlink_to(REPO / "bundles" / "brats_flair" / "models")
    words = ["predict", data, "--bundle", bundle, "--out", tmp_path / "O", "--method", "intensity", "--device", "cpu"]
    command = [sys.executable, "-m", "weakseg", *map(str, words)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    noise = ("parsing config_file", "NvImgCodec", "nvImageCodec", "always_return_as_numpy", "resuming", "input summary")
    assert [word for word in noise if word in done.stdout + done.stderr] == []
    assert done.stderr == "" and done.stdout.startswith("case h0 (1 of 3)\n") and "\nh0 | 6 slices" in done.stdout


def test_the_record_of_a_training_names_its_parts(trained):
    record = read_record(trained.run)
    assert (record["bundle"], record["weights"], record["datalist"]) == (
        "brats_flair", "models/model.pt", "datalist.json"
    )  # fmt: skip
