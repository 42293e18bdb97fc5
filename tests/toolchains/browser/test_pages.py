"""The pages in a real browser: two volumes are tagged by keys and trained on; a report sorts and hides.

Debian's chromium and chromium-driver are used as they are installed.
"""

from __future__ import annotations

import json
import shutil
import time

import pytest

from custom_modules.data.__main__ import main as build_datalist
from custom_modules.data.layouts import find_cases
from custom_modules.report.page import Run, write_report
from tests.helpers.bundles import SHORT, TAGS, TINY, head, save_nifti
from tests.toolchains.browser.webdriver import Browser
from weakseg.command import main as weakseg
from weakseg.page import write_page

pytestmark = pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="there is no chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture
def browser(tmp_path):
    (tmp_path / "downloads").mkdir()
    browser = Browser(tmp_path / "profile", tmp_path / "downloads")
    yield browser
    browser.close()


def downloaded(folder, name):
    deadline = time.monotonic() + 20
    while not (folder / name).is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    return (folder / name).read_text()


def labels_of(root, tags):
    """The slice tags that the datalist's builder makes of a CSV."""
    build_datalist(["volumes", "--root", str(root), "--output", str(root / "list.json"), "--tags", str(tags)])
    lists = [items for items in json.loads((root / "list.json").read_text()).values() if isinstance(items, list)]
    return {item["case"]: item["slice_labels"] for item in sum(lists, []) if isinstance(item, dict)}


@pytest.fixture
def volumes(tmp_path):
    for seed, name in enumerate(("first", 'it\'s <b>, "2"')):
        save_nifti(head(seed)[0], tmp_path / "data" / f"{name}.nii.gz")
    return tmp_path / "data"


def test_two_volumes_are_tagged_by_keys_and_trained_on(browser, volumes, tmp_path):
    page, downloads = tmp_path / "tags.html", tmp_path / "downloads"
    write_page(find_cases(volumes, "volumes"), page)
    browser.open(page)
    assert browser.text("#count") == "0 of 12 slices, case 1 of 2"
    browser.press("n", "n", "y", "y", "n", "n")  # slice by slice
    browser.press("PageDown", "Shift+End", "n")  # a range, then a part of it
    browser.press("Home", "Right", "Right", "Shift+Right", "y")
    browser.press("u", "y", "End", "Delete", "n")
    assert browser.text("#name") == 'it\'s <b>, "2"' and browser.text("#count") == "12 of 12 slices, case 2 of 2"
    frames = browser.run("return [...document.querySelectorAll('#sheet button')].map((one) => one.className)")
    assert [frame.replace(" chosen", "") for frame in frames] == [["no", "yes"][tag] for tag in TAGS]
    browser.click("#save")
    text = downloaded(downloads, "tags.csv")
    assert text.startswith("case,slice,label\nfirst,0,0\n") and "Saved tags.csv with 12 of 12" in browser.text(
        "#message"
    )
    assert labels_of(volumes, downloads / "tags.csv") == {"first": TAGS, 'it\'s <b>, "2"': TAGS}
    browser.picture(tmp_path / "tagged.png")
    assert browser.complaints() == []  # no error, and nothing that the policy forbids
    words = ["train", volumes, "--tags", downloads / "tags.csv", "--bundle", "brats_flair", "--out", tmp_path / "RUN"]
    assert weakseg([*map(str, words), *TINY[:-1], *SHORT]) == 0
    assert len((tmp_path / "RUN" / "models" / "model.training.txt").read_text().splitlines()) == 2


def test_a_draft_comes_back_and_a_file_takes_its_place(browser, volumes, tmp_path):
    page = tmp_path / "tags.html"
    write_page(find_cases(volumes, "volumes"), page)
    browser.open(page)
    browser.press("y", "n")
    browser.open(page)
    assert "draft is back" in browser.text("#message") and browser.text("#count").startswith("2 of 12")
    table = tmp_path / "other.csv"
    table.write_text('\ufeffCase;Slice;Label\r\nfirst;0;0\r\n"it\'s <b>, ""2""";5;1\r\nnobody;1;1\r\nfirst;6;1\r\n')
    browser.choose_file("#open", table)
    time.sleep(0.5)
    assert browser.text("#message").startswith("Read 2 rows. Left out 2") and "lines 4, 5" in browser.text("#message")
    assert browser.run("return tags") == ["00....", ".....1"]
    browser.press("u")
    assert browser.run("return tags") == ["10....", "......"]
    # a page with tags of its own has a draft of its own
    table.write_text("case,slice,label\nfirst,5,1\n")
    write_page(find_cases(volumes, "volumes"), page, table)
    browser.open(page)
    assert browser.run("return tags") == [".....1", "......"] and browser.complaints() == []


def test_a_report_is_sorted_and_its_outlines_hidden(browser, tmp_path):
    out = tmp_path / "out"
    for seed, (stem, expected) in enumerate({"a": 0.9, "b": 0.5, "c": None}.items()):
        image = save_nifti(head(seed)[0], tmp_path / "data" / f"{stem}.nii.gz")
        save_nifti(head(seed)[1], out / stem / f"{stem}_mask.nii.gz")
        facts = {"case": stem, "image": str(image), "settings": {}, "expected_dice": expected}
        (out / stem / f"{stem}_provenance.json").write_text(json.dumps(facts))
    browser.open(write_report(out, Run("brats_flair", "Brain tumour")))
    order = "return [...document.querySelectorAll('table.sorted tbody a')].map((one) => one.textContent).join('')"
    head_of = "table.sorted thead th:nth-child(4) button"
    assert browser.text(head_of) == "Expected Dice" and browser.run(order) == "abc"
    browser.click(head_of)
    assert browser.run(order) == "bac"  # what has no number is last, both ways
    browser.click(head_of)
    assert browser.run(order) == "abc"
    shown = "return getComputedStyle(document.querySelector('.slices path')).display"
    assert browser.run(shown) != "none"
    browser.click("#outlines")
    assert browser.run(shown) == "none" and browser.complaints() == []
