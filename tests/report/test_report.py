"""The report: what it says of a case, that it keeps what it knows, and that it can do nothing but show."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import nibabel as nib
import numpy as np
import pytest

from custom_modules.report.cases import choose_slices, doubts, outline
from custom_modules.report.page import Run, write_report
from tests.helpers.bundles import SHAPE, head, save_nifti

RUN = Run("brats_flair", "Brain tumour", probability_methods=("segmenter",))


def save_result(out, stem, lesion, image=None, affine=None, **facts):
    """Writes a case as inference leaves it: voxels of 1 x 1 x 4 mm, the mask as `lesion`, p = 0.9 in it."""
    folder, place = out / stem, {} if affine is None else {"affine": affine}
    source = save_nifti(head(1)[0] if image is None else image, out.parent / "data" / f"{stem}.nii.gz", **place)
    save_nifti(lesion.astype(np.uint8), folder / f"{stem}_mask.nii.gz")
    save_nifti(0.9 * lesion.astype(np.float32), folder / f"{stem}_saliency.nii.gz")
    facts = {"case": stem, "image": str(source), "settings": {"method": "segmenter", "target_labels": []}} | facts
    (folder / f"{stem}_provenance.json").write_text(json.dumps(facts))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def page(out, run=RUN) -> str:
    return write_report(out, run).read_text(encoding="utf-8")


def test_a_case_has_its_volume_slices_and_marks(out):
    save_result(out, "p1", lesion := head(1)[1], expected_dice=0.871)
    text = page(out)
    assert lesion.sum() == 138  # two slices of 69 voxels of 4 cubic mm
    assert "0.6 ml" in text and ">2–3<" in text and ">0.87<" in text and "Expected Dice" in text
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions == ["slice 2: first, middle, largest, least sure", "slice 3: last"]
    assert text.count('class="mask" d="M') == 2 and re.findall(r'">([RLAP])</text>', text)[:4] == ["R", "L", "A", "P"]
    assert "true outline" not in text and 'class="truth"' not in text


def test_truth_is_drawn_where_it_was_given(out, tmp_path):
    save_result(out, "p1", head(1)[1])
    save_result(out, "p2", head(2)[1])
    label = save_nifti(np.roll(head(1)[1], 1, axis=2), tmp_path / "p1_seg.nii.gz")  # slices 3 and 4
    text = page(out, RUN._replace(labels={"p1": str(label)}))
    assert text.count("true outline") == 1 and text.count('class="truth" d="M') == 2
    assert "slice 4: last" in text.partition('id="p2"')[0] and "slice 4" not in text.partition('id="p2"')[2]


def test_warnings_and_failures_are_said(out):
    save_result(out, "p1", np.zeros(SHAPE), warnings=["brighter than <any> training volume"])
    text = page(out, RUN._replace(failures={"p<9>": "ValueError: no <b> volume"}, training_cases=frozenset(["p1"])))
    for said in ("nothing found", "in the training list", "brighter than &lt;any&gt;", "1 case, 1 failed"):
        assert said in text
    assert "p&lt;9&gt;" in text and "no &lt;b&gt; volume" in text and "<b>" not in text
    assert len(re.findall("<figcaption>slice", text)) == 4  # of six, evenly


def test_a_warning_is_said_once(out):
    save_result(out, "p1", np.zeros(SHAPE), warnings=["nothing was found: the mask is empty.", "in the training of it"])
    text = page(out, RUN._replace(training_cases=frozenset(["p1"])))
    assert text.count("nothing found") == 0 == text.count("in the training list") and "the mask is empty" in text


def test_without_a_stated_place_there_are_no_millilitres_and_no_sides(out):
    save_result(out, "p1", head(1)[1], affine=np.eye(4))
    assert "ml" in page(out) and "</text>" in page(out)
    nib.save(nib.Nifti1Image(head(1)[0], None), out.parent / "data" / "p1.nii.gz")
    (out / "report.html").unlink()
    text = page(out)
    assert "138 voxels" in text and " ml" not in text and "</text>" not in text and "does not say where left" in text


def test_what_was_drawn_is_kept_until_the_result_changes(out):
    save_result(out, "p1", head(1)[1])
    first = page(out)
    (out.parent / "data" / "p1.nii.gz").unlink()
    again = page(out)
    assert re.findall("<svg.*?</svg>", again) == re.findall("<svg.*?</svg>", first) != []
    facts = json.loads((out / "p1" / "p1_provenance.json").read_text())
    (out / "p1" / "p1_provenance.json").write_text(json.dumps(facts | {"seed": 1}))
    assert "<svg" not in page(out) and "No pictures: " in page(out)


def test_the_page_loads_nothing_and_runs_its_script_alone(out):
    save_result(out, "p1", head(1)[1])
    text = page(out)
    script = re.search("<script>(.*?)</script>", text, re.DOTALL)[1]
    allowed = re.search("script-src 'sha256-(.*?)'", text)[1]
    assert base64.b64decode(allowed) == hashlib.sha256(script.encode()).digest()
    assert "default-src 'none'" in text and text.count("<script") == 1
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,|#)', text)


def test_slices_fill_the_widest_gaps():
    areas = np.zeros(30)
    areas[10:21] = [1, 2, 3, 4, 9, 4, 4, 4, 3, 2, 1]
    doubt = np.eye(30)[25]
    wanted = {10: "first", 12: "", 14: "largest", 15: "middle", 20: "last", 25: "least sure"}
    assert choose_slices(areas, doubt) == wanted
    assert choose_slices(np.zeros(8)) == dict.fromkeys([1, 2, 3, 4, 5, 6], "")
    assert choose_slices(np.ones(1)) == {0: "first, middle, largest, last"}


def test_doubt_is_summed_along_each_axis():
    p = np.zeros((4, 4, 3))
    p[0, :2, 0], p[3, 3, 2] = 0.5, 1.0  # p (1 - p) is 0.25, 0.25 and 0
    assert [one.tolist() for one in doubts(p, False)] == [[0.25, 0, 0, 0], [0.25, 0.25, 0, 0], [0.25, 0, 0]]
    assert doubts(p, True)[2].tolist() == [0.5, 0, 1.0]


@pytest.mark.parametrize("method", ["segmenter", "cdm"])
def test_a_case_done_just_now_is_shown_like_one_done_before(out, method):
    """The map of a case that was done just now is at hand, whatever the method; only a probability tells a doubt."""
    save_result(out, "p1", lesion := head(1)[1], settings={"method": method})
    just_now = [one.tolist() for one in doubts(0.9 * lesion.astype(np.float32), False)]
    told = [page(out)]
    (out / "report.html").unlink()
    told.append(page(out, RUN._replace(doubts={"p1": just_now})))
    assert told[0].count("least sure") == told[1].count("least sure") == 2 * (method == "segmenter")  # caption, label
    assert re.findall("<figure>.*?</figure>", told[0]) == re.findall("<figure>.*?</figure>", told[1]) != []


def test_outline_runs_halfway_to_the_next_pixel():
    plane = np.zeros((4, 4), bool)
    plane[1, 2] = True  # its middle is at x = 2.5, y = 1.5 of 4 pixels; twice that in a picture of 8
    points = {tuple(map(float, point.split())) for point in outline(plane, (8, 8))[1:-1].split("L")}
    assert points == {(5, 2), (6, 3), (5, 4), (4, 3)}
    assert outline(np.zeros((4, 4), bool), (8, 8)) == ""
