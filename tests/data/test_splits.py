"""Splits by patient: seeded, stratified, complete."""

import numpy as np
import pytest

from custom_modules.data.splits import SECTIONS, patient_of, split_cases, warn_of_patients_apart
from tests.helpers.series import save_series
from tests.helpers.volumes import named


def fake_cases(names, folder="set"):
    return [{"case": name, "image": f"/{folder}/{name}/{name}_flair.nii.gz"} for name in names]


def test_split_is_seeded_stratified_and_complete():
    names = [f"TCGA_{site}_{i:04d}" for site, n in (("CS", 10), ("DU", 20), ("HT", 30)) for i in range(n)]
    cases = fake_cases(names)
    (split,) = split_cases(cases, seed=3)
    (again,) = split_cases(cases[::-1], seed=3)  # whatever the order in which the cases were found
    assert all(sorted(named(split[name])) == sorted(named(again[name])) for name in SECTIONS)
    assert named(split["test"]) != named(split_cases(cases, seed=4)[0]["test"])
    assert {name: len(items) for name, items in split.items()} == {"training": 48, "validation": 6, "test": 6}
    assert sorted(named(sum(split.values(), []))) == sorted(names)
    for site, n in (("CS", 1), ("DU", 2), ("HT", 3)):  # a tenth of each hospital, give or take one at the borders
        for section in ("validation", "test"):
            assert abs(sum(f"_{site}_" in name for name in named(split[section])) - n) <= 1


def test_split_stratifies_by_folder_where_no_hospital_is_known():
    cases = fake_cases([f"a{i}" for i in range(20)], "lgg") + fake_cases([f"b{i}" for i in range(20)], "brats")
    for split in split_cases(cases, folds=4):
        assert sorted(name[0] for name in named(split["test"])) == ["a"] * 5 + ["b"] * 5
        assert split["validation"] == [] and len(split["training"]) == 30


def test_time_points_of_a_patient_stay_together():
    names = [f"BraTS-GLI-{i:05d}-{j:03d}" for i in range(12) for j in range(3)]
    for split in split_cases(fake_cases(names), seed=1) + split_cases(fake_cases(names), folds=3):
        patients = [{patient_of(name) for name in named(items)} for items in split.values()]
        assert sum(map(len, patients)) == 12 and len(set.union(*patients)) == 12
    assert patient_of("chaos_01-001") == "chaos_01-001"
    assert (
        patient_of("sub-01_ses-2_FLAIR") == patient_of("sub-01_ses-1_run-1_FLAIR") == "sub-01" != patient_of("sub-011")
    )


def test_series_of_one_patient_stay_together(tmp_path, caplog):
    """By PatientID, and with the time points of that patient by name; one that all have says nothing."""
    series = [save_series(tmp_path / f"s{i}", np.ones((4, 3, 1)), PatientID=f"P{i % 4}") for i in range(8)]
    series += [save_series(tmp_path / "sub-01_ses-1", np.ones((4, 3, 1)), PatientID="P0")]
    cases = [{"case": path.name, "image": str(path)} for path in series] + fake_cases(["sub-01_ses-2", "x"])
    patients = [{"s0", "s4", "sub-01_ses-1", "sub-01_ses-2"}, {"s1", "s5"}, {"s2", "s6"}, {"s3", "s7"}, {"x"}]
    for split in split_cases(cases, folds=5):
        assert set(named(split["test"])) in patients
    assert set(caplog.messages) == {"9 DICOM series have 4 PatientIDs; those of one stay in one section."}
    caplog.clear()
    split_cases([cases[0], cases[4]])  # both P0
    assert "all 2 DICOM series have one PatientID, so each is taken for a patient of its own; if some" in caplog.text
    warn_of_patients_apart(cases[:8], {f"s{i}": "test" if i in (0, 1, 4) else "training" for i in range(8)})
    assert "the splits part series of one patient (PatientID): s1 (test), s5 (training); put" in caplog.messages[-1]


@pytest.mark.parametrize("sizes", [[0, 0, 0], [1, 0, 0], [2, 0, 0], [1, 1, 1], [8, 1, 1]])
def test_split_of_few_patients(sizes):
    n = sum(sizes)
    (split,) = split_cases(fake_cases([f"p{i}" for i in range(n)]))
    assert [len(split[name]) for name in SECTIONS] == sizes


def test_split_errors():
    cases = fake_cases(["p0", "p1", "p2"])
    for folds in (-1, 1, 4):
        with pytest.raises(ValueError, match=f"folds must be .*got {folds}"):
            split_cases(cases, folds=folds)
