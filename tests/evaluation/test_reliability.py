"""What the summary says of the classifier (AUC, sensitivity) and of the expected Dice (rank correlation), by hand."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from monai.data import MetaTensor

from custom_modules.evaluation.handler import EvaluationMetrics
from tests.helpers.evaluations import EMPTY, LABEL, PRED, item, read, run, volume


def gated(case, probabilities, tags, **more):
    """A case of as many slices; the last one shows the target."""
    tags = MetaTensor(torch.tensor(tags, dtype=torch.uint8).expand(1, 4, 4, len(tags)))
    masks = [EMPTY] * (tags.shape[-1] - 1) + [LABEL]
    more = {"gate_probability": torch.tensor(probabilities), "slice_labels": tags} | more
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


def test_the_expected_dice_is_tabulated_beside_the_dice(tmp_path):
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
