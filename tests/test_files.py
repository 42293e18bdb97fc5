"""Files: whole or absent, so that an earlier one survives a failed write; JSON, hashes and stems."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from custom_modules.files import (
    DAY,
    MAX_NAME,
    atomic_path,
    check_name,
    flat_name,
    read_json,
    read_json_or_empty,
    remove_partial,
    result_file,
    sha256,
    stamp,
    stem_of,
    write_json,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc": FIPS 180-2, appendix B.1


def test_json_is_written_with_its_folder(tmp_path):
    write_json(tmp_path / "a" / "b" / "facts.json", {"seed": 0, "name": "p1"})
    text = (tmp_path / "a" / "b" / "facts.json").read_text()
    assert json.loads(text) == {"seed": 0, "name": "p1"} and text.endswith("}\n")
    assert os.listdir(tmp_path / "a" / "b") == ["facts.json"]


@pytest.mark.parametrize("step", ["content", "rename"])
def test_failed_json_leaves_the_old_one(tmp_path, monkeypatch, step):
    path = tmp_path / "facts.json"
    write_json(path, {"seed": 0})

    def fail(*_):
        raise OSError("No space left on device")

    if step == "rename":  # what was written aside has to go
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, TypeError)):
        write_json(path, {"seed": object() if step == "content" else 1})
    assert os.listdir(tmp_path) == ["facts.json"] and json.loads(path.read_text()) == {"seed": 0}


def test_only_old_remains_are_removed(tmp_path, monkeypatch):
    for name, age in ((".partial-1-mask.nii.gz", 1.1 * DAY), (".partial-2-mask.nii.gz", 0.9 * DAY), ("mask", 9 * DAY)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".partial-2-mask.nii.gz", "mask"], "another job may still write the second"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / ".partial-3-mask"])  # gone since it was listed
    remove_partial(tmp_path)


def test_a_write_whose_file_is_gone_afterwards_is_well(tmp_path):
    with atomic_path(tmp_path / "facts.json") as aside:
        aside.write_text("{}")
    assert os.listdir(tmp_path) == ["facts.json"]
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "facts.json") as aside:
        pass  # nothing was written
    assert (tmp_path / "facts.json").read_text() == "{}"


def test_a_series_is_hashed_by_its_files_in_the_order_of_their_names(tmp_path):
    for name, content in (("3.dcm", b"c"), ("1.dcm", b"a"), ("2.dcm", b"b")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    assert sha256(tmp_path) == ABC


def test_a_stamp_changes_with_any_file_but_not_by_itself(tmp_path):
    for name in ("1.dcm", "2.dcm"):
        (tmp_path / name).write_bytes(b"a")
    folder, file = stamp(tmp_path), stamp(tmp_path / "1.dcm")
    assert (stamp(tmp_path), stamp(tmp_path / "1.dcm")) == (folder, file)
    times = (tmp_path / "1.dcm").stat()
    (tmp_path / "new").write_bytes(b"b")  # of the same size, and with the same time
    os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(tmp_path / "new", tmp_path / "1.dcm")
    assert stamp(tmp_path) != folder and stamp(tmp_path / "1.dcm") != file
    folder = stamp(tmp_path)
    (tmp_path / "3.dcm").touch()
    assert stamp(tmp_path) != folder


def test_json_that_is_broken_is_an_error_or_empty(tmp_path):
    path = tmp_path / "facts.json"
    assert read_json_or_empty(path) == {}
    path.write_text('{"seed": 0')
    assert read_json_or_empty(path) == {}
    with pytest.raises(ValueError, match="facts.json is not valid JSON: Expecting"):
        read_json(path)
    path.write_text('{"cases": [{"test": 0, "training": 1, "test": 2}]}')  # json would keep the last alone
    with pytest.raises(ValueError, match="facts.json is not valid JSON: 'test' occurs 2 times in one object"):
        read_json(path)
    write_json(path, {"seed": 0})
    assert read_json(path) == read_json_or_empty(path) == {"seed": 0}


def test_a_stem_is_the_name_without_the_endings_of_nifti():
    paths = ("/a/p1_flair.nii.gz", Path("scan.v2.nii"), "DICOM_anon", "1.2.840")
    assert [stem_of(path) for path in paths] == ["p1_flair", "scan.v2", "DICOM_anon", "1.2.840"]
    assert [stem_of(name) for name in ("A.NII.GZ", "b.Nii", "c.nii.GZ")] == ["A", "b", "c"]


def test_a_name_becomes_one_component_of_a_path():
    names = ("siteA/p1", "a\\b", "../../x", 7, os.fsdecode(b"a\xff_x"), "p1 (flair) ü")
    assert [flat_name(name) for name in names] == ["siteA_p1", "a_b", ".._.._x", "7", "a_udcff_x", "p1 (flair) ü"]


@pytest.mark.parametrize(
    "name, why",
    [
        ("", "empty"),
        ("..", "dot or a space"),
        (".._.._x", "dot or a space"),
        ("x ", "dot or a space"),
        ("a/b", "must not hold '/'"),
        ("a\nb", r"must not hold '\\n'"),
        ("a\x7f", "must not hold"),
        ("nul", "reserved"),
        ("COM1.flair", "reserved"),
        ("ü" * (MAX_NAME // 2 + 1), f"has {MAX_NAME + 2} bytes"),
    ],
)
def test_a_name_that_is_not_safe_is_an_error(tmp_path, name, why):
    with pytest.raises(ValueError, match=why):
        check_name(name)
    with pytest.raises(ValueError, match=why):
        result_file(tmp_path, name, "mask.nii.gz")


def test_the_longest_name_can_be_written(tmp_path):
    for ending in ("uncertainty.nii.gz", "provenance.json"):
        for name in ("x" * MAX_NAME, "1." * (MAX_NAME // 2 - 1) + "xx"):
            with atomic_path(result_file(tmp_path, name, ending)) as aside:
                aside.touch()
            assert result_file(tmp_path, name, ending).is_file()


def test_two_writers_of_one_file_write_apart_and_what_they_wrote_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    with atomic_path(tmp_path / "a.nii.gz") as one, atomic_path(tmp_path / "a.nii.gz") as other:
        assert one != other and one.name.endswith(".nii.gz") and str(os.getpid()) + "-" not in one.name
        one.touch()
        other.touch()
    assert synced == [str(other), str(one)]
