"""The evaluation handler in a real Ignite engine: tables, summary, warnings and errors, on 4x4 slices."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from custom_modules.evaluation import tables
from custom_modules.evaluation.handler import EvaluationMetrics
from custom_modules.evaluation.metrics import summarise
from tests.helpers.evaluations import EMPTY, LABEL, PRED, item, read, run, volume


def test_handler_in_an_engine(tmp_path, caplog, capsys):
    outputs = [
        [item("a", volume(PRED, EMPTY), volume(LABEL * 3, LABEL * 2), seconds_per_slice=0.5)],
        [],  # a failed case
        [item("b", volume(EMPTY, LABEL), volume(LABEL, LABEL * 3))],  # value 1 is no target
    ]
    handler = EvaluationMetrics(
        tmp_path, "chaos_kidney", "cdm", seed=7, target_labels=[2, 3], settings={"tau": 0.95}, training_cases=["b", "z"]
    )
    folder = run(handler, outputs)
    assert run(handler, outputs) == folder  # a second run starts afresh
    slices, volumes = read(folder / "per_slice.csv"), read(folder / "per_volume.csv")
    summary = json.loads((folder / "summary.json").read_text())

    assert [(r["case"], r["seed"], r["slice"], r["dice"], r["hd95"], r["in_training"]) for r in slices] == [
        ("a", "7", "0", "0.5", "3", "0"),
        ("a", "7", "1", "0", "nan", "0"),
        ("b", "7", "1", "1", "0", "1"),
    ]
    assert [(r["case"], r["n_slices"], r["n_undefined"], r["seconds_per_slice"]) for r in volumes] == [
        ("a", "2", "1", "0.5"),
        ("b", "1", "0", "nan"),
    ]
    assert summary["settings"] == {"target_labels": [2, 3], "min_area": 0, "slice_axis": 2, "tau": 0.95}
    assert summary["dice"]["mean"] == pytest.approx(0.5) and summary["hd95"]["n_undefined"] == 1
    assert summary["n_in_training"] == 1 and "training list" in caplog.text
    table = capsys.readouterr().out
    assert all(word in table for word in ("case", "HD95", "mean", "0.500"))
    # a: 2 of 4 + 8 pixels, 0.333; b: 1, since in its first slice there is neither target nor prediction
    assert "volume Dice, all (2 volumes): mean 0.667, median 0.667, quartiles 0.500 and 0.833" in table
    assert {line.split()[0] for line in table.splitlines() if line.endswith("  in training")} == {"b"}
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["cases", "per_slice.csv", "per_volume.csv", "summary.json"]
    again = summarise(slices, volumes, bundle="chaos_kidney", method="cdm", settings=summary["settings"])
    assert again["volume_dice"]["mean"] == pytest.approx(summary["volume_dice"]["mean"], abs=1e-6)
    assert again["hd95"] == summary["hd95"]


def test_tables_are_the_same_in_one_go_and_in_parts(tmp_path):
    outputs = [
        [item("b", volume(PRED, EMPTY), volume(LABEL, LABEL), seconds_per_slice=1 / 3)],
        [item("a", volume(EMPTY, LABEL), volume(LABEL, LABEL))],
    ]
    expected = run(EvaluationMetrics(tmp_path / "at once", "brats_flair", "cdm"), outputs)
    in_parts = EvaluationMetrics(tmp_path / "in parts", "brats_flair", "cdm", seed=0)
    run(in_parts, [outputs[1]], cases=["b", "a"])
    assert [row["case"] for row in read(in_parts.folder / "per_volume.csv")] == ["a"]
    run(in_parts, [outputs[0], []], cases=["b", "a"], done=["a"])
    for name in ("per_slice.csv", "per_volume.csv", "summary.json"):
        assert (in_parts.folder / name).read_bytes() == (expected / name).read_bytes()


def test_rows_of_a_case_that_is_not_finished_now_are_not_counted(tmp_path):
    handler = EvaluationMetrics(tmp_path, "brats_flair", "cdm")
    outputs = [[item(name, volume(PRED), volume(LABEL))] for name in ("a", "b")]
    run(handler, outputs)
    run(handler, [[], outputs[1]], cases=["a", "b"])  # a fails
    assert [row["case"] for row in read(handler.folder / "per_volume.csv")] == ["b"]


def test_rows_are_those_of_the_mask_and_label_on_disk(tmp_path):
    label, mask = tmp_path / "a_seg.nii.gz", tmp_path / "a" / "a_mask.nii.gz"
    case = {"case": "a", "stem": "a", "label_file": str(label)}
    mask.parent.mkdir()

    def handler(**more):
        return EvaluationMetrics(tmp_path, "brats_flair", "cdm", **more)

    engine = Engine(lambda engine, output: output)
    engine.cases, engine.done = {"a": case}, []
    handler().attach(engine)
    for path in (label, mask):
        path.write_bytes(b"first")
    assert not handler().is_done(case)
    engine.run([[item("a", volume(PRED), volume(LABEL))]])
    assert handler().is_done(case)
    rows = tmp_path / "metrics" / "cases" / "a.json"
    whole = rows.read_text()
    rows.write_text(json.dumps({"measured": json.loads(whole)["measured"]}))
    assert not handler().is_done(case), "without numbers"
    rows.write_text(whole)
    assert not handler(min_area=2).is_done(case) and not handler(target_labels=[1]).is_done(case)
    for path in (label, mask):
        path.write_bytes(b"other")
        assert not handler().is_done(case)
        path.write_bytes(b"first")
    assert handler().is_done(case)


def test_handler_without_a_case(tmp_path, caplog):
    folder = run(EvaluationMetrics(tmp_path, "brats_flair", "cdm"), [[]])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["n_volumes"], summary["n_slices"], summary["dice"]["mean"]) == (0, 0, None)
    assert summary["n_in_training"] is None  # nothing known about the training list
    assert read(folder / "per_slice.csv") == []
    assert any(record.levelno == logging.ERROR and "no case" in record.message for record in caplog.records)


def test_handler_warns_of_a_label_without_target(tmp_path, caplog):
    negative = item("a", volume(PRED), volume(LABEL))
    negative["label"].affine = torch.eye(4)
    folder = run(EvaluationMetrics(tmp_path, "chaos_kidney", "cdm", target_labels=[126, 189]), [[negative]])
    assert "no target" in caplog.text and "[0.0, 1.0]" in caplog.text and "affine" in caplog.text
    (row,) = read(folder / "per_volume.csv")
    assert (row["n_slices"], row["volume_dice"], row["dice"], row["in_training"]) == ("0", "0", "nan", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": torch.ones(1, 4, 4, 3)}, r"ValueError: .*\(1, 4, 4, 1\).*\(1, 4, 4, 3\)"),
        ({"pred": torch.ones(1, 4, 4, 1)}, "ValueError: .*MetaTensor"),
        ({"pred": MetaTensor(torch.full((1, 4, 4, 1), 0.5))}, "ValueError: .*binary"),
        ({"label": None}, r"ValueError: evaluation needs \['label'\]"),
    ],
)
def test_a_case_that_cannot_be_measured_fails_and_the_others_are_finished(tmp_path, caplog, change, message):
    bad, good = (item(name, volume(PRED), volume(LABEL)) for name in ("a", "b"))
    handler = EvaluationMetrics(tmp_path, "b", "m")
    folder = run(handler, [[bad | change], [good]])
    assert handler.failures.keys() == {"a"} and re.match(message, handler.failures["a"]), handler.failures
    assert f"case a failed: {handler.failures['a']}" in caplog.text
    assert [row["case"] for row in read(folder / "per_volume.csv")] == ["b"]


def test_a_case_whose_rows_cannot_be_written_fails(tmp_path, monkeypatch):
    def full(path, rows):
        if path.stem == "a":
            raise OSError("No space left on device")
        write(path, rows)

    write = tables.write_case_rows
    monkeypatch.setattr(tables, "write_case_rows", full)
    handler = EvaluationMetrics(tmp_path, "b", "m")
    folder = run(handler, [[item(name, volume(PRED), volume(LABEL)) for name in ("a", "b")]])
    assert handler.failures == {"a": "OSError: No space left on device"}
    assert [row["case"] for row in read(folder / "per_volume.csv")] == ["b"]


@pytest.mark.parametrize("content", [None, '{"measured": ', '{"measured": {}}'])
def test_rows_that_are_gone_at_the_end_are_named(tmp_path, content):
    handler = EvaluationMetrics(tmp_path, "b", "m")
    path = tmp_path / "metrics" / "cases" / "a.json"
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.* missing or broken: run the same command again"):
        run(handler, [[]], cases=["a"], done=["a"])
