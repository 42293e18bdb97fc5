"""The cases of a run: why one failed, what its results are called, and which process gets it."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureTyped, SaveImage
from torch import distributed

from custom_modules.inference import cases as cases_module
from custom_modules.inference.cases import CaseDataset, CaseSampler, LoaderAhead, reason
from custom_modules.inference.checks import CheckVolumed
from custom_modules.inference.writers import AtomicNibabelWriter
from tests.helpers.bundles import save_nifti
from tests.helpers.evaluators import PREPROCESSING


def raised(*errors: Exception) -> Exception:
    """The last of `errors`, each the cause of the next."""
    caught = None
    for error in errors:
        try:
            raise error from caught
        except Exception as current:
            caught = current
    return caught


def test_reason_is_the_innermost_cause_in_one_line():
    assert reason(ValueError("tau must be\n  in [0, 1)")) == "ValueError: tau must be in [0, 1)"
    error = raised(OSError("disk full"), RuntimeError("applying transform A"), RuntimeError("applying transform B"))
    assert reason(error) == "OSError: disk full"
    assert reason(KeyError()) == "KeyError: "


def test_reason_sees_through_monai():
    with pytest.raises(RuntimeError, match="applying transform") as caught:
        Compose([EnsureTyped("image"), CheckVolumed("image")])({"image": np.zeros((1, 2, 2, 2)), "case": "p1"})
    assert reason(caught.value).startswith("ValueError: case 'p1': the image is constant")


def test_reason_finds_what_monai_put_into_a_message():
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/out/.partial-1.nii.gz")

    with mock.patch.object(AtomicNibabelWriter, "write", full), pytest.raises(RuntimeError) as caught:
        SaveImage(writer=AtomicNibabelWriter, output_dir="/out")(MetaTensor(torch.zeros(1, 2, 2, 2)))
    assert "install the writer libraries" in str(caught.value)
    assert reason(caught.value) == "OSError: [Errno 28] No space left on device: '/out/.partial-1.nii.gz'"


def stems(*cases: tuple[str, str]) -> list[str]:
    return [item["stem"] for item in CaseDataset([{"case": c, "image": i} for c, i in cases], None).data]


def test_a_stem_is_the_file_name_without_its_ending():
    assert stems(("p1", "/a/p1_flair.nii.gz"), ("p2", "/a/scan.v2.nii")) == ["p1_flair", "scan.v2"]


def test_a_dicom_series_is_named_by_its_case(tmp_path):
    folder = tmp_path / "1" / "T2SPIR" / "DICOM_anon"
    assert stems(("1", str(folder)), ("2", str(folder.parents[2] / "2" / "DICOM_anon"))) == ["1", "2"]


def test_colliding_stems_give_way_to_the_case():
    assert stems(("a", "/a/t2.nii.gz"), ("b", "/b/t2.nii.gz"), ("c", "/c/t1.nii")) == ["a", "b", "t1"]
    assert stems(("a", "/a/t2.nii.gz"), ("b", "/b/t2.nii")) == ["a", "b"]  # they differ in their ending only


def test_stems_differ_on_file_systems_that_ignore_case():
    assert stems(("a", "/a/T2.nii.gz"), ("b", "/b/t2.nii.gz")) == ["a", "b"]
    assert stems(("a", "/x/B.nii.gz"), ("b", "/y/DICOM_anon")) == ["a", "b"]
    assert stems(("p1", "/a/P1.nii.gz")) == ["P1"]


def test_a_stem_never_takes_the_name_of_another_case():
    assert stems(("a", "/x/b.nii.gz"), ("b", "/y/DICOM_anon")) == ["a", "b"]
    assert stems(("b", "/x/b.nii.gz"), ("a", "/y/DICOM_anon")) == ["b", "a"]


def test_a_stem_is_one_component_of_a_path_whoever_named_the_case(tmp_path):
    assert stems(("A/p1", "/A/p1.nii.gz"), ("B/p1", "/B/p1.NII.GZ")) == ["A_p1", "B_p1"]
    assert stems(("a", "/A/p1.nii"), ("a b", os.fsdecode(b"/A/\xff.nii"))) == ["p1", "_udcff"]
    good = save_nifti(np.arange(8, dtype=np.float32).reshape(2, 2, 2), tmp_path / "good\n.nii.gz")
    (item,) = CaseDataset([{"case": "p1", "image": str(good)}], PREPROCESSING)
    assert item["case"] == "p1" and r"the name 'good\n' of a case must not hold '\n'" in item["error"]


def test_dataset_items(tmp_path):
    good = save_nifti(np.arange(8, dtype=np.float32).reshape(2, 2, 2), tmp_path / "good.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    cases = [{"case": "p1", "image": str(good)}, {"case": "p2", "image": str(tmp_path / "bad.nii.gz")}]
    first, second = CaseDataset(cases, PREPROCESSING)
    assert first["case"] == "p1" and first["stem"] == "good" and first["image"].shape == (1, 2, 2, 2)
    assert second.keys() == {"case", "error"} and second["case"] == "p2"
    assert "stem" not in cases[0]  # the caller's cases are left as they are


@pytest.mark.parametrize(("n_processes", "share"), [(2, [1, 3]), (3, [1]), (4, None)])
def test_processes_share_the_cases_and_are_not_more_than_these(monkeypatch, n_processes, share):
    monkeypatch.setattr(distributed, "get_world_size", lambda: n_processes)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "is_available", lambda: True)
    monkeypatch.setattr(cases_module.idist, "get_world_size", lambda: n_processes)
    data = CaseDataset([{"case": f"p{i}", "image": f"/p{i}.nii"} for i in range(4 if share else 3)], None)
    if share is None:
        with pytest.raises(ValueError, match="^3 cases for 4 processes: start at most .*, --nproc_per_node 3.$"):
            CaseSampler(data)
    else:
        assert list(CaseSampler(data)) == share


class Numbers:
    """Items 0 to 4, and which were asked for; the one called `broken` raises."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.asked = broken, []

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        if index == self.broken:
            raise KeyError("lost")
        return index


def test_a_loader_is_one_item_ahead_and_in_order():
    items = Numbers()
    loader = iter(LoaderAhead(items, batch_size=1))
    for i in range(5):
        assert int(next(loader)) == i and max(items.asked) <= i + 1
    assert list(loader) == [] and items.asked == [*range(5)]


def test_an_error_in_the_thread_of_a_loader_is_raised():
    with pytest.raises(KeyError, match="lost"):
        list(LoaderAhead(Numbers(broken=3), batch_size=1))
