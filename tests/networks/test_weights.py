"""Files of weights: a damaged one and one of another bundle are named."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zipfile

import pytest
import torch

from custom_modules.networks.weights import check_bundle, load_weights, mark_weights
from tests.helpers.bundles import REPO
from tests.helpers.tiny_network import tiny_network


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty"])
def test_damaged_weights_are_named_with_the_remedy(tmp_path, damage):
    path = tmp_path / "model.pt"
    torch.save(tiny_network().state_dict(), path)
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"cut short": -100, "one bit": None, "empty": 0}[damage]])
    with pytest.raises(ValueError, match="ckpt_path '.*model.pt' is damaged .*copy it again, or train first"):
        load_weights(tiny_network(), path)


def bundle(root, folder, **metadata):
    """The folder of a bundle, with unmarked weights."""
    (root / folder / "configs").mkdir(parents=True)
    (root / folder / "models").mkdir()
    (root / folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.save(tiny_network(seed=3).state_dict(), root / folder / "models" / "model.pt")
    return root / folder


def test_weights_in_the_folder_of_another_bundle_are_refused(tmp_path, caplog):
    brain, kidney = (bundle(tmp_path, name, name=name) for name in ("brain", "kidney"))
    weights = kidney / "models" / "model.pt"
    for fits in (kidney, bundle(tmp_path, "untitled")):
        check_bundle([None, weights, tmp_path / "nowhere.pt"], fits)
    assert not caplog.messages, "those of earlier versions have no mark"
    with pytest.raises(ValueError, match="kidney/models/model.pt' are of the bundle 'kidney'; this is 'brain'"):
        check_bundle([weights], brain)
    (brain / "models" / "model.pt").unlink()
    (brain / "models" / "model.pt").symlink_to(weights)
    with pytest.raises(ValueError, match="of the bundle 'kidney'"):
        check_bundle([brain / "models" / "model.pt"], brain)


def test_marked_weights_are_known_wherever_a_copy_lies(tmp_path, caplog):
    brain, kidney = bundle(tmp_path, "brain", name="brain"), bundle(tmp_path, "kidney", name="Niere, ü")
    copy = shutil.copy(kidney / "models" / "model.pt", tmp_path / "the copy's copy.pt")
    check_bundle([copy], brain)
    assert re.search("copy.pt does not say which bundle it is of .* mark it: python -c", caplog.text)
    code = shlex.split(re.search("python -c (.*)", caplog.text)[1])[0]
    exec(code.replace(str(brain), str(kidney)), {})
    caplog.clear()
    check_bundle([copy], kidney)
    assert not caplog.messages
    for place in (copy, shutil.copy(copy, brain / "models" / "model.pt")):
        with pytest.raises(ValueError, match="of the bundle 'Niere, ü'; this is 'brain'"):
            check_bundle([None, place], brain)
    expected = tiny_network(seed=3).state_dict()
    loaded = load_weights(tiny_network(), copy).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_damaged_weights_are_not_marked_and_left_to_the_loader(tmp_path, caplog):
    brain = bundle(tmp_path, "brain", name="brain")
    weights = tmp_path / "weights.pt"
    content = bytearray((brain / "models" / "model.pt").read_bytes())
    content[content.rindex(b"PK\x01\x02")] ^= 1  # in the central directory, which ends the archive
    weights.write_bytes(content)
    check_bundle([weights], brain)
    assert not caplog.messages
    with pytest.raises(ValueError, match="is damaged or no file of weights; it was not marked"):
        mark_weights(weights, brain)
    assert weights.read_bytes() == content
    with pytest.raises(ValueError, match="ckpt_path .*weights.pt' is damaged"):
        load_weights(tiny_network(), weights)


@pytest.mark.parametrize("name", ["brats_flair", "chaos_kidney"])
def test_shipped_weights_are_marked(name):
    root = REPO / "bundles" / name
    with zipfile.ZipFile(root / "models" / "model.pt") as archive:
        assert archive.comment.decode() == json.loads((root / "configs" / "metadata.json").read_text())["name"]
