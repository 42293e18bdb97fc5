"""Files of weights: a damaged one and one of another bundle are named."""

from __future__ import annotations

import json

import pytest
import torch

from custom_modules.networks.weights import check_bundle, load_weights
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


def test_weights_of_another_bundle_are_refused(tmp_path):
    for name in ("brain", "kidney", "untitled"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "models").mkdir()
        (tmp_path / name / "configs" / "metadata.json").write_text(
            json.dumps({} if name == "untitled" else {"name": name})
        )
    weights = tmp_path / "kidney" / "models" / "model.pt"
    for fits in ("kidney", "untitled"):
        check_bundle(weights, tmp_path / fits)
    check_bundle(tmp_path / "model.pt", tmp_path / "brain")
    with pytest.raises(ValueError, match="kidney/models/model.pt' are of the bundle 'kidney'; this is 'brain'"):
        check_bundle(weights, tmp_path / "brain")
    (tmp_path / "brain" / "models" / "model.pt").symlink_to(weights)
    with pytest.raises(ValueError, match="of the bundle 'kidney'"):
        check_bundle(tmp_path / "brain" / "models" / "model.pt", tmp_path / "brain")
