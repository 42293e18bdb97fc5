"""Slice tags from an annotation server: what MONAI Label's train task hands over, and a training from it."""

import json
import shutil

import pytest
import torch
import yaml
from monai.bundle import ConfigParser, run

from custom_modules.data.annotation import tagged_cases
from tests.helpers.bundles import BUNDLES, REPO, SHORT, TAGS, TINY, config, head, save_nifti

EACH = pytest.mark.parametrize("bundle", BUNDLES)


@pytest.fixture
def studies(tmp_path):
    """Two heads and, for each, the JSON that MONAI Label keeps as its label: [{"image", "label"}, ...]."""
    items = []
    for seed in (0, 1):
        label = tmp_path / "labels" / "final" / f"p{seed}.json"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(json.dumps({"slice_labels": TAGS}))
        image = save_nifti(head(seed)[0], tmp_path / f"p{seed}.nii.gz")
        items.append({"image": str(image), "label": str(label)})
    return items


def test_tags_are_read_and_cases_named(studies):
    assert tagged_cases(studies) == [
        {"case": f"p{seed}", "image": studies[seed]["image"], "slice_labels": TAGS} for seed in (0, 1)
    ]


def test_cases_of_a_datalist_stay_as_they_are():
    items = [{"case": "a", "image": "a.nii.gz", "slice_labels": [0, 1]}, {"case": "b", "image": "b.nii.gz"}]
    assert tagged_cases(items) == items


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p0.nii.gz", "", "p0: it is not a JSON file; training reads slice tags and never a mask"),
        ("p0.json", "{", "p0: .*p0.json is no.* valid JSON: Expecting property name"),
        ("p0.json", "[0, 1]", r"p0.json must hold a JSON object, \{...\}; got .0, 1."),
        ("p0.json", '{"slice_labels": "01"}', "slice_labels must be a list of 0 and 1; got {'slice_labels': '01'}"),
        ("gone.json", None, "No such file"),
    ],
)
def test_other_labels_are_refused_by_name(name, content, message, studies, tmp_path):
    label = tmp_path / name
    if content is not None and not label.exists():
        label.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        tagged_cases([studies[0] | {"label": str(label)}, studies[1]])
    assert 'Save {"slice_labels": [0, 1, ...]}' in str(error.value) and "p1" not in str(error.value)


def as_the_train_task_does(bundle, items, root, **knobs):
    """Run id `run` with the ids that MONAI Label 0.8.5 overrides (monailabel/tasks/train/bundle.py), in a bundle at
    `root`."""
    models = root / "models"
    if not root.is_dir():
        shutil.copytree(REPO / "bundles" / bundle / "configs", root / "configs")
    handlers = ConfigParser.load_config_file(REPO / config(bundle, "train"))["train"]["handlers"]
    if (models / "model.pt").is_file():
        loader = {"_target_": "CheckpointLoader", "load_path": str(models / "model.pt"), "strict": False}
        handlers.insert(0, loader | {"load_dict": {"model": "$@network"}})
    given = {"train#dataset#data": items[:1], "validate#dataset#data": items[1:], "train#handlers": handlers}
    given |= {"train#trainer#max_epochs": 1, "bundle_root": str(root), "val_interval": 1}
    for knob in (*TINY, *SHORT[:1], *SHORT[2:]):
        name, _, value = knob.removeprefix("--").partition("=")
        given[name] = yaml.safe_load(value)
    run(run_id="run", config_file=str(REPO / config(bundle, "train")), **given | knobs)
    return torch.load(models / "model.pt", weights_only=True)


@EACH
def test_training_from_tags_begins_at_the_last_weights_and_gives_a_student(bundle, studies, tmp_path):
    root = tmp_path / "bundle"
    first = as_the_train_task_does(bundle, studies, root)
    second = as_the_train_task_does(bundle, studies, root, seed=1)  # of one epoch too: a checkpoint would end it
    changes = {name: (second[name].float() - first[name].float()).abs().max().item() for name in first}
    student = max(change for name, change in changes.items() if name.startswith("segmenter"))
    others = max(change for name, change in changes.items() if not name.startswith("segmenter"))
    assert 0 < others < 0.05 < student  # two iterations of a warm-up; another random start differs by far more
    assert first["distilled"] == second["distilled"] == 1
    assert sorted(path.name for path in (root / "models").iterdir()) == ["model.pt", "model.training.txt"]


def test_tags_that_do_not_fit_are_an_error(studies, tmp_path):
    (tmp_path / "labels" / "final" / "p1.json").write_text('{"slice_labels": [0, 1]}')
    with pytest.raises(RuntimeError) as error:
        as_the_train_task_does("brats_flair", studies, tmp_path / "bundle")
    assert "p1: it has 2 slice_labels" in repr(error.value.__cause__ or error.value)
