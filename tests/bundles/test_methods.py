"""Every method of both bundles by the command, on random weights, and the defaults of each."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from tests.helpers.bundles import BUNDLES, TAGS, TINY, config, head, inference, load, monai_bundle

each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
METHODS = ("cdm", "cg_cdm", "cg_diff", "gradcam", "gradcam_pp", "scorecam", "layercam", "segmenter", "supervised")
METHODS += ("intensity",)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> SimpleNamespace:
    """Random weights for `network_def` (TINY) and `supervised_def`: those of two epochs hardly know the condition."""
    parser = ConfigParser(load("brats_flair", "inference"))
    tiny = (knob.removeprefix("--").split("=") for knob in TINY if knob.startswith("--network_def"))
    parser.update({knob: json.loads(value) for knob, value in tiny})
    folder, generator = tmp_path_factory.mktemp("random"), torch.Generator().manual_seed(0)
    for name in ("network_def", "supervised_def"):
        weights = parser.get_parsed_content(name).state_dict()
        drawn = {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in weights.items()}
        torch.save(drawn | ({"distilled": torch.tensor(1)} if "distilled" in drawn else {}), folder / name)
    return SimpleNamespace(weights=folder / "network_def", supervised=folder / "supervised_def")


@each_bundle
@pytest.mark.parametrize("method", METHODS)
def test_every_method_infers_and_is_evaluated(bundle, method, dataset, random_weights, tmp_path):
    command = inference(bundle, dataset, tmp_path, random_weights, f"--method={method}", "--section=test")
    command += ["--num_draws=1", "--gate=tags", "--noise_level=20", "--target_labels=[]"]
    command += [f"--supervised_ckpt_path={random_weights.supervised}"]
    monai_bundle(*command)
    saliency = tmp_path / "p3_flair" / "p3_flair_saliency.nii.gz"
    first = nib.load(saliency).get_fdata()
    assert first.shape == head()[0].shape and first[..., np.array(TAGS) == 1].any()
    command[2] = f"['{config(bundle, 'inference')}','{config(bundle, 'evaluate')}']"
    monai_bundle(*command)
    assert np.array_equal(nib.load(saliency).get_fdata(), first)
    summary = json.loads((tmp_path / "metrics" / "summary.json").read_text())
    assert (summary["method"], summary["n_slices"], summary["settings"]["method"]) == (method, sum(TAGS), method)
    provenance = json.loads((tmp_path / "p3_flair" / "p3_flair_provenance.json").read_text())
    weights = random_weights.supervised if method == "supervised" else random_weights.weights
    assert provenance["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_uncertainty_is_written_and_measured(dataset, random_weights, tmp_path):
    command = inference("brats_flair", dataset, tmp_path, random_weights, "--uncertainty=True", "--section=test")
    command[2] = f"['{config('brats_flair', 'inference')}','{config('brats_flair', 'evaluate')}']"
    monai_bundle(*command, "--noise_level=20")
    entropy = nib.load(tmp_path / "p3_flair" / "p3_flair_uncertainty.nii.gz")
    mask = nib.load(tmp_path / "p3_flair" / "p3_flair_mask.nii.gz")
    assert entropy.shape == mask.shape and entropy.get_data_dtype() == np.float32
    np.testing.assert_array_equal(entropy.affine, mask.affine)
    # eight draws in four pairs vote: H(1/4) and H(1/2)
    votes = np.unique(entropy.get_fdata().round(3))
    assert set(votes) <= {0, 0.811, 1} and len(votes) == 3
    provenance = json.loads((tmp_path / "p3_flair" / "p3_flair_provenance.json").read_text())
    assert provenance["settings"]["num_draws"] == 8 and 0 < provenance["expected_dice"] < 1
    with (tmp_path / "metrics" / "per_volume.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["expected_dice"]) == pytest.approx(provenance["expected_dice"], abs=1e-6)


def test_methods_differ(dataset, random_weights, tmp_path):
    maps = {}
    for method in METHODS:
        command = inference("brats_flair", dataset, tmp_path / method, random_weights, f"--method={method}")
        more = ["--section=test", "--num_draws=1", "--noise_level=20", "--guidance_scale=100"]
        monai_bundle(*command, *more, f"--supervised_ckpt_path={random_weights.supervised}")
        maps[method] = nib.load(tmp_path / method / "p3_flair" / "p3_flair_saliency.nii.gz").get_fdata()
    for one, other in itertools.combinations(METHODS, 2):
        assert not np.allclose(maps[one], maps[other], rtol=1e-3), (one, other)


@each_bundle
def test_a_method_has_its_own_defaults_and_a_given_knob_wins(bundle):
    parser = ConfigParser(load(bundle, "inference"))
    parser.update({"method": "cg_diff"})
    assert parser.get_parsed_content("guidance_scale") == 100
    parser = ConfigParser(load(bundle, "inference"))
    parser.update({"method": "cg_diff", "guidance_scale": 7})
    assert parser.get_parsed_content("settings")["guidance_scale"] == 7
    assert set(METHODS) == set(load(bundle, "inference")["methods"])


@each_bundle
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs_is_its_gate(bundle, method):
    """The student and the upper bound know slices without target; of a probability, tags lower the threshold."""
    u_net = method in ("segmenter", "supervised")
    parser = ConfigParser(load(bundle, "inference") | {"method": method})
    assert parser.get_parsed_content("gate") == ("all" if u_net else "classifier")
    assert (parser.get_parsed_content("threshold") == 0.5) == u_net
    tagged = ConfigParser(load(bundle, "inference") | {"method": method, "gate": "tags"})
    assert "otsu" in tagged.get_parsed_content("threshold")
    assert load(bundle, "paper")["method"] == "cdm"


@each_bundle
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"cg_dif": {"blur": 0.0}}, r"a row of profiles must be one of \[.*'cg_diff'.*\]; got 'cg_dif'"),
        ({"cg_diff": {"blurr": 0.0}}, r"profiles#cg_diff: there is no knob 'blurr'; did you mean one of \['blur'\]"),
    ],
)
def test_a_misspelt_row_of_profiles_is_an_error(bundle, row, message):
    parser = ConfigParser(load(bundle, "inference"))
    parser["profiles"] = parser["profiles"] | row
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("method_factory" if "cg_dif" in row else "blur")
    assert re.search(message, str(error.value.__cause__))
