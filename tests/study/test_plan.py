"""A study's YAML: sweeps become runs, configs are those of the bundle, and what cannot be a study is refused."""

from __future__ import annotations

import pytest
from monai.bundle import ConfigParser

from custom_modules.knobs import find_knob
from study.plan import read_plan
from tests.helpers.bundles import BUNDLES, REPO
from tests.helpers.studies import BUNDLE, TRAINING, conduct, study_file

PLANS = sorted([*(REPO / "study" / "configs").glob("*.yaml"), *(REPO / "benchmarks").glob("*.yaml")])


def test_a_sweep_is_a_run_a_value(tmp_path):
    plan = read_plan(study_file(tmp_path, {}, base={"method": "cg_cdm"}, sweeps={"tau": [0.5, 0.9]}), BUNDLE)
    assert plan.runs == {"tau=0.5": {"tau": 0.5}, "tau=0.9": {"tau": 0.9}}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_plans_fit_both_bundles(path, bundle):
    plan = read_plan(path, REPO / "bundles" / bundle)
    config = ConfigParser.load_config_files(plan.config_file)
    knobs = {knob for run in (plan.base, *plan.runs.values()) for knob in run}
    assert not [problem for knob in sorted(knobs) if (problem := find_knob(knob, config))]
    if path.stem == "methods":
        assert set(plan.runs) == set(config["methods"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"runs": {}}, "must have runs or sweeps"),
        ({"runs": {"big": {"image_size": 128}}}, "'big'.*image_size.*share"),
        ({"runs": {"a": {}}, "sedes": [1]}, "sedes"),
        ({"runs": {"a": {}}, "min_areas": [20]}, r"min_areas must be fractions.*\[20\]"),
        ({"runs": {"a": {}}, "config_file": ["infrence.yaml"]}, "infrence.yaml, which does not exist"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, content, problem):
    with pytest.raises(ValueError, match=problem):
        read_plan(study_file(tmp_path, **content), BUNDLE)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--ckpt_path=x", "--datalist", "fold0.json", "fold1.json"], "each trains its own weights"),
        (["--runs", "mapz"], r"no \['mapz'\].*maps"),
        (["--noise_levle", 3], "noise_level"),
        (["stray"], "pairs of --knob value"),
        (["--min_areas", 5], "min_areas must be fractions"),
    ],
)
def test_what_a_study_cannot_be_given_is_refused(dataset, tmp_path, words, problem):
    with pytest.raises(SystemExit, match=problem):
        conduct(study_file(tmp_path, {"maps": {"method": "cdm"}}, training=TRAINING), tmp_path, dataset, *words)
