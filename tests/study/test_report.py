"""The report: its numbers are the study's, the right run and cases are marked, and it is self-contained."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from study.__main__ import main
from study.report import write_report
from tests.helpers.studies import SHIFTS, write_study

HOSTILE = '<img src=x onerror="alert(1)">&$x_{$'
RUNS = {  # `floor` beats every label-only run on purpose, and `blind` has empty masks
    "cam": {"method": "layercam", "shift": 4},
    "cdm": {"method": "cdm", "shift": 2, "repeats": 2},
    "guided": {"method": "cg_cdm", "shift": 1, "blur": 2.0},
    "blind": {"method": "cg_diff", "shift": None},
    "floor": {"method": "intensity", "shift": 0},
    "bound": {"method": "supervised", "shift": 0},
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a reader meets: tables as lists of rows of cells, pictures as (alt, data), all text; and unclosed tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.pictures, self.tags, self.open, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "br" and "table" in self.open:
            self.tables[-1][-1][-1] += " "
        elif tag == "img":
            kind, data = dict(attrs)["src"].split(";base64,")
            self.pictures.append((dict(attrs)["alt"], kind, base64.b64decode(data)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), RUNS)


@pytest.fixture(scope="module")
def text(study):
    return write_report(study, study.parent / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    page = Page(text)
    assert page.open == []
    return page


def rows_of(page, first: str) -> dict[str, list[str]]:
    """{first word of a row: its cells} of the first table whose head starts with `first`."""
    table = next(table for table in page.tables if table[0][0] == first)
    return {row[0].split()[0]: row for row in table[1:]}


def test_numbers_are_those_of_the_results(study, page):
    results = {r["run"]: r for r in json.loads((study / "results.json").read_text(encoding="utf-8"))["results"]}
    rows = rows_of(page, "run")
    assert set(results) == set(RUNS) <= set(rows)
    for run, r in results.items():
        for cell, key, digits in zip(rows[run][1:], ("dice", "iou", "hd95", "volume_dice"), (3, 3, 1, 3)):
            mean, std = r[key]["mean"], r[key]["std"]
            shown = cell.replace("★", "").split()
            assert shown[0] == ("–" if mean is None else f"{mean:.{digits}f}"), (run, key)
            assert ("±" in shown) == (std is not None) and (std is None or f"{std:.{digits}f}" in shown)
    assert results["cdm"]["dice"]["std"] and rows["cdm"][6] == "2", "the number of repeats differs, so it is shown"
    assert "9 of 9 undefined" in rows["blind"][3]


def test_best_label_only_value_is_marked(page):
    starred = {(run, i) for run, cells in rows_of(page, "run").items() for i, cell in enumerate(cells) if "★" in cell}
    assert starred == {("guided", i) for i in (1, 2, 3, 4)}


def test_floor_and_bound_have_a_part_of_their_own(page):
    names = [row[0].split()[0] for row in next(table for table in page.tables if table[0][0] == "run")[1:]]
    assert names == ["Label-only", "cam", "cdm", "guided", "blind", "Reference", "floor", "bound"]
    assert "floor: no network" in page.text and "upper bound: trained on masks" in page.text


def test_dice_by_case(study, page):
    rows = rows_of(page, "case")
    assert list(rows) == ["p2", "p3", "p1"], "by falling Dice of cdm"
    assert rows["p2"][5:] == ["1.000", "1.000"] and rows["p1"][4] == "0.000"
    # the square of slice k and half width h, moved by 1 of 2h pixels, shares (2h - 1) / 2h with itself
    assert rows["p2"][3] == f"{np.mean([1 - 1 / (2 * h) for h in (2, 4, 3)]):.3f}"


def test_best_median_and_worst_case_are_shown(page):
    alts = [alt for alt, _, _ in page.pictures]
    assert any("masks of cam, cdm, guided, blind, floor, bound" in alt for alt in alts)
    assert any(alt.endswith("of guided: best p2, median p3, worst p1.") for alt in alts)
    for _, kind, data in page.pictures:
        assert kind == "data:image/webp" and data[:4] == b"RIFF" and len(data) > 5000


def test_page_is_self_contained(text, page):
    without_data = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//\w|url\(|@import|javascript:", without_data)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"} and len(text) < 5e6
    assert all(not key.startswith("on") for _, attrs in page.tags for key in attrs)


def test_how_it_was_made_is_told(page):
    assert "brats_flair: 6 methods compared" in page.text and "2026-01-02 · CPU" in page.text
    assert "ab" * 32 in page.text and "run guided <out>" in page.text
    assert any(row == ["tau", "0.95"] for table in page.tables for row in table)
    differing = next(table for table in page.tables if table[0] == ["run", "blur"])
    assert ["guided", "2.0"] in differing and ["cdm", "null"] in differing


def test_case_names_are_text(tmp_path):
    out = write_study(tmp_path, {"cdm": {"method": "cdm"}, "floor": {"method": "intensity"}}, {HOSTILE: 0, "p1": 1})
    text = write_report(out).read_text(encoding="utf-8")
    page = Page(text)
    assert HOSTILE not in text and HOSTILE in page.text and len(page.pictures) == 2
    assert all(set(attrs) == {"src", "alt"} for tag, attrs in page.tags if tag == "img")


@pytest.mark.parametrize("gone", ["*_mask.nii.gz", "*_flair.nii.gz"])
def test_what_is_missing_is_said(study, page, tmp_path, gone):
    shutil.copytree(study.parent, tmp_path / "copy")
    out = tmp_path / "copy" / "out"
    for path in out.rglob("*_provenance.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(str(study.parent), str(tmp_path / "copy")))
    for path in (tmp_path / "copy").rglob(gone):
        path.unlink()
    without = Page(write_report(out).read_text(encoding="utf-8"))
    assert without.text.count("No pictures") == 2 and not without.pictures
    assert rows_of(without, "run") == rows_of(page, "run")


def test_evaluation(study, tmp_path):
    page = Page(write_report(study / "cells" / "cdm" / "seed0", tmp_path / "report.html").read_text(encoding="utf-8"))
    summary = json.loads((study / "cells" / "cdm" / "seed0" / "metrics" / "summary.json").read_text(encoding="utf-8"))
    assert rows_of(page, "run")["cdm"][1].split()[0] == f"{summary['dice']['mean']:.3f}" and "★" not in page.text
    assert rows_of(page, "case")["p1"][5:] == ["3", "0.25"]
    assert [alt for alt, _, _ in page.pictures] == [
        "Image with true outline, saliency map and mask of cdm: best p2, median p3, worst p1."
    ]


def test_cases_of_the_training_list_are_counted(study, tmp_path):
    shutil.copytree(study / "cells" / "cdm" / "seed0", tmp_path / "out")
    table = tmp_path / "out" / "metrics" / "per_volume.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("p1,group,0,0", "p1,group,0,1"))
    assert "1 of the cases" in Page(write_report(tmp_path / "out").read_text(encoding="utf-8")).text


@pytest.fixture
def inference(study, tmp_path):
    """Results of cases without numbers; of p3 the image is gone."""
    out = tmp_path / "inference"
    shutil.copytree(study / "cells" / "cdm" / "seed0", out)
    shutil.rmtree(out / "metrics")
    path = out / "case2" / "case2_provenance.json"
    path.write_text(path.read_text(encoding="utf-8").replace("case2_flair", "gone_flair"))
    return out


def test_inference(inference):
    page = Page(write_report(inference).read_text(encoding="utf-8"))
    assert [alt.split()[-1] for alt, _, _ in page.pictures] == ["p1.", "p2."]
    assert "gone_flair.nii.gz any more" in page.text
    voxels = sum((2 * half) ** 2 for half in (2, 4, 3))
    assert page.text.count(f"mask {voxels * 4 / 1000:.1f} ml, 3 slices") == 2


def test_gallery(inference, tmp_path, capsys):
    output = tmp_path / "pictures" / "gallery.png"
    main(["report", str(inference), "--cases", "p1", "p2", "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG") and str(output) in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no result to draw.*\['p1', 'p2', 'p3'\]"):
        main(["report", str(inference), "--cases", "p4", "--output", str(output)])
    with pytest.raises(SystemExit, match="gone_flair.nii.gz any more"):
        main(["report", str(inference), "--output", str(output)])


def test_cases_are_in_their_order():
    assert sorted(SHIFTS, key=SHIFTS.get) == ["p2", "p3", "p1"]  # what the tests above count on
