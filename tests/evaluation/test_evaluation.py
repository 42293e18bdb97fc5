"""The evaluation handler in a real Ignite engine: tables, summary, warnings and errors, on 4x4 slices."""

from __future__ import annotations

import csv
import json
import logging
import re

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from custom_modules.evaluation import handler as handler_module
from custom_modules.evaluation.handler import EvaluationMetrics
from custom_modules.evaluation.labels import LoadLabeld
from custom_modules.evaluation.metrics import summarise
from custom_modules.evaluation.tables import _write
from tests.helpers.volumes import save_volume

LABEL = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
PRED = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])  # the square, moved by one pixel
EMPTY = np.zeros((4, 4), int)


def volume(*slices: np.ndarray) -> np.ndarray:
    return np.stack(slices, axis=-1)


def item(case, pred, label, **more):
    affine = torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0]))
    pred, label = (MetaTensor(torch.as_tensor(mask)[None].float(), affine=affine) for mask in (pred, label))
    return {"case": case, "stem": case, "pred": pred, "label": label, **more}


def run(handler, outputs, cases=None, done=()):
    """As in a `VolumeEvaluator` over `cases` (by default those put out), of which `done` were there already."""
    engine = Engine(lambda engine, output: output)
    names = [item["case"] for output in outputs for item in output] if cases is None else cases
    engine.cases = {name: {"case": name, "stem": name, "label_file": f"{name}_seg.nii.gz"} for name in names}
    engine.done, engine.failures = list(done), {}
    handler.attach(engine)
    engine.run(outputs)
    handler.failures = engine.failures
    return handler.folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


def test_rows_are_those_of_the_mask_and_label_that_lie_there(tmp_path):
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

    write = _write
    monkeypatch.setattr(handler_module, "_write", full)
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


# ---- the classifier, and the Dice to expect


def gated(case, probabilities, tags, **more):
    """A case of as many slices, the last of which shows the target."""
    tags = MetaTensor(torch.tensor(tags, dtype=torch.uint8).expand(1, 4, 4, len(tags)))
    masks = [EMPTY] * (tags.shape[-1] - 1) + [LABEL]
    more = {"gate_probability": probabilities, "slice_labels": tags} | more
    return item(case, volume(*masks), volume(*masks), **more)


def test_sensitivity_of_the_classifier_by_hand(tmp_path, caplog):
    """21 negative slices at 0, 0.01, ..., 0.20: 95 % of them lie at or below the 20th, 0.19. Of five positive ones two
    are above it; 0.19 itself is not."""
    caplog.set_level(logging.INFO)
    negative = [k / 100 for k in range(21)]
    outputs = [[gated("a", [*negative, 0.9], [0] * 21 + [1])], [gated("b", [0.05, 0.1, 0.19, 0.2], [1, 1, 1, 1])]]
    folder = run(EvaluationMetrics(tmp_path, "brats_flair", "cdm"), outputs)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["classifier_sensitivity"] == pytest.approx(2 / 5)
    assert "sensitivity 0.400 at specificity 0.95" in caplog.text and "classifier over 26 slices" in caplog.text
    # AUC: of the 5 x 21 pairs in order: 0.9 has 21, 0.05 5, 0.1 10, 0.19 19, 0.2 20, and 4 ties count half
    assert summary["classifier_auc"] == pytest.approx((21 + 5 + 10 + 19 + 20 + 2) / 105)


@pytest.mark.parametrize("tag", [0, 1])
def test_one_tag_alone_has_no_sensitivity(tmp_path, tag):
    folder = run(EvaluationMetrics(tmp_path, "brats_flair", "cdm"), [[gated("a", [0.2, 0.8], [tag] * 2)]])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["classifier_sensitivity"] is None and summary["classifier_auc"] is None


HALF, NOTHING = PRED, EMPTY  # volume Dice 0.5 and 0


def expecting(**dice):
    """Cases "name": (prediction, expected Dice), all with the target LABEL."""
    return [[item(name, volume(pred), volume(LABEL), expected_dice=value)] for name, (pred, value) in dice.items()]


def test_the_dice_to_expect_stands_beside_the_dice(tmp_path):
    cases = expecting(a=(LABEL, 0.9), b=(HALF, 0.95), c=(NOTHING, 0.1), d=(LABEL, None))
    cases += [[item("e", volume(LABEL), volume(LABEL))]]  # without uncertainty
    folder = run(EvaluationMetrics(tmp_path, "brats_flair", "cdm"), cases)
    rows = read(folder / "per_volume.csv")
    assert [row["expected_dice"] for row in rows] == ["0.9", "0.95", "0.1", "nan", "nan"]
    # of a, b, c the ranks of the Dice (1, 0.5, 0) are 3, 2, 1, those of the expected 2, 3, 1:
    # 1 - 6 (1 + 1 + 0) / (3 (9 - 1)) = 0.5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["expected_dice_spearman"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "cases",
    [
        expecting(a=(LABEL, 0.9), b=(HALF, 0.5)),  # two points lie on a line
        expecting(a=(LABEL, 0.9), b=(HALF, 0.5), c=(NOTHING, None)),
        expecting(a=(NOTHING, 0.9), b=(NOTHING, 0.5), c=(NOTHING, 0.4)),  # one rank for all
        expecting(a=(LABEL, 0.5), b=(HALF, 0.5), c=(NOTHING, 0.5)),
    ],
    ids=["two", "two known", "one Dice", "one expectation"],
)
def test_without_ranks_there_is_no_correlation(tmp_path, cases):
    folder = run(EvaluationMetrics(tmp_path, "brats_flair", "cdm"), cases)
    assert json.loads((folder / "summary.json").read_text())["expected_dice_spearman"] is None


def test_the_label_is_read_in_the_stored_order(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = save_volume(tmp_path / "a_seg.nii.gz", values)
    affine = torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0], dtype=torch.float64))
    case = {"pred": MetaTensor(torch.zeros(1, 2, 3, 4), affine=affine), "label_file": str(path), "image_file": "a"}
    label = LoadLabeld()(case)["label"]
    assert label.shape == (1, 2, 3, 4) and (label[0].numpy() == values).all() and torch.equal(label.affine, affine)
    with pytest.raises(ValueError, match=r"label's shape \(2, 3, 4\) differs from the image's \(2, 3, 5\)"):
        LoadLabeld()(case | {"pred": MetaTensor(torch.zeros(1, 2, 3, 5))})
