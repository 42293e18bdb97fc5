"""Slice tags: from label volumes, and from CSV files, however they were written; errors name the lines."""

import numpy as np
import pytest

from custom_modules.data.layouts import find_cases
from custom_modules.data.tags import read_tags, tag_cases, tags_of_label, write_template
from tests.helpers.series import save_series
from tests.helpers.volumes import brats_case, save_volume

P1 = {"p1": {0: 0, 1: 1}}


def test_tags_of_label_by_value_axis_and_area():
    label = np.zeros((3, 2, 2), np.int32)
    label[0, :, 1] = 2  # 2 pixels in slice 1 of axis 2, in slice 0 of axis 0
    label[1, 0, 0] = 5
    assert tags_of_label(label) == [1, 1]
    assert tags_of_label(label, [2]) == [0, 1]
    assert tags_of_label(label, min_area=1) == [0, 1]
    assert tags_of_label(label, min_area=2) == [0, 0]
    assert tags_of_label(label, slice_axis=0) == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,slice\np1,0\n", "must start with the header case,slice,label"),
        ("", "must start with the header"),
        ("case,slice,label\np1,0,2\n", r"line 2 \(case 'p1'\): label must be 0 or 1; got '2'"),
        ("case,slice,label\np1,0,1\np1,-1,1\n", "line 3 .*whole number from 0; got '-1'"),
        ("case,slice,label\np1,0\n", "no slice is tagged 1"),
        ("case,slice,label\np1,0,1\np1,0,0\n", "line 3 .*slice 0 is 0 here and 1 above"),
        ("case,slice,label,label\np1,0,1,0\n", "has the column label more than once; keep one"),
        ("case,slice,label\np1,0,1,0\n", r"line 2 \(case 'p1'\): more values than columns: '0'"),
        ("case,slice,label\np1,0,1\np1;1;1\n", r"line 3 \(case 'p1;1;1'\): fewer values than columns"),
        ("case,slice,label\nq,0,1\n", "unknown cases: q. Cases are named like p1"),
        ("case,slice,label\np1,5,1\n", "'p1' name slice 5; its last is 4"),
    ],
)
def test_csv_errors_name_line_or_case(tmp_path, text, message):
    brats_case(tmp_path, "p1")
    (tmp_path / "tags.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tag_cases(find_cases(tmp_path), read_tags(tmp_path / "tags.csv"))


@pytest.mark.parametrize(
    "text",
    [
        "case;slice;label\np1;0;0\np1;1;1\n",
        "case\tslice\tlabel\r\np1\t0\t0\r\np1\t1\t1\r\n",
        "sep=;\nCase;Slice;Label\np1;0;0\np1;1;1\n",  # Excel
        '"sep=,"\ncase,slice,label\np1,0,0\np1,1,1\n',
        "\ufeff CASE , Slice,LABEL\np1.nii.gz,0,No\n p1.NII ,1.0,YES\n",
        "case,slice,label,reader\np1,0,0.0,ab\n,,,\n\np1,1,1.0,ab\np1,2,,ab\n",  # blank rows, an answer missing
        "case,slice,label\np1,0,False\np1,1,true\n",
    ],
)
def test_csvs_of_all_kinds_are_read(tmp_path, text):
    (tmp_path / "tags.csv").write_text(text, encoding="utf-8", newline="")
    assert read_tags(tmp_path / "tags.csv") == P1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("case,slice,label\np1,0,1\n".encode("utf-16"), "is UTF-16"),
        ("case,slice,label\np1,0,1\n".encode("utf-16-le"), "is UTF-16"),
        (b"PK\x03\x04 [Content_Types].xml", "is an Excel workbook"),
        ("case,slice,label\nM\xfcller,0,1\n".encode("latin-1"), "is not in UTF-8"),
    ],
)
def test_files_that_are_no_csv_are_named_with_the_remedy(tmp_path, content, kind):
    (tmp_path / "tags.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"{kind}; save it as CSV in UTF-8"):
        read_tags(tmp_path / "tags.csv")


def test_a_quote_that_is_never_closed_is_no_csv(tmp_path):
    (tmp_path / "tags.csv").write_text('case,slice,label\n"p1,0,1\n' + "p1,1,0\n" * 30_000)  # above csv's limit
    with pytest.raises(ValueError, match="tags.csv is no CSV: line .*; save it as one."):
        read_tags(tmp_path / "tags.csv")


def test_all_wrong_rows_are_listed_at_once(tmp_path):
    rows = ["case;slice;label", *["p1;0;1"] * 2, "p1;x;1", "p1;1;maybe", "p1;0;0", *(f"p1;{i};2" for i in range(30))]
    (tmp_path / "tags.csv").write_text("sep=;\n" + "\n".join(rows))
    with pytest.raises(ValueError, match="33 problem") as error:
        read_tags(tmp_path / "tags.csv")
    lines = str(error.value).splitlines()
    assert [line.split(" (")[0].strip() for line in lines[1:4]] == ["line 5", "line 6", "line 7"]
    assert len(lines) == 22 and lines[-1].strip() == "... and 13 more"


def tagged(root, text: str, **options):
    """The cases below `root` with the tags in `text`, and the notes."""
    (root / "tags.csv").write_text(text)
    usable, _, notes = tag_cases(find_cases(root), read_tags(root / "tags.csv", **options))
    return {item["case"]: item.get("slice_labels") for item in usable}, notes


def test_slices_counted_from_1(tmp_path):
    brats_case(tmp_path, "p1")
    rows = "case,slice,label\n" + "".join(f"p1,{i},{int(i in (2, 3))}\n" for i in range(1, 6))
    assert tagged(tmp_path, rows, first_slice=1) == ({"p1": [0, 1, 1, 0, 0]}, {})
    with pytest.raises(ValueError, match="slice 5; its last is 4. If slices are counted from 1, give --first_slice 1"):
        tagged(tmp_path, rows)
    with pytest.raises(ValueError, match="whole number from 1; got '0'"):
        tagged(tmp_path, "case,slice,label\np1,0,1\n", first_slice=1)
    _, notes = tagged(tmp_path, "case,slice,label\np1,1,0\np1,2,1\n")
    assert "slice 0 is not named, slice 1 is, in every case" in notes["tags"]
    assert "tags" not in tagged(tmp_path, "case,slice,label\np1,0,0\np1,1,1\n")[1]


def test_a_file_name_names_its_case_unless_two_share_it(tmp_path):
    for name in ("p1", "p2"):
        brats_case(tmp_path, name)
    assert tagged(tmp_path, "case,slice,label\np2_flair.nii.gz,1,1\n")[0]["p2"] == [0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="p2 is named both by its case and by its file"):
        tagged(tmp_path, "case,slice,label\np2_flair,1,1\np2,2,1\n")
    for site in "ab":
        save_volume(tmp_path / "sites" / site / "scan.nii.gz", np.ones((4, 3, 5), np.int16))
    with pytest.raises(ValueError, match="unknown cases: scan. Cases are named like a_scan, b_scan"):
        tagged(tmp_path / "sites", "case,slice,label\nscan,1,1\n")


def test_all_that_the_volumes_contradict_is_listed_at_once(tmp_path):
    for name in ("p1", "p2"):
        brats_case(tmp_path, name)
    with pytest.raises(ValueError) as error:
        tagged(tmp_path, "case,slice,label\nq,0,1\np1,7,1\np2,9,0\n")
    assert all(words in str(error.value) for words in ("3 problem", "unknown cases: q", "'p1' name", "'p2' name"))
    for text in ("p1,0,0\np2,1,0\n", ""):
        with pytest.raises(ValueError, match="no slice is tagged 1: nothing can be learned"):
            tagged(tmp_path, "case,slice,label\n" + text)


def test_dicom_slices_may_be_named_by_their_headers(tmp_path):
    volume = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    save_series(tmp_path / "oblique" / "s1", volume)  # InstanceNumber i + 1; files in another order
    by_slice, _ = tagged(tmp_path / "oblique", "case,slice,label\ns1,1,1\n")
    by_number, _ = tagged(tmp_path / "oblique", "case,instance_number,label\ns1,2,1\ns1,1.0,0\n")
    assert by_slice == by_number == {"s1": [0, 1, 0, 0]}
    head_first = np.diag([-1.0, -1.0, -4.0, 1.0])  # instance 1 is the head; slices count from the feet
    save_series(tmp_path / "axial" / "s2", volume, head_first)
    assert tagged(tmp_path / "axial", "case,instance_number,label\ns2,1,1\n")[0] == {"s2": [0, 0, 0, 1]}
    with pytest.raises(ValueError, match="InstanceNumber 9, which the series does not have"):
        tagged(tmp_path / "oblique", "case,Instance Number,label\ns1,9,1\n")
    save_series(tmp_path / "alike" / "s3", volume, InstanceNumber=1)
    with pytest.raises(ValueError, match="InstanceNumber, but its slices do not have one each; tag by slice"):
        tagged(tmp_path / "alike", "case,instance_number,label\ns3,1,1\n")
    save_volume(tmp_path / "nifti" / "p.nii.gz", np.ones((4, 3, 5), np.int16))
    with pytest.raises(ValueError, match="'p' name slices by SOPInstanceUID, but it is no DICOM series"):
        tagged(tmp_path / "nifti", "case,sop_instance_uid,label\np,1.2.3,1\n")


def test_a_template_has_a_row_for_each_slice_and_replaces_nothing(tmp_path):
    brats_case(tmp_path, "p1")
    assert write_template(find_cases(tmp_path), tmp_path / "t.csv") == 5
    assert (tmp_path / "t.csv").read_text().splitlines()[:3] == ["case,slice,label", "p1,0,", "p1,1,"]
    assert read_tags(tmp_path / "t.csv") == {}
    with pytest.raises(FileExistsError, match="may hold tags"):
        write_template(find_cases(tmp_path), tmp_path / "t.csv")
