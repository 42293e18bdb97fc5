"""The tagging page without a browser: it holds all cases as data, turned and marked, and can do nothing but show."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.helpers.bundles import SHAPE, TAGS, head, save_nifti
from tests.helpers.series import save_series
from weakseg.page import write_page

ODD = "it's <!--<script> <b>"


@pytest.fixture
def cases(tmp_path):
    image = head()[0]
    image[26:, 20:30] *= 3  # in LPS: bright on the left, and more at the back
    save_nifti(image, tmp_path / "lps.nii.gz")
    turned = nib.load(tmp_path / "lps.nii.gz").as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    nib.save(turned, tmp_path / "turned.nii.gz")
    save_series(tmp_path / "series", np.rint(image).astype(np.uint16), nib.load(tmp_path / "lps.nii.gz").affine)
    (tmp_path / "broken.nii.gz").write_bytes(b"no volume")
    files = {"lps": "lps.nii.gz", ODD: "lps.nii.gz", "series": "series", "broken": "broken.nii.gz"}
    return [{"case": name, "image": str(tmp_path / file)} for name, file in files.items()]


def content(page) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def pixels(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)


def test_it_holds_every_case_and_names_those_it_cannot_show(cases, tmp_path):
    skipped = write_page(cases, tmp_path / "tags.html")
    page = content(tmp_path / "tags.html")
    assert [(one["name"], len(one["slices"]), one["tags"]) for one in page["cases"]] == [
        (name, SHAPE[2], "." * SHAPE[2]) for name in ("lps", ODD, "series")
    ]
    assert list(skipped) == ["broken"] and page["skipped"][0].startswith("broken (")
    for one in page["cases"]:
        assert one["sides"] == {"left": "R", "right": "L", "top": "A", "bottom": "P"}
        slices = [pixels(picture) for picture in one["slices"]]
        assert slices[0].shape == (40, 48)  # rows from front to back, columns from right to left
        assert slices[3][20:30, 28:34].mean() > 1.2 * slices[3][20:30, 14:20].mean()


def test_slices_that_are_not_axial_are_named(tmp_path, caplog):
    save_nifti(head()[0].repeat(6, axis=2), tmp_path / "p.nii.gz")  # thick enough to be seen from the side
    case, page = [{"case": "p", "image": str(tmp_path / "p.nii.gz")}], tmp_path / "tags.html"
    write_page(case, page)
    assert not caplog.text
    write_page(case, page, slice_axis=0)
    assert "1 of 1 volumes have slices along axis 0 that are not axial" in caplog.text and "such as p" in caplog.text


def test_an_axis_of_its_own_is_counted_and_the_front_is_up(cases, tmp_path):
    image = tmp_path / "turned.nii.gz"  # axial slices along its second axis
    write_page([{"case": "turned", "image": str(image)}], tmp_path / "tags.html", slice_axis=1)
    write_page(cases[:1], tmp_path / "lps.html")
    turned, lps = (content(tmp_path / page)["cases"][0] for page in ("tags.html", "lps.html"))
    assert turned["sides"] == lps["sides"] and len(turned["slices"]) == SHAPE[2]
    for one, other in zip(turned["slices"], lps["slices"]):  # but for JPEG, and blocks of 3 x 3 counted from elsewhere
        assert np.abs(pixels(one) - pixels(other)).mean() < 4 < pixels(one).std()


def test_names_end_nothing_and_only_its_own_script_runs(cases, tmp_path):
    write_page(cases, tmp_path / "tags.html")
    text = (tmp_path / "tags.html").read_text(encoding="utf-8")
    assert ODD not in text and text.count("</script>") == 2
    policy = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy and "{{" not in text
    for kind in ("script", "style"):
        own = re.search(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[1]
        assert base64.b64encode(hashlib.sha256(own.encode()).digest()).decode() in policy
    assert not re.search(r"https?://|\bsrc=|innerHTML|\beval\b|\bfetch\b", text)


def test_tags_are_gone_on_with(cases, tmp_path):
    rows = [f'"{ODD}",{index},{tag}' for index, tag in enumerate(TAGS)]
    (tmp_path / "tags.csv").write_text("\n".join(["case,slice,label", *rows, "lps,2,1", "broken,99,1"]))
    write_page(cases, tmp_path / "tags.html", tmp_path / "tags.csv")
    page = content(tmp_path / "tags.html")
    assert [one["tags"] for one in page["cases"]] == ["..1...", "".join(map(str, TAGS)), "......"]
    write_page(cases, tmp_path / "again.html")
    assert page["key"] != content(tmp_path / "again.html")["key"]


@pytest.mark.parametrize(
    ("row", "message"),
    [("lsp,1,1", "unknown cases: lsp. Cases are named like"), ("lps,6,1", "'lps' name slice 6; its last is 5")],
)
def test_tags_of_nothing_are_an_error(row, message, cases, tmp_path):
    (tmp_path / "tags.csv").write_text(f"case,slice,label\n{row}\n")
    with pytest.raises(ValueError, match=message):
        write_page(cases, tmp_path / "tags.html", tmp_path / "tags.csv")
    with pytest.raises(ValueError, match="no case can be shown. broken: "):
        write_page(cases[-1:], tmp_path / "tags.html")
    assert not (tmp_path / "tags.html").exists()
