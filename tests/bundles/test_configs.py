"""What the files of the bundles say: written from one source, flat knobs, targets that exist."""

from __future__ import annotations

import itertools
import pydoc
import re

import pytest
from monai.bundle import ComponentLocator, ConfigParser

from packing import configs
from tests.helpers.bundles import BUNDLES, load, targets

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
PLACE_KNOBS = {"bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_path", "device", "amp", "seed"}
DATA_KNOBS = {"batch_size", "image_size", "slice_axis", "target_labels", "min_area"}
METHOD_KNOBS = {"method", "noise_level", "num_steps", "num_draws", "tau", "derivative", "guidance_scale", "threshold"}


@each_bundle
def test_the_configs_are_written_from_the_shared_ones(bundle):
    folder = configs.REPO / "bundles" / bundle
    written = configs.written(folder)
    assert written.keys() >= {"train.yaml", "inference.yaml", "evaluate.yaml", "logging.conf"}
    for file, text in written.items():
        assert (folder / "configs" / file).read_text() == text, "run python -m packing.configs"
        ids = re.findall(r"^([^\s#][^:\n]*):", text, re.MULTILINE)
        assert len(ids) == len(set(ids)), f"{file}: an id is there twice"
    assert len((folder / "bundle.yaml").read_text().splitlines()) <= 40


def test_a_section_comes_with_its_comments_where_it_is_asked_for():
    text = "a: 1\nevery:  # of all\n  # why\n\n  b: [2,\n      3]  # what\n\nc: 4\n"
    assert configs.section(text, "every") == "# why\n\nb: [2,\n    3]  # what\n"
    shared = "x:\n  # <- bundle.yaml: every\ny: 5\n"
    assert configs.expand(shared, text) == "x:\n  # why\n\n  b: [2,\n      3]  # what\ny: 5\n"
    assert configs.expand(shared) == "x:\ny: 5\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("# <- bundle.yaml: evry\n", r"no section 'evry'; there are \['every'\]"),
        ("# <- bundel.yaml: every\n", r"the file must be one of \['bundle.yaml', 'parts.yaml'\]"),
    ],
)
def test_a_section_that_does_not_exist_is_an_error(line, message):
    with pytest.raises(ValueError, match=message):
        configs.expand(line, "every:\n  a: 1\n")


@each_bundle
def test_knobs_are_flat_and_come_first(bundle):
    train, inference = load(bundle, "train"), load(bundle, "inference")
    inference_knobs = PLACE_KNOBS | DATA_KNOBS | METHOD_KNOBS | {"gate", "gate_threshold"}
    for content, knobs in ((train, PLACE_KNOBS | DATA_KNOBS | {"ckpt_dir"}), (inference, inference_knobs)):
        flat = list(itertools.takewhile(lambda item: not isinstance(item[1], dict), content.items()))
        assert knobs <= dict(flat).keys()
    assert load(bundle, "evaluate")["gate"] == "tags"


@each_bundle
def test_the_segmenter_is_the_default_and_a_host_may_ask_for_any_method(bundle):
    parser = ConfigParser(load(bundle, "inference"))
    assert parser.get_parsed_content("method") == "segmenter"
    assert set(parser.get("displayable_configs")["method"]) == set(parser.get("methods"))
    assert parser.get("displayable_configs")["method"][0] == "segmenter"  # what Slicer's menu shows first
    parser["displayable_configs"].update(method="cdm")  # as MONAI Label does with `params.method` of a request
    parser.parse()
    assert parser.get_parsed_content("method") == "cdm"


@each_bundle
def test_every_target_resolves(bundle):
    files = sorted((configs.REPO / "bundles" / bundle / "configs").glob("*.yaml"))
    assert files
    locator = ComponentLocator()
    for file in files:
        content = ConfigParser.load_config_file(file)
        named = {content[key] for key in ("averaging", "writer") if key in content}  # the target "@averaging"
        for target in targets(content) - {f"@{key}" for key in content} | named:
            found = pydoc.locate(target) if "." in target else locator.get_component_module_name(target)
            assert found, f"{file.name}: {target}"
        assert "import custom_modules" not in file.read_text()
