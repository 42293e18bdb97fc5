"""The evaluator over volumes: a failed case is reported and the others are finished; facts stay with their volume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Invertd

from custom_modules.inference import evaluator as evaluator_module
from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.inferer import FACTS
from tests.helpers.bundles import LPS
from tests.helpers.evaluators import PREPROCESSING, Collect, evaluator, save_cases, volume


@pytest.fixture
def cases(tmp_path) -> list[dict]:
    return save_cases(tmp_path)


def test_failed_cases_are_named_and_the_others_finished(cases):
    collect = Collect()
    engine = evaluator(cases, handlers=[collect])
    with pytest.raises(RuntimeError) as caught:
        engine.run()
    assert engine.failures.keys() == {"case_unreadable", "case_dark"}
    message = str(caught.value)
    assert message.startswith("2 of 4 cases failed:\n")
    assert "  case_dark: ArithmeticError: the slice is too dark" in message.splitlines()
    assert f"  case_unreadable: {engine.failures['case_unreadable']}" in message.splitlines()
    assert "unreadable.nii.gz" in engine.failures["case_unreadable"]
    assert [[item["case"] for item in output] for output in collect.outputs] == [[], [], ["case_fine"], ["case_last"]]
    for (item,), inside in zip(collect.outputs[2:], (0.5, 1.0), strict=True):
        saliency, region = item["pred"]
        expected = torch.as_tensor(volume(inside)) / 2  # what the method does to it
        torch.testing.assert_close(saliency.as_tensor(), expected)
        assert region.shape == expected.shape
        np.testing.assert_allclose(item["pred"].affine, LPS)
        assert item["stem"] == item["case"].removeprefix("case_")
        assert item["n_slices"] == 3 and item["seconds_per_slice"] >= 0


def test_a_run_without_failures_ends_well_and_forgets_earlier_ones(cases):
    engine = evaluator(cases[2:])
    engine.failures = {"case_of_yesterday": "gone"}
    engine.run()
    assert engine.failures == {}


def test_a_failure_in_postprocessing_counts_too(cases):
    def refuse(item):
        if "fine" in item["stem"]:
            raise OSError("No space left on device")
        return item

    engine = evaluator(cases[2:], postprocessing=Compose([refuse]))
    with pytest.raises(RuntimeError, match="1 of 2 cases failed:\n  case_fine: OSError: No space left on device$"):
        engine.run()


def test_all_processes_report_the_failures_of_all(cases, monkeypatch):
    def gather(mine):  # as if a second process had done its share
        return [mine, ({"case_b": "ValueError: its own"}, ["case_a", "case_b", "case_c"], ["a", "c"])]

    monkeypatch.setattr(evaluator_module.idist, "all_gather", gather)
    engine = evaluator(cases)
    with pytest.raises(RuntimeError) as caught:
        engine.run()
    message = str(caught.value).splitlines()
    assert message[0] == "3 of 7 cases failed:" and [line.split(":")[0] for line in message[1:]] == [
        "  case_b", "  case_dark", "  case_unreadable"
    ]  # fmt: skip


def test_what_is_on_record_is_not_prepared(cases, caplog):
    class Record:
        def __init__(self, *done):
            self.done = done

        def is_done(self, case):
            return case["stem"] in self.done

    caplog.set_level("INFO")
    records = [Record("unreadable", "fine", "last"), Record("dark", "fine", "unreadable")]  # both have to agree
    collect = Collect()
    engine = evaluator(cases, handlers=[collect], records=records)
    with pytest.raises(RuntimeError, match="1 of 4 cases failed:\n  case_dark"):
        engine.run()
    assert engine.done == ["unreadable", "fine"] and [len(output) for output in collect.outputs] == [0, 0, 0, 1]
    assert "case case_fine (3 of 4): already done" in caplog.text and "2 of 4 cases were already done" in caplog.text
    assert "done" not in CaseDataset(cases, PREPROCESSING, records, overwrite=True)[2]


def test_tags_reach_the_inferer(cases):
    collect = Collect()
    evaluator(cases[3:], gate="tags", handlers=[collect]).run()
    ((item,),) = collect.outputs
    assert item["n_slices"] == 2
    assert item["pred"][0].any(dim=0).any(dim=0).tolist() == [True, False, True]


def test_cases_without_tags_fail_one_by_one_under_gate_tags(cases):
    del cases[2]["slice_labels"]
    engine = evaluator(cases[2:], gate="tags")
    with pytest.raises(RuntimeError, match="1 of 2 cases failed:\n  case_fine: ValueError: gate is 'tags' but"):
        engine.run()


def test_facts_stay_with_their_volume_through_a_batch_and_the_way_back(cases):
    cases[2]["slice_labels"] = [1, 0, 0]
    collect = Collect()
    back = Compose([Invertd("pred", PREPROCESSING, "image", nearest_interp=False)])
    evaluator(cases[2:], gate="tags", handlers=[collect], postprocessing=back, batch_size=2).run()
    ((fine, last),) = collect.outputs
    assert [(item["case"], item["n_slices"]) for item in (fine, last)] == [("case_fine", 1), ("case_last", 2)]
    for item in (fine, last):
        assert isinstance(item["seconds_per_slice"], float) and "gate_probability" not in item
        assert FACTS not in item["pred"].meta and FACTS not in item["image"].meta
