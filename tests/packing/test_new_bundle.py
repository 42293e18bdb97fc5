"""A bundle for another target, made as docs/new_target.md says: from a CSV of tags to a mask."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256

import nibabel as nib
import pytest
import yaml
from monai.bundle import verify_metadata

from custom_modules import __version__
from custom_modules.data import __main__ as data
from packing import configs, new_bundle, pack
from tests.helpers.bundles import REPO, SHORT, TAGS, TINY, head, monai_bundle, save_nifti


@pytest.fixture(scope="module")
def liver(tmp_path_factory):
    """The folder of the new bundle."""
    folder = tmp_path_factory.mktemp("bundles")
    new_bundle.main(["liver", "--from", "chaos_kidney", "--target_labels", "1", "--folder", str(folder)])
    return folder / "liver"


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Two volumes and a reader's tags; no mask."""
    folder = tmp_path_factory.mktemp("volumes")
    rows = ["case,slice,label"]
    for seed, case in enumerate(("p01", "p02")):
        save_nifti(head(seed)[0], folder / f"{case}.nii.gz")
        rows += [f"{case},{k},{tag}" for k, tag in enumerate(TAGS)]
    (folder / "tags.csv").write_text("\n".join(rows))
    splits = {"training": ["p01"], "validation": ["p02"], "test": []}
    (folder / "splits.json").write_text(json.dumps(splits))
    where = ["--root", folder, "--tags", folder / "tags.csv", "--output", folder / "datalist.json"]
    data.main(["volumes", *map(str, where), "--splits", str(folder / "splits.json")])
    return folder


def test_it_is_trained_from_tags_and_makes_a_mask(liver, volumes, tmp_path):
    small = [*TINY, "--segmenter_size=64"]
    train, inference = liver / "configs" / "train.yaml", liver / "configs" / "inference.yaml"
    where = ["--dataset_dir", volumes, "--output_dir", tmp_path / "runs", "--ckpt_dir", liver / "models"]
    monai_bundle("run", "training", "--config_file", train, *where, *TINY, *SHORT)
    assert (liver / "models" / "model.training.txt").read_text() == "p01\n"
    out = tmp_path / "out"
    more = ["--dataset_dir", volumes, "--output_dir", out]
    monai_bundle("run", "--config_file", inference, *small, *more)
    assert nib.load(out / "p02" / "p02_mask.nii.gz").shape == head()[0].shape
    facts = json.loads((out / "p02" / "p02_provenance.json").read_text())
    assert facts["settings"]["target_labels"] == [1] and facts["settings"]["noise_level"] == 500
    weights = (liver / "models" / "model.pt").read_bytes()
    assert facts["weights_sha256"] == sha256(weights).hexdigest()


def test_it_claims_nothing_of_the_bundle_it_was_made_from(liver, tmp_path):
    metadata = json.loads((liver / "configs" / "metadata.json").read_text())
    schema = shutil.copy(REPO / "packing" / "schema" / "meta_schema_20240725.json", tmp_path / "schema.json")
    verify_metadata(str(liver / "configs" / "metadata.json"), filepath=schema)
    assert metadata["version"] == __version__ == list(metadata["changelog"])[0] and "eval_metrics" not in metadata
    files = [path for path in liver.rglob("*") if path.suffix in (".json", ".yaml", ".txt")]
    assert len(files) > 10 and not [path for path in files if "kidney" in path.read_text().lower()]
    segment = yaml.safe_load((liver / "bundle.yaml").read_text())["inference"]["segment"]
    assert (segment["label"], segment["type"]) == ("liver", None)  # no DICOM code of another target


def test_its_configs_follow_its_bundle_file(liver, tmp_path):
    bundle = shutil.copytree(liver, tmp_path / "liver", symlinks=True)
    file = bundle / "bundle.yaml"
    file.write_text(file.read_text().replace("[300, 600]", "[100, 200]"))
    configs.main([str(bundle)])
    assert yaml.safe_load((bundle / "configs" / "train.yaml").read_text())["timestep_range"] == [100, 200]
    file.write_text(file.read_text().replace("train:", "trian:"))
    with pytest.raises(SystemExit, match="liver: there is no section 'train'; there are .*'trian'"):
        configs.main([str(bundle)])


@pytest.fixture
def finished(tmp_path):
    """A bundle whose texts are given, with a file in place of its weights."""
    texts = ["--label", "Liver", "--code", "10200004", "SCT", "Liver", "--description", "Liver.", "--authors", "A. B."]
    where = ["--from", "chaos_kidney", "--folder", str(tmp_path)]
    new_bundle.main(["liver", *where, *texts, "--data_license", "CC BY 4.0, of the hospital."])
    bundle = tmp_path / "liver"
    for file in (bundle / "docs" / "README.md", bundle / "configs" / "metadata.json"):
        file.write_text(file.read_text().replace("TODO:", "Done:"))
    for name in ("model.pt", "model.training.txt"):
        (bundle / "models" / name).write_text("trained")
    return bundle


def test_it_is_packed_without_an_upper_bound(finished, tmp_path):
    packed = pack.pack(tmp_path / "dist", tmp_path / "no_exports", [finished])
    assert packed.keys() == {"liver"} and (packed["liver"] / "custom_modules" / "networks" / "__init__.py").is_file()
    segment = yaml.safe_load((finished / "bundle.yaml").read_text())["inference"]["segment"]
    assert (segment["label"], segment["type"]) == ("Liver", ["10200004", "SCT", "Liver"])
    assert json.loads((finished / "configs" / "metadata.json").read_text())["description"] == "Liver."
    assert (finished / "docs" / "data_license.txt").read_text() == "CC BY 4.0, of the hospital.\n"


def _edit(bundle, name, old, new):
    file = bundle / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda b: _edit(b, "configs/inference.yaml", "name: liver", "name: chaos_kidney"),
            "name must be 'liver', .* got 'chaos_kidney'",
        ),
        (lambda b: _edit(b, "configs/inference.yaml", '["10200004", "SCT", "Liver"]', "null"), "segment has no type"),
        (
            lambda b: _edit(b, "configs/inference.yaml", '["10200004", "SCT", "Liver"]', '["64033007", SCT, Kidney]'),
            "'Liver' has the type of chaos_kidney",
        ),
        (lambda b: _edit(b, "docs/data_license.txt", "CC BY", "TODO: CC BY"), "docs/data_license.txt: TODO: is left"),
        (
            lambda b: shutil.copy(REPO / "bundles/brats_flair/models/model.pt", b / "models"),
            "model.pt: it is that of brats_flair; train",
        ),
    ],
)
def test_what_is_anothers_is_not_packed(finished, tmp_path, edit, message):
    edit(finished)
    with pytest.raises(ValueError, match=f"not ready to be packed:\n  .*{message}"):
        pack.pack(tmp_path / "dist", tmp_path / "no_exports", [finished])
    assert not (tmp_path / "dist").exists()


def test_an_unfinished_bundle_is_told_all_that_is_missing(liver, tmp_path):
    bundle = shutil.copytree(liver, tmp_path / "liver", symlinks=True)
    for name in ("model.pt", "model.training.txt"):
        (bundle / "models" / name).write_text("trained")
    with pytest.raises(ValueError, match="no type") as error:
        pack.pack(tmp_path / "dist", tmp_path / "no_exports", [bundle])
    assert str(error.value).count("TODO: is left") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chaos_kidney", "--from", "brats_flair"], "chaos_kidney already exists"),
        (["my liver", "--from", "brats_flair"], "letters, digits and underscores, a letter first; got 'my liver'"),
        (["liver", "--from", "chaos"], "bundles/chaos/bundle.yaml"),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_why(arguments, message):
    with pytest.raises(SystemExit, match=message):
        new_bundle.main(arguments)
