"""The evaluation handler in a real Ignite engine: tables, summary, warnings and errors, on 4x4 slices."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from volumes import save_volume

from custom_modules.evaluation import EvaluationMetrics, LoadLabeld
from custom_modules.metrics import summarise

LABEL = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
PRED = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])  # the square, moved by one pixel
EMPTY = np.zeros((4, 4), int)


def volume(*slices: np.ndarray) -> np.ndarray:
    return np.stack(slices, axis=-1)


def item(case, pred, label, **more):
    affine = torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0]))
    pred, label = (MetaTensor(torch.as_tensor(mask)[None].float(), affine=affine) for mask in (pred, label))
    return {"case": case, "pred": pred, "label": label, **more}


def run(handler, outputs):
    engine = Engine(lambda engine, output: output)
    handler.attach(engine)
    engine.run(outputs)
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
    assert sorted(path.name for path in folder.iterdir()) == ["per_slice.csv", "per_volume.csv", "summary.json"]
    again = summarise(slices, volumes, bundle="chaos_kidney", method="cdm", settings=summary["settings"])
    assert again["volume_dice"]["mean"] == pytest.approx(summary["volume_dice"]["mean"], abs=1e-6)
    assert again["hd95"] == summary["hd95"]


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
        ({"label": torch.ones(1, 4, 4, 3)}, r"'a'.*\(1, 4, 4, 1\).*\(1, 4, 4, 3\)"),
        ({"pred": torch.ones(1, 4, 4, 1)}, "'a'.*MetaTensor"),
        ({"pred": MetaTensor(torch.full((1, 4, 4, 1), 0.5))}, "'a'.*binary"),
        ({"label": None}, "'a'.*label"),
    ],
)
def test_handler_names_the_case_that_is_wrong(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(EvaluationMetrics(tmp_path, "b", "m"), [[item("a", volume(PRED), volume(LABEL)) | change]])


def test_the_label_is_read_in_the_stored_order(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = save_volume(tmp_path / "a_seg.nii.gz", values)
    affine = torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0], dtype=torch.float64))
    case = {"pred": MetaTensor(torch.zeros(1, 2, 3, 4), affine=affine), "label_file": str(path), "image_file": "a"}
    label = LoadLabeld()(case)["label"]
    assert label.shape == (1, 2, 3, 4) and (label[0].numpy() == values).all() and torch.equal(label.affine, affine)
    with pytest.raises(ValueError, match=r"label's shape \(2, 3, 4\) differs from the image's \(2, 3, 5\)"):
        LoadLabeld()(case | {"pred": MetaTensor(torch.zeros(1, 2, 3, 5))})
