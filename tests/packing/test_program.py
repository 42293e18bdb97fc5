"""An export of a config that says what the TorchScript program does not do is an error."""

from __future__ import annotations

import shutil

import pytest
import yaml

from packing import export, program
from tests.helpers.bundles import BUNDLES, REPO


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundles"], "bundles is no bundle's folder"),
        (["bundles/brats_flair", "--noise_levl", "3"], "no knob 'noise_levl'; did you mean"),
        (["bundles/brats_flair", "--noise_level"], "expected pairs of --knob value"),
        (["bundles/brats_flair", "--method", "gradcam"], "written for method 'segmenter'; got 'gradcam'"),
        (["bundles/brats_flair", "--threshold", "average_otsu"], "a number as threshold; got 'average_otsu'"),
        (["bundles/brats_flair", "--uncertainty", "True"], "written for uncertainty False; got True"),
        (["bundles/brats_flair", "--ckpt_path", "nowhere.pt"], "ckpt_path 'nowhere.pt' does not exist"),
        (["bundles/brats_flair", "--preprocessing#transforms#9#a_min", "1"], "transforms#9#a_min 0.0; got 1"),
        (["bundles/brats_flair", "--preprocessing#transforms#7#margin", "[4, 4, 1]"], "margin#2 0; got 1"),
        (["bundles/brats_flair", "--preprocessing#transforms#8#align_corners", "true"], "'nothing'; got True"),
        (["bundles/brats_flair", "--inferer#slice_axis", "0"], "inferer#slice_axis 'nothing'; got 0"),
        (["bundles/brats_flair", "--methods#segmenter#amp", "3"], "methods#segmenter#amp .* got 3"),
        (["bundles/brats_flair", "--postprocessing#transforms#0#nearest_interp", "true"], "interp False; got True"),
        (["bundles/brats_flair", "--postprocessing#transforms#1#threshold", "0.5"], "'@threshold'; got 0.5"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_is_right(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(SystemExit, match=message):
        export.main([*arguments, f"--output_dir={tmp_path / 'out'}"])
    assert not list(tmp_path.rglob("*.*"))


def _drop(config: dict) -> None:
    del config["preprocessing"]["transforms"][-1]["clip"]


def _insert(config: dict) -> None:
    config["postprocessing"]["transforms"].insert(1, {"_target_": "GaussianSmoothd", "keys": "pred"})


def _append(config: dict) -> None:
    config["preprocessing"]["transforms"].append({"_target_": "NormalizeIntensityd", "keys": "image"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop, "preprocessing#transforms#9#clip True; got 'nothing'"),
        (_insert, "postprocessing#transforms#1#_target_ 'custom_modules.* got 'GaussianSmoothd'"),
        (_append, "preprocessing#transforms#10#_target_ 'nothing'; got 'NormalizeIntensityd'"),
    ],
)
def test_an_edited_config_is_not_exported_as_if_it_were_the_same(edit, message, tmp_path):
    shutil.copytree(REPO / "bundles" / "brats_flair" / "configs", tmp_path / "configs")
    file = tmp_path / "configs" / "inference.yaml"
    config = yaml.safe_load(file.read_text())
    edit(config)
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(ValueError, match=message):
        export.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_the_program_is_given_may_change(bundle):
    knobs = {"preprocessing#transforms#7#margin": [2, 3, 0]}
    knobs |= {"postprocessing#transforms#2#output_postfix": "seg", "image_size": 32, "tau": 0.5}
    program.check_program(export.read_bundle(REPO / "bundles" / bundle, **knobs))


def test_the_program_is_written_for_the_shared_config_as_it_is(monkeypatch):
    """Whoever changes configs/inference.yaml there has to look at packing/torchscript.py."""
    bundle = export.read_bundle(REPO / "bundles" / "brats_flair")
    monkeypatch.setattr(program, "WRITTEN_FOR", "0")
    with pytest.raises(ValueError, match="configs/inference.yaml has changed .* set WRITTEN_FOR .* to '[0-9a-f]+'"):
        program.check_program(bundle)
