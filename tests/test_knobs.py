"""The command line: what the config knows passes, what it does not know is an error that names the nearest."""

from __future__ import annotations

import re
import sys
import warnings

import pytest

from custom_modules.knobs import (
    check_knobs,
    choose,
    choose_method,
    command_line,
    end_with_cause,
    explain,
    find_knob,
    ignore_noise,
    method_profile,
)

PROGRAM = "/somewhere/.venv/lib/python3.11/site-packages/monai/bundle/__main__.py"  # `python -m monai.bundle`
TRAIN = """
dataset_dir: .
method: cdm
num_steps: 10
num_draws: 1
train:
  trainer:
    _target_: SupervisedTrainer
    max_epochs: 3
  handlers:
    - {_target_: StatsHandler, name: train}
    - {_target_: CheckpointSaver}
"""
OVERLAY = """
min_area: 0
+train#handlers:
  - {_target_: TensorBoardStatsHandler}
"""


@pytest.fixture
def train(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN)
    return str(path)


@pytest.fixture
def overlay(tmp_path):
    path = tmp_path / "overlay.yaml"
    path.write_text(OVERLAY)
    return str(path)


def check(*arguments: str, program: str = PROGRAM) -> None:
    check_knobs([program, "run", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--method", "cg_cdm", "--num_steps", "5"],
        ["--method=cg_cdm", "--num_steps=5"],
        ["--num-steps", "5"],  # Fire reads it as num_steps
        ["-method", "cg_cdm"],  # and one hyphen as two
        ["--dataset_dir", "odd--folder", "--method", "cdm"],
        ["--num_steps", "-1"],  # a negative number is a value; the range is checked elsewhere
        ["--train#trainer#max_epochs", "5"],
        ["--train::trainer::max_epochs=5"],
        ["--train#handlers#0#name", "x"],
        ["--train#handlers#1#save_dict", "x"],  # an argument the config leaves at its default
        ["training", "--meta_file", "m.json", "--logging_file", "l.conf", "--run_id", "run", "--init_id", "i"],
        ["--final_id", "f", "--tracking", "t.json", "--args_file", "a.json"],
        ["--workflow_name", "w", "--workflow_type", "train", "--properties_path", "p"],
    ],
)
def test_known_ids_pass(train, arguments):
    check("--config_file", train, *arguments)


def test_bundle_root_is_a_knob_of_every_config(tmp_path):
    path = tmp_path / "inference.yaml"
    path.write_text("bundle_root: .\n")
    check("--config_file", str(path), "--bundle_root", "/bundles/brats_flair")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metod", "cdm"], r"--metod: there is no knob 'metod'; did you mean one of \['method'"),
        (["--num_step=5"], r"--num_step: .*'num_step'; did you mean one of \['num_steps'"),
        (["-num-stepz", "5"], r"--num_stepz: .*did you mean one of \['num_steps'"),
        (["--trian#trainer#max_epochs", "5"], r"--trian#trainer#max_epochs: .*'trian'; .*\['train'\]"),
        (["--train#trainr#max_epochs", "5"], r"'trainr'; did you mean one of \['trainer'\]"),
        (["--train::handler::0", "x"], r"'handler'; did you mean one of \['handlers'\]"),
        (["--train#handlers#2#name", "x"], r"there is no knob '2'\.$"),  # there are two handlers
        (["--method#name", "x"], r"there is no knob 'name'\.$"),  # method is a word
        (["--qqqq", "5"], r"'qqqq'; .*\['dataset_dir', 'method', 'num_draws', 'num_steps', 'train'\]"),  # all
        (["--num_steps", "5", "--metod", "cdm", "--tua", "0.5"], r"'metod'"),  # the first one given
    ],
)
def test_unknown_ids_are_named_with_the_nearest(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        check("--config_file", train, *arguments)


@pytest.mark.parametrize("name", ["dataset_dir", "ckpt_path", "datalist", "bundle_root"])
@pytest.mark.parametrize("word", ["2024", "1e3", "True", "[x]", "{a}", "a,b", "0x10", ""])
def test_a_path_that_fire_would_not_read_as_a_text_is_an_error(tmp_path, name, word):
    path = tmp_path / "train.yaml"
    path.write_text(f"{name}: .\n")
    with pytest.raises(ValueError, match=f"--{name} .*{'write ./' + re.escape(word) if word else 'needs a path'}"):
        check("--config_file", str(path), f"--{name}={word}")
    for right in (f"./{word}", "2024-01", "None", "$'a'", "/a b/c", "True.nii.gz"):
        check("--config_file", str(path), f"--{name}={right}")


@pytest.mark.parametrize(
    "name",
    "max_epochs epoch_length segmenter_epochs batch_size segmenter_batch_size lr_denoiser lr_classifier segmenter_lr "
    "image_size segmenter_size map_size max_norm".split(),
)
def test_what_has_to_be_above_0_is(tmp_path, name):
    path = tmp_path / "train.yaml"
    path.write_text(f"{name}: 1\n")
    for word in ("0", "-1", "-2e-4", "True", "many", "nan", ""):
        with pytest.raises(ValueError, match=f"--{name} must be a number above 0; got '{word}'"):
            check("--config_file", str(path), f"--{name}={word}")
    for word in ("1", "2e-4", "@other"):
        check("--config_file", str(path), f"--{name}={word}")


@pytest.mark.parametrize(
    ("word", "why"),
    [
        *((f"--seed={seed}", "seed must be a whole number from 0; got") for seed in ("1.5", "-1", "x", "True", "")),
        ("--device=gpu", "device must be one that this PyTorch can use, such as cpu; got 'gpu'"),
        (f"--output_dir={__file__}", "test_knobs.py is a file; give a folder"),
    ],
)
def test_a_seed_a_device_and_a_folder_are_ones(tmp_path, word, why):
    path = tmp_path / "train.yaml"
    path.write_text("seed: 0\ndevice: cpu\noutput_dir: o\n")
    with pytest.raises(ValueError, match=why):
        check("--config_file", str(path), word)
    check("--config_file", str(path), "--seed=7", "--device=cpu", f"--output_dir={tmp_path}")


@pytest.mark.parametrize("word", ["false", "true", "no", "0"])
def test_a_switch_is_true_or_false(tmp_path, word):
    path = tmp_path / "train.yaml"
    path.write_text("amp: true\ntrain: {amp: false}\n")
    for name in ("amp", "train#amp"):
        with pytest.raises(ValueError, match=f"--{name} must be exactly True or False; got '{word}'"):
            check("--config_file", str(path), f"--{name}", word)
    check("--config_file", str(path), "--amp", "False", "--train#amp=True")
    check("--config_file", str(path), "--amp")  # Fire's True
    check("--config_file", str(path), "--amp", "--train#amp=False")


@pytest.mark.parametrize("value", ["$False", "@overwrite", "%other.yaml::amp"])
def test_a_switch_may_be_an_expression_or_a_reference(tmp_path, value):
    path = tmp_path / "train.yaml"
    path.write_text("amp: true\noverwrite: false\n")
    check("--config_file", str(path), "--amp", value)
    check("--config_file", str(path), f"--amp={value}")


@pytest.mark.parametrize("template", ["['{}','{}']", "['{}', '{}']", '["{}","{}"]', "[{},{}]", "{},{}"])
def test_a_list_of_config_files(train, overlay, template):
    files = template.format(train, overlay)
    check("--config_file", files, "--min_area", "5", "--method", "cdm", "--train#handlers#2#log_dir", "x")
    check(f"--config_file={files}", "--min_area=5")
    with pytest.raises(ValueError, match="'min_aera'; did you mean one of .'min_area'"):
        check("--config_file", files, "--min_aera", "5")


def test_the_command_line_is_ids_with_values_and_files():
    words = ["run", "--a#b", "0.5", "--amp", "--c-d::0=x=y", "--seed", "-1", "--config_file", "['a.yaml', 'b.yaml']"]
    given = {"a#b": "0.5", "amp": "", "c_d::0": "x=y", "seed": "-1"}
    assert command_line([PROGRAM, *words]) == (given, ["a.yaml", "b.yaml"])
    odd = '/it\'s, a "folder"/a.yaml'
    assert command_line([PROGRAM, "run", f"--config_file={[odd, 'b.yaml']}"]) == ({}, [odd, "b.yaml"])
    assert command_line([PROGRAM, "run", "--config_file", "a.yaml,b.yaml"]) == ({}, ["a.yaml", "b.yaml"])
    assert command_line([PROGRAM, *words[:-2]]) == command_line(["/usr/bin/pytest", *words]) == ({}, [])


def test_the_real_command_line_is_the_default(train, monkeypatch):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "run", "--config_file", train, "--metod", "cdm"])
    with pytest.raises(ValueError, match="metod"):
        check_knobs()


@pytest.mark.parametrize("program", ["/venv/bin/pytest", "monailabel", "/usr/bin/jupyter", ""])
def test_another_program_is_left_alone(train, program):
    if "monai" in program:
        check("--metod", "cdm", program=program)  # its command line has no config_file
    else:
        check("--config_file", train, "--metod", "cdm", program=program)


def test_without_config_file_there_is_nothing_to_compare():
    check("--metod", "cdm")


def test_choose_takes_the_option_or_names_all():
    options = {"cdm": 1, "cg_cdm": None}
    assert choose(options, "cdm", "method") == 1
    assert choose(options, "cg_cdm", "method") is None
    with pytest.raises(ValueError, match=r"method must be one of \['cdm', 'cg_cdm'\]; got 'cmd'"):
        choose(options, "cmd", "method")


def test_a_profile_is_the_default_row_under_the_methods_own():
    profiles = {"default": {"blur": 2.0, "erosion": 3}, "b": {"blur": 0.0}}
    assert method_profile(profiles, "a") == {"blur": 2.0, "erosion": 3}
    assert method_profile(profiles, "b") == {"blur": 0.0, "erosion": 3}
    assert choose_method({"a": 1, "b": 2}, "b", profiles) == 2


def test_a_misspelt_row_or_knob_of_profiles_is_an_error_for_every_method():
    with pytest.raises(ValueError, match=r"profiles#b: there is no knob 'blurr'; did you mean one of \['blur'\]"):
        method_profile({"default": {"blur": 2.0}, "b": {"blurr": 0.0}}, "a")
    with pytest.raises(ValueError, match=r"a row of profiles must be one of \['a', 'default'\]; got 'b'"):
        choose_method({"a": 1}, "a", {"default": {}, "b": {}})
    with pytest.raises(ValueError, match=r"^method must be one of \['a'\]; got 'c'"):
        choose_method({"a": 1}, "c", {"default": {}})


def test_find_knob_says_what_is_wrong():
    config = {"noise_level": 150, "network_def": {"_target_": "X", "channels": [8]}}
    assert find_knob("noise_level", config) is None and find_knob("network_def#channels#0", config) is None
    assert find_knob("network_def#attention", config) is None  # an argument at its default
    assert "did you mean one of ['noise_level']" in find_knob("noise_levle", config)


@pytest.mark.parametrize("words", [["--target_labels", "1", "4"], ["--num_steps", "250", "300", "--method", "cdm"]])
def test_several_words_are_an_error_that_shows_the_list(train, words):
    with pytest.raises(
        ValueError, match=rf'{words[0]} takes one value; write several as a list: .*"\[{words[1]},...\]"'
    ):
        check("--config_file", train, *words)


def test_a_list_is_written_as_one():
    assert find_knob("target_labels", {"target_labels": []}, "[1,4]") is None
    assert find_knob("target_labels", {"target_labels": []}, "$[1]") is None
    message = find_knob("target_labels", {"target_labels": []}, "1")
    assert message == "--target_labels must be a list, such as --target_labels \"[1]\"; got '1'."


def failure(*, deliberate: bool) -> Exception:
    """An error as MONAI's bundles end with it: the cause below those that passed it on."""
    try:
        try:
            try:
                raise ValueError("tau must be in [0, 1)") if deliberate else KeyError("x")
            except (ValueError, KeyError) as error:
                raise RuntimeError("Failed to instantiate component 'a.b' with keywords: tau") from error
        except RuntimeError as error:
            raise RuntimeError("Failed to evaluate ConfigExpression") from error
    except RuntimeError as error:
        return error


def test_the_last_line_of_an_error_is_its_cause(capsys):
    error = failure(deliberate=True)
    end_with_cause(type(error), error, error.__traceback__)
    text = capsys.readouterr().err
    assert "Traceback" in text and text.splitlines()[-1] == "error: tau must be in [0, 1)"
    assert explain(failure(deliberate=False)) == "KeyError: 'x'"
    end_with_cause(ValueError, ValueError("told by Python"), None)
    assert capsys.readouterr().err == "ValueError: told by Python\n"


def test_an_error_that_was_explained_is_not_taken_further():
    error = ValueError("d.json is not valid JSON: Expecting value.")
    error.__cause__ = RuntimeError("Expecting value: line 1")
    assert explain(error) == "d.json is not valid JSON: Expecting value."


def test_a_run_sees_to_its_last_line_and_to_noise(train, monkeypatch, recwarn):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "run", "--config_file", train])
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(sys, "excepthook", None)
    check_knobs()
    assert sys.excepthook is end_with_cause
    for message in ("NvImgCodecPydicomReader: no decoder", "get_mask_edges:always_return_as_numpy: deprecated", "news"):
        warnings.warn(message, stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["news"]


def test_python_w_shows_all_warnings(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    before = list(warnings.filters)
    ignore_noise()
    assert warnings.filters == before


def test_mlflow_that_is_not_installed_is_an_error_that_names_the_extra(train, monkeypatch):
    monkeypatch.setattr("custom_modules.knobs.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs MLflow, .*: pip install '\.\[mlflow\]'"):
        check("--config_file", train, "--tracking", "configs/mlflow.yaml")
