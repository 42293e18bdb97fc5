"""The command that builds datalists, from folders of volumes made on the spot."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from custom_modules import files
from custom_modules.data.splits import SECTIONS
from tests.helpers.volumes import SHAPE, brats_case, build, mask_of, named, save_volume


def read(path):
    return json.loads(Path(path).read_text())


def test_brats_layout_builds_tags_with_relative_paths(tmp_path, capsys):
    for name in ("lgg/TCGA_CS_1", "brats/pat 01.v2-ü"):  # odd but legal names
        brats_case((tmp_path / name).parent, Path(name).name)
    save_volume(tmp_path / "lgg/TCGA_CS_1/TCGA_CS_1_t1.nii.gz")  # another modality is no case
    (tmp_path / "lgg/TCGA_CS_1/._TCGA_CS_1_flair.nii.gz").write_bytes(b"macOS")
    build("brats", "--root", tmp_path, "--output", tmp_path / "out" / "datalist.json")
    content = read(tmp_path / "out" / "datalist.json")
    items = {item["case"]: item for name in SECTIONS for item in content[name]}
    assert items["TCGA_CS_1"] == {
        "case": "TCGA_CS_1",
        "image": "lgg/TCGA_CS_1/TCGA_CS_1_flair.nii.gz",
        "label": "lgg/TCGA_CS_1/TCGA_CS_1_seg.nii.gz",
        "slice_labels": [0, 1, 1, 0, 0],
    }
    assert set(items) == {"TCGA_CS_1", "pat 01.v2-ü"}
    assert content["slice_axis"] == 2 and "2 cases found" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["datalist.json"]  # nothing left aside


def test_chaos_layout_in_nifti_takes_the_kidneys(tmp_path, capsys):
    save_volume(tmp_path / "chaos_01/chaos_01_t2spir.nii.gz")
    mask = mask_of([0, 1, 0, 0, 0], value=2) + mask_of([0, 0, 1, 0, 0], value=4) + mask_of([0, 0, 0, 1, 0], value=3)
    save_volume(tmp_path / "chaos_01/chaos_01_seg.nii.gz", mask)
    build("chaos", "--root", tmp_path, "--output", tmp_path / "kidneys.json")
    build("chaos", "--root", tmp_path, "--output", tmp_path / "liver.json", "--target_labels", 4)
    assert read(tmp_path / "kidneys.json")["training"][0]["slice_labels"] == [0, 1, 0, 1, 0]
    assert read(tmp_path / "liver.json")["training"][0]["slice_labels"] == [0, 0, 1, 0, 0]
    build("chaos", "--root", tmp_path, "--output", tmp_path / "none.json", "--target_labels", 9)
    assert "notes (1):\n  labels: none shows the target, [9]; see --target_labels." in capsys.readouterr().out
    assert read(tmp_path / "kidneys.json")["target_labels"] == [2, 3, 126, 189]
    assert read(tmp_path / "liver.json")["target_labels"] == [4]


def test_a_csv_replaces_masks_which_are_then_not_read(tmp_path, capsys):
    for name in ("p1", "p2"):
        brats_case(tmp_path, name)
        (tmp_path / name / f"{name}_seg.nii.gz").write_bytes(b"no mask")
    (tmp_path / "tags.csv").write_text("\ufeffcase,slice,label\np1,4,1\np1,0,0\np1,4,1\n", encoding="utf-8")
    build("brats", "--root", tmp_path, "--output", tmp_path / "d.json", "--tags", tmp_path / "tags.csv")
    content, report = read(tmp_path / "d.json"), capsys.readouterr().out
    assert content["training"][0]["slice_labels"] == [0, 0, 0, 0, 1]
    assert named(content["untagged"]) == ["p2"] and "slice_labels" not in content["untagged"][0]
    assert "target_labels" not in content  # tags do not tell the values of masks
    assert "p1: 3 of 5 slices are not in the tags" in report and "p2: no tags" in report


def test_broken_volumes_are_reported_and_skipped(tmp_path, capsys):
    for name in ("good", "torn", "shape", "shifted", "flat", "nan", "other"):
        brats_case(tmp_path, name)
    torn = tmp_path / "torn/torn_seg.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-20])
    save_volume(tmp_path / "shape/shape_seg.nii.gz", mask_of([0, 1]))
    save_volume(tmp_path / "shifted/shifted_seg.nii.gz", mask_of([0, 1, 1, 0, 0]), affine=np.diag([1, 1, -1, 1]))
    save_volume(tmp_path / "flat/flat_flair.nii.gz", np.zeros((4, 3), np.int16))
    save_volume(tmp_path / "nan/nan_seg.nii.gz", np.full(SHAPE, np.nan, np.float32))
    (tmp_path / "other/other_flair.nii.gz").write_bytes(b"no volume")
    build("brats", "--root", tmp_path, "--output", tmp_path / "d.json")
    report = capsys.readouterr().out
    assert named(read(tmp_path / "d.json")["training"]) == ["good"] and "skipped (6)" in report
    for why in ("shape: the label's shape (4, 3, 2)", "shifted: the label's affine", "flat_flair.nii.gz must be a 3D"):
        assert why in report


def test_a_copy_is_left_out_and_the_tagged_one_kept(tmp_path, capsys):
    for name in ("p1", "p2", "p3"):
        brats_case(tmp_path, name)
    shutil.copy(tmp_path / "p2/p2_flair.nii.gz", tmp_path / "p1/p1_flair.nii.gz")
    (tmp_path / "tags.csv").write_text("case,slice,label\np2,1,1\np3,1,1\n")
    for words, kept, left in (((), "p1", "p2"), (("--tags", tmp_path / "tags.csv"), "p2", "p1")):
        build("brats", "--root", tmp_path, "--output", tmp_path / "d.json", *words)
        assert sorted(named(read(tmp_path / "d.json")["training"])) == [kept, "p3"]
        said = capsys.readouterr().out
        assert f"skipped (1):\n  {left}: its image is a copy of that of {kept}; keep one." in said


def test_the_command_fails_when_nothing_is_usable(tmp_path):
    brats_case(tmp_path, "p1")
    (tmp_path / "p1/p1_flair.nii.gz").write_bytes(b"no volume")
    with pytest.raises(SystemExit, match="error: no usable case. p1: "):
        build("brats", "--root", tmp_path, "--output", tmp_path / "d.json")
    with pytest.raises(SystemExit, match="error: no volume found"):
        build("msd", "--root", tmp_path, "--output", tmp_path / "d.json")
    assert not (tmp_path / "d.json").exists()


def test_a_failed_write_leaves_the_old_datalist(tmp_path, monkeypatch):
    brats_case(tmp_path, "p1")
    (tmp_path / "d.json").write_text("old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SystemExit, match="error: disk full"):
        build("brats", "--root", tmp_path, "--output", tmp_path / "d.json")
    assert (tmp_path / "d.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "p1"]


def test_the_module_runs_as_a_command(tmp_path):
    brats_case(tmp_path, "p1")
    command = [sys.executable, "-m", "custom_modules.data", "volumes", "--root", ".", "--output", "d.json",
               "--glob", "*/*_flair.nii.gz", "--slice_axis", "0"]  # fmt: skip
    env = {"PYTHONPATH": str(Path(files.__file__).parents[1]), "PATH": ""}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "1 cases found" in result.stdout
    assert read(tmp_path / "d.json")["training"][0]["slice_labels"] == [0, 1, 0, 0]


def test_folds_are_written_side_by_side(tmp_path):
    for i in range(4):
        brats_case(tmp_path, f"p{i}")
    build("brats", "--root", tmp_path, "--output", tmp_path / "d.json", "--folds", 2)
    folds = [read(tmp_path / f"d_fold{k}.json") for k in range(2)]
    assert not (tmp_path / "d.json").exists()
    assert sorted(named(folds[0]["test"])) == sorted(named(folds[1]["training"]))
    assert sorted(named(folds[0]["test"] + folds[1]["test"])) == ["p0", "p1", "p2", "p3"]


def test_given_splits_and_folds(tmp_path, capsys):
    for i in range(4):
        brats_case(tmp_path, f"p{i}")
    splits = {"a": {"training": ["p0", "elsewhere"], "test": ["p1"]}, "b": {"deep": {"validation": ["p2"]}}}
    (tmp_path / "s.json").write_text(json.dumps(splits))
    build("brats", "--root", tmp_path, "--output", tmp_path / "d.json", "--splits", tmp_path / "s.json")
    content = read(tmp_path / "d.json")
    assert [named(content[name]) for name in SECTIONS] == [["p0"], ["p2"], ["p1"]]
    report = capsys.readouterr().out
    assert "left out, not named in the splits (1):\n  p3" in report
    assert "named in the splits, but not found (1):\n  elsewhere" in report

    (tmp_path / "s.json").write_text(json.dumps({"c": {"folds": [["p0"], ["p1", "p3"], ["p2"]]}}))
    build("brats", "--root", tmp_path, "--output", tmp_path / "d.json", "--splits", tmp_path / "s.json")
    assert [named(read(tmp_path / f"d_fold{k}.json")["test"]) for k in range(3)] == [["p0"], ["p1", "p3"], ["p2"]]
    assert named(read(tmp_path / "d_fold1.json")["training"]) == ["p0", "p2"]


def test_given_splits_errors(tmp_path):
    brats_case(tmp_path, "p0")
    path = tmp_path / "s.json"
    for text, message in (
        ('{"a": {"names": ["p0"]}}', "must hold lists of cases under training, validation, test or folds"),
        ('{"training": ["p0"], "test": ["p0"]}', "patient of p0 in two places: training and test"),
        ('{"folds": [["BraTS-GLI-00001-000"], ["BraTS-GLI-00001-001"]]}', "in two places: 0 and 1"),
        ('{"test": ["x"]}', "names none of the cases found"),
        ("{", "is no.* valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=message):
            build("brats", "--root", tmp_path, "--output", tmp_path / "d.json", "--splits", path)
    with pytest.raises(SystemExit):
        build("brats", "--root", tmp_path, "--output", tmp_path / "d.json", "--splits", path, "--folds", 2)
