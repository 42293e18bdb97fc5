"""Damaged and made-up inputs, drawn by hypothesis: each is read, or ends in an error that names the file.

`make test` draws a few examples, `make test-long` 2,000 of each kind; the seed is `SEED`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import time
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from custom_modules.data.datalist import check_cases, load_cases
from custom_modules.data.geometry import read_geometry
from custom_modules.data.reader import VolumeReader
from custom_modules.data.splits import read_splits
from custom_modules.data.tags import read_tags
from custom_modules.inference.cases import CaseDataset
from custom_modules.knobs import check_knobs
from tests.helpers.bundles import LPS, config, load

SEED = 20
SECONDS = 5  # of the processor, for one input
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 25))
ERRORS = (ValueError, FileNotFoundError, PermissionError, IsADirectoryError)  # the documented ones
pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]  # numpy's, of huge slopes


def fuzz(test):
    repeatable = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return seed(SEED)(settings(max_examples=EXAMPLES, **repeatable)(test))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with one volume, `p0.nii`."""
    folder = tmp_path_factory.mktemp("fuzz")
    array = np.random.default_rng(0).integers(0, 900, (9, 8, 3), dtype=np.int16)
    image = nib.Nifti1Image(array, LPS)
    image.set_qform(LPS, 1)
    nib.save(image, folder / "p0.nii")
    return folder


def read_or_refused(place: Path, name: str, read) -> object:
    """Calls `read`; an error has to be a documented one and name the file; no file may appear, nor take long."""
    before, start = sorted(place.parent.rglob("*")), time.process_time()
    try:
        return read(place / name)
    except ERRORS as error:
        assert not isinstance(error, UnicodeError) and name in str(error), repr(error)
    finally:
        assert sorted(place.parent.rglob("*")) == before and time.process_time() - start < SECONDS


TEXTS = st.text(max_size=6) | st.sampled_from(["p0", "p0.nii", "../p0.nii", "", "/", "\x00", "\ud800", "a" * 300, "$1"])
NUMBERS = st.integers(-3, 9) | st.floats() | st.sampled_from([10**20, True, None])
JSON = st.recursive(
    TEXTS | NUMBERS, lambda part: st.lists(part, max_size=4) | st.dictionaries(TEXTS, part, max_size=3), max_leaves=9
)


def changed(good):
    """`good` with some of its values, at any depth, replaced by anything."""
    if isinstance(good, dict):
        parts = st.fixed_dictionaries({key: changed(value) for key, value in good.items()})
        whole = parts | st.fixed_dictionaries({}, optional={key: changed(value) for key, value in good.items()})
    elif isinstance(good, list):
        whole = st.tuples(*map(changed, good)).map(list)
    else:
        whole = st.just(good)
    return st.one_of(st.just(good), whole, whole, JSON)


def texts_of(content) -> st.SearchStrategy[bytes]:
    """JSON files of `content`, some damaged."""
    files = content.map(lambda value: json.dumps(value).encode())
    cut = st.tuples(files, st.integers(0, 60), st.binary(max_size=3)).map(lambda x: x[0][: x[1]] + x[2] + x[0][x[1] :])
    odd = [b"", b"[" * 100_000, b'{"test": %s}' % (b"9" * 5000), b"\xff\xfe{", b"\xef\xbb\xbf{}", b"NaN", b"[1]"]
    return files | cut | st.binary(max_size=40) | st.sampled_from(odd)


CASE = {"case": "p0", "image": "p0.nii", "slice_labels": [0, 1, 0], "label": "p0.nii", "channel": 0}
DATALIST = {"training": [CASE, CASE | {"case": "p1"}], "validation": ["p0.nii"], "test": [CASE]}


@fuzz
@given(content=texts_of(changed(DATALIST)))
def test_datalists(place, content):
    (place / "list.json").write_bytes(content)

    def read(path: Path) -> None:
        cases = load_cases(path, place, with_label=True)
        assert all(isinstance(case["case"], str) and os.path.isabs(case["image"]) for case in cases)
        assert len({case["case"] for case in cases}) == len(cases)
        for case in cases:
            case = dict(case)
            try:
                check_cases([case], with_label=True)
            except ValueError as error:
                assert case["case"] in str(error)
        items = list(CaseDataset(cases, lambda case: case, output_format="nifti"))
        assert all("error" in item or os.sep not in item["stem"] for item in items)

    read_or_refused(place, "list.json", read)


ROWS = st.lists(st.tuples(TEXTS, st.integers(-1, 4).map(str) | TEXTS, st.sampled_from("01") | TEXTS), max_size=5)


def csv_of(rows) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("case", "slice", "label"), *rows])
    return text.getvalue().encode(errors="surrogatepass")


@fuzz
@given(
    content=ROWS.map(csv_of)
    | st.tuples(ROWS.map(csv_of), st.binary(max_size=30)).map(b"".join)
    | st.sampled_from([b'case,slice,label\np0,"' + b"x" * 200_000, b"case,slice,label\np0," + b"9" * 5000 + b",1"])
)
def test_tables_of_tags(place, content):  # fmt: skip
    (place / "tags.csv").write_bytes(content)
    tags = read_or_refused(place, "tags.csv", read_tags) or {}
    assert {tag for slices in tags.values() for tag in slices.values()} <= {0, 1}


SPLITS = {"training": ["p0"], "test": ["p1"], "paper": {"folds": [["p0"], ["p1"]]}}


@fuzz
@given(content=texts_of(changed(SPLITS)))
def test_splits(place, content):
    (place / "splits.json").write_bytes(content)
    found = read_or_refused(place, "splits.json", read_splits) or {}
    assert all(isinstance(case, str) for case in found)


FLIPS = st.lists(st.tuples(st.integers(0, 351), st.integers(0, 7)), min_size=1, max_size=6)
FIELDS = st.sampled_from([0, 40, 42, 44, 46, 70, 72, 76, 80, 84, 88, 108, 112, 116, 252, 254, 256, 280, 296, 344])
BYTES = st.tuples(FIELDS, st.binary(min_size=1, max_size=4))


@pytest.fixture(scope="module")
def preprocessing():
    parser = ConfigParser(load("brats_flair", "inference"))
    parser.update({"slice_size": 16})
    return parser.get_parsed_content("preprocessing")


@fuzz
@given(flips=FLIPS, fields=st.lists(BYTES, max_size=2), packed=st.booleans())
def test_headers(place, preprocessing, flips, fields, packed):
    """Bits flipped and fields overwritten in the first 352 bytes: read to the end of the preparation, or refused."""
    content = bytearray((place / "p0.nii").read_bytes())
    for position, bit in flips:
        content[position] ^= 1 << bit
    for position, value in fields:
        content[position : position + len(value)] = value
    name = "bad.nii.gz" if packed else "bad.nii"
    (place / name).write_bytes(gzip.compress(content, 1) if packed else content)
    read_or_refused(place, name, read_geometry)
    read_or_refused(place, name, lambda path: VolumeReader().get_data(str(path)))
    (item,) = CaseDataset([{"case": name, "image": str(place / name)}], preprocessing)
    assert "error" not in item or item["error"].startswith(("ValueError: ", "OSError: ")), item["error"]


CONFIG = load("brats_flair", "inference")
KNOBS = st.sampled_from(
    "seed batch_size image_size slice_axis target_labels method noise_level num_steps num_draws tau gate threshold "
    "dataset_dir datalist output_dir amp min_area orientation unknown inferer#blur".split()
)
VALUES = TEXTS | NUMBERS.map(str) | JSON.map(str) | st.sampled_from(["((((", "[" * 300, "1e999", "--", "-1", "=", "${"])


@fuzz
@given(words=st.lists(st.tuples(KNOBS, VALUES, st.booleans()), max_size=4))
def test_knobs(place, words):
    given = [w for knob, value, equals in words for w in ([f"--{knob}={value}"] if equals else [f"--{knob}", value])]
    try:
        with mock.patch.object(ConfigParser, "load_config_files", lambda files: CONFIG):  # once, not for each example
            check_knobs(["monai.bundle", "run", "--config_file", config("brats_flair", "inference"), *given])
    except ValueError as error:
        assert str(error).startswith("--")
