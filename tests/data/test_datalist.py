"""Datalists: read for training, inference and evaluation, and checked. Volumes of a few voxels, made on the spot."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from custom_modules.data.datalist import check_cases, labelled_cases, load_cases
from custom_modules.data.splits import read_splits
from custom_modules.data.tags import read_tags, tag_cases
from custom_modules.inference.cases import CaseDataset
from tests.helpers.series import save_series
from tests.helpers.volumes import SHAPE, brats_case, build, mask_of, named, save_volume


@pytest.fixture
def dataset(tmp_path):
    """Three cases and a datalist beside them."""
    root = tmp_path / "dataset"
    for i in range(3):
        brats_case(root, f"p{i}")
    build("brats", "--root", root, "--output", root / "datalist.json")
    return root


def test_load_cases_gives_absolute_paths_without_masks(dataset, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    (item,) = load_cases(None, "dataset", "training")
    assert set(item) == {"case", "image", "slice_labels"} and item["case"] in ("p0", "p1", "p2")  # not the folder p0
    assert Path(item["image"]).is_absolute() and Path(item["image"]).exists()
    assert len(load_cases(None, "dataset", ["training", "test"])) == 2
    assert all(Path(item["label"]).is_file() for item in load_cases(None, "dataset", with_label=True))


def test_load_cases_falls_back_to_the_datalists_folder(dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    items = load_cases(dataset / "datalist.json", tmp_path / "empty")
    assert len(items) == 3 and all(Path(item["image"]).exists() for item in items)


def test_load_cases_discovers_only_on_request_and_without_a_datalist(dataset):
    assert len(load_cases(None, dataset, "test", discover=True)) == 1  # the datalist goes first
    (dataset / "datalist.json").unlink()
    assert named(load_cases(None, dataset, "test", discover=True)) == ["p0", "p1", "p2"]
    with pytest.raises(FileNotFoundError, match=r"python -m custom_modules.data .*--root .*dataset --output"):
        load_cases(None, dataset, "training")
    assert named(load_cases(None, dataset / "p1/p1_flair.nii.gz", discover=True)) == ["p1"]


def test_section_all_is_every_section(dataset):
    everything = [item["case"] for item in load_cases(None, dataset)]
    assert len(everything) > 1 and [item["case"] for item in load_cases(None, dataset, "all")] == everything


def test_the_group_is_the_data_set(tmp_path):
    """A folder of several cases names it, but neither a patient's folder nor one that holds the only data set."""
    for name in ("lgg/a", "lgg/b", "brats/c"):
        brats_case((tmp_path / "two" / name).parent, Path(name).name)
        brats_case((tmp_path / "one" / "MR" / name).parent, Path(name).name)
        save_volume(tmp_path / "flat" / f"{Path(name).name}.nii.gz", mask_of([0, 1]) + 1)
        save_volume(tmp_path / "flat" / f"{Path(name).name}_seg.nii.gz", mask_of([0, 1]))
    groups = {c["case"]: c["group"] for c in labelled_cases(None, tmp_path / "two")}
    assert groups == {"a": "lgg", "b": "lgg", "c": "brats"}
    for name in ("one", "flat"):
        assert {case["group"] for case in labelled_cases(None, tmp_path / name)} == {name}


def test_load_cases_reads_plain_decathlon_lists_and_names_them_apart(dataset):
    for site in "AB":
        save_volume(dataset / site / "scan.nii.gz")
    (dataset / "plain.json").write_text(json.dumps({"labels": ["0"], "test": ["A/scan.nii.gz", "B/scan.nii.gz"]}))
    assert named(load_cases(dataset / "plain.json", dataset)) == ["A_scan", "B_scan"]


def test_names_are_one_component_of_a_path_and_agree_between_datalist_tags_and_splits(dataset, tmp_path):
    for site in "AB":
        save_volume(dataset / site / "p1.nii.gz")
    cases = [{"case": f"site{site}/p1", "image": f"{site}/p1.nii.gz"} for site in "AB"]
    numbered = {"case": 7, "image": "p0/p0_flair.nii.gz"}
    (dataset / "own.json").write_text(json.dumps({"test": [*cases, numbered]}))
    assert named(load_cases(dataset / "own.json", dataset)) == ["siteA_p1", "siteB_p1", "7"]
    (tmp_path / "tags.csv").write_text("case,slice,label\nsiteA/p1,2,1\n")
    assert read_tags(tmp_path / "tags.csv") == {"siteA_p1": {2: 1}}
    (tmp_path / "splits.json").write_text(json.dumps({"training": ["siteA/p1"], "test": [7]}))
    assert read_splits(tmp_path / "splits.json") == {"siteA_p1": "training", "7": "test"}


def test_a_name_that_is_not_safe_is_a_problem_of_its_case(dataset):
    (dataset / "own.json").write_text(json.dumps({"test": [{"case": "a\nb", "image": "p0/p0_flair.nii.gz"}]}))
    cases = load_cases(dataset / "own.json", dataset)
    with pytest.raises(ValueError, match="the name 'a.+b' of a case must not hold"):
        check_cases(cases, require_labels=False)
    assert tag_cases(cases)[1].keys() == {"a\nb"}


def test_load_cases_errors_name_the_fault_and_the_remedy(dataset, tmp_path):
    path = tmp_path / "other.json"
    with pytest.raises(FileNotFoundError, match="dataset_dir .*nowhere does not exist"):
        load_cases(None, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="other.json does not exist. Build one: python -m"):
        load_cases(path, dataset, discover=True)
    path.write_text('{"training": [], "test": [{"image": "gone.nii.gz"}]}')
    with pytest.raises(ValueError, match=r"no section validation; its sections: training \(0 cases\), test \(1"):
        load_cases(path, dataset, "validation")
    with pytest.raises(ValueError, match="no case in section training"):
        load_cases(path, dataset, "training")
    assert load_cases(path, dataset, "training", allow_empty=True) == []
    with pytest.raises(FileNotFoundError, match="none of the images .* exists, for example .*gone.nii.gz"):
        load_cases(path, dataset, "test")
    path.write_text('{"test": [{"case": "p"}]}')
    with pytest.raises(ValueError, match="must have an image"):
        load_cases(path, dataset, "test")


def test_what_is_listed_twice_or_under_no_section_is_named(dataset, caplog):
    (dataset / "link.nii.gz").symlink_to(dataset / "p0" / "p0_flair.nii.gz")
    lists = {"training": [{"case": "a", "image": "p0/p0_flair.nii.gz"}, {"image": "p1/p1_flair.nii.gz", "channel": 0}]}
    lists |= {"test": ["link.nii.gz", {"image": "p1/p1_flair.nii.gz", "channel": 1}], "validaton": [{"image": "p2"}]}
    (dataset / "own.json").write_text(json.dumps(lists | {"target_labels": [1]}))
    for section in ("training", "test"):
        assert len(load_cases(dataset / "own.json", dataset, section)) == 2
    twice, misspelt = sorted(caplog.messages, key=lambda text: "no section" in text)  # once each
    assert "more than once, or a link or a copy of it is: a (training), link (test). It counts" in twice
    assert "own.json: 'validaton' is no section, its cases are left out; sections are training, val" in misspelt


def test_a_copy_in_another_section_is_named(dataset, caplog):
    """Bytes count, neither size nor name; one of a kind in one section is no leak."""
    image = np.random.default_rng(0).integers(0, 1000, (64, 64, 8), np.int16)
    for name in "abcd":
        save_volume(dataset / f"{name}.nii", image + (name == "c"))  # of one size; c differs in all voxels
    last = (dataset / "a.nii").read_bytes()
    (dataset / "d.nii").write_bytes(last[:-1] + bytes([last[-1] ^ 1]))  # equal in all spots that are compared first
    os.link(dataset / "p0/p0_flair.nii.gz", dataset / "hard.nii.gz")
    for name in ("s1", "s2", "s3"):
        save_series(dataset / name, np.full((4, 3, 2), len(name) + (name == "s3")), names=range(2))
    for file in (dataset / "s1").iterdir():
        shutil.copy(file, dataset / "s2" / file.name)
    lists = {"training": ["a.nii", "p0/p0_flair.nii.gz", "s1"], "validation": ["c.nii", "d.nii", "s3"]}
    lists["test"] = ["b.nii", "hard.nii.gz", "s2"]
    (dataset / "own.json").write_text(json.dumps(lists))
    assert len(load_cases(dataset / "own.json", dataset)) == 9
    (text,) = caplog.messages
    assert "p0_flair (training), hard (test); a (training), b (test); s1 (training), s2 (test). It" in text
    caplog.clear()
    (dataset / "one.json").write_text(json.dumps({"training": ["a.nii", "b.nii", "s1", "s2"], "test": ["c.nii"]}))
    load_cases(dataset / "one.json", dataset)
    assert caplog.messages == []


def test_labelled_cases_bring_their_own_tags_or_those_of_the_label(dataset):
    (item,) = labelled_cases(None, dataset, "test")
    assert item["slice_labels"] == [0, 1, 1, 0, 0] and "label" not in item  # so that inference cannot see it
    assert item["image_file"] == item["image"] and item["label_file"].endswith("_seg.nii.gz")
    assert item["group"] == "dataset"
    (dataset / "datalist.json").unlink()
    save_volume(dataset / "p1/p1_seg.nii.gz", mask_of([0, 1]))  # does not fit
    (dataset / "p2/p2_seg.nii.gz").unlink()
    item, odd = labelled_cases(None, dataset)
    assert item["case"] == "p0" and item["slice_labels"] == [0, 1, 1, 0, 0]
    assert odd["case"] == "p1" and "the label's shape (4, 3, 2) differs" in odd["error"]
    assert labelled_cases(None, dataset, target_labels=[2])[0]["slice_labels"] == [0] * 5
    (dataset / "p0/p0_seg.nii.gz").unlink()
    (dataset / "p1/p1_seg.nii.gz").unlink()
    with pytest.raises(ValueError, match="none of the 3 cases .* has a label to be compared with"):
        labelled_cases(None, dataset)


def test_a_case_whose_image_or_label_is_gone_is_named(dataset):
    for gone in ("p0/p0_seg.nii.gz", "p1/p1_flair.nii.gz"):
        (dataset / gone).unlink()
    cases = labelled_cases(None, dataset, ["training", "validation", "test"])
    errors = {case["case"]: case["error"] for case in cases if "error" in case}
    assert sorted(named(cases)) == ["p0", "p1", "p2"] and errors.keys() == {"p0", "p1"}
    assert "p0_seg.nii.gz does not exist" in errors["p0"] and "p1_flair.nii.gz does not exist" in errors["p1"]
    lost = [item for item in CaseDataset(cases, None) if "error" in item]
    assert sorted(named(lost)) == ["p0", "p1"] and all("does not exist" in item["error"] for item in lost)
    with pytest.raises(ValueError, match="2 problem"):
        check_cases(cases)
    assert named(labelled_cases(None, dataset, ["training", "validation", "test"], allow_empty=True)) == ["p2"]


def test_results_are_no_input(dataset):
    (dataset / "datalist.json").unlink()
    save_volume(dataset / "p0/p0_flair_uncertainty.nii.gz")
    save_volume(dataset / "output/x/x_flair.nii.gz")
    save_volume(dataset / "q.nii.gz")
    found = load_cases(None, dataset, discover=True, output_dir=dataset / "output")
    assert named(found) == ["p0", "p1", "p2"]
    assert "x" in named(load_cases(None, dataset, discover=True, output_dir=dataset))  # all would be left out


def test_no_result_is_written_among_the_files_of_a_series(tmp_path):
    save_series(tmp_path / "p1", np.ones((4, 3, 2)))
    (inside,) = load_cases(None, tmp_path, discover=True, output_dir=tmp_path)
    assert "among the files of its DICOM series" in inside["error"]
    assert "error" not in load_cases(None, tmp_path, discover=True, output_dir=tmp_path / "out")[0]


def test_check_cases_counts_and_needs_no_mask(dataset):
    for path in dataset.glob("*/*_seg.nii.gz"):
        path.unlink()
    items = load_cases(None, dataset)
    assert check_cases(items) == {"n_cases": 3, "n_slices": 15, "n_positive": 6}


def test_check_cases_lists_all_problems_at_once(dataset):
    items = [dict(item) for item in load_cases(None, dataset, with_label=True)]
    shutil.copy(items[2]["image"], dataset / "copy.nii.gz")
    with pytest.raises(ValueError, match="copy.nii.gz is its image, or a copy of it; name the mask"):
        check_cases([items[2] | {"label": str(dataset / "copy.nii.gz")}], with_label=True)
    items[0]["image"] = "/nowhere.nii.gz"
    items[1]["slice_labels"] = [0, 1]
    save_volume(Path(items[2]["label"]), mask_of([0, 1, 1, 0, 0]), affine=np.diag([2, 1, 1, 1]))
    check_cases(items[2:])  # masks are not asked about
    with pytest.raises(ValueError, match="3 problem") as caught:
        check_cases(items, with_label=True)
    for part in ("the image /nowhere.nii.gz does not exist", "2 slice_labels, but axis 2", "label's affine differs"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"30 problem.*\n(.*\n){20}.*and 10 more"):
        check_cases([items[0]] * 30)


def test_check_cases_on_tags_and_channels(dataset):
    (item,) = load_cases(None, dataset, "training")
    with pytest.raises(ValueError, match="both 0 and 1; got 0 ones in 5 slices"):
        check_cases([item | {"slice_labels": [0] * 5}])
    with pytest.raises(ValueError, match=r"0 or 1; got \[0, 2\]"):
        check_cases([item | {"slice_labels": [0, 2, 0, 0, 0]}])
    untagged = {key: value for key, value in item.items() if key != "slice_labels"}
    assert check_cases([untagged], require_labels=False)["n_slices"] == 0
    with pytest.raises(ValueError, match="has no slice_labels"):
        check_cases([untagged])
    save_volume(Path(item["image"]), np.zeros((*SHAPE, 2), np.int16))
    assert check_cases([item | {"channel": 1}])["n_cases"] == 1
    for wrong in (item, item | {"channel": 2}):
        with pytest.raises(ValueError, match="must be a 3D volume"):
            check_cases([wrong])
