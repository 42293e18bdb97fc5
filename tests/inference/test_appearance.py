"""A volume is compared with those of training: by texture and contrast, and by the proportions of its body."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Lambdad

from custom_modules.inference import appearance
from custom_modules.inference.appearance import TrainingAppearance, describe, statistics_file, write_statistics
from custom_modules.inference.inferer import FACTS, SaliencyInferer
from tests.helpers.tiny_network import tiny_network

RATIOS = [0.7, 0.8, 0.8, 0.9]  # width by depth


def volume(seed: int, ratio: float = 0.8, bright: float = 0.0) -> MetaTensor:
    """A disc with a faint texture (1, 64, 64, 6) in [-1, 1], cropped from a body of this width by depth."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    noise = np.random.default_rng(seed).normal(0, 0.1, (64, 64, 6))
    image = np.where((x**2 + y**2 < 0.8)[..., None], bright + noise, -1).clip(-1, 1)
    image[..., 0] = -1  # a slice without tissue does not count
    return MetaTensor(
        torch.as_tensor(image[None], dtype=torch.float32), affine=torch.diag(torch.tensor([ratio, 1, 8, 1]))
    )


@pytest.fixture
def network():
    network = tiny_network(segmenter=True)
    network.distilled.fill_(1)
    return network


@pytest.fixture
def weights(tmp_path, network):
    """A file beside which statistics of four volumes lie; `p9` was not in training."""
    cases = [{"case": f"p{i}", "image": str(tmp_path / f"p{i}.nii.gz")} for i in (0, 1, 2, 3, 9)]
    (tmp_path / "model.training.txt").write_text("p0\np1\np2\np3\n")
    volumes = {case["image"]: volume(i, ratio) for i, (case, ratio) in enumerate(zip(cases, RATIOS))}  # none for p9
    for file in volumes:
        Path(file).touch()
    write_statistics(cases, Lambdad("image", volumes.__getitem__), network, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_what_it_has_seen_and_what_is_like_it_passes(weights, network):
    check = TrainingAppearance(weights)
    (seen,) = check(volume(0)[None], network)
    assert seen["unlike_contrast"] < 0.01 and seen["unlike_proportions"] == 0
    new = check(torch.stack([volume(8), volume(7)]), network)  # tensors without an affine, two at a time
    assert all(0 < facts["unlike_contrast"] < 1 and facts["unlike_proportions"] == 0 for facts in new)


def test_the_limits_are_those_of_the_training_volumes(weights, network):
    """The distance and its limit by hand, from the definition."""
    v = np.stack([describe(volume(i).as_tensor().movedim(-1, 0), network.segmenter) for i in (0, 1, 2, 3, 8)])
    s = v[:4].std(axis=0)
    d = np.array([[np.sqrt((((a - b) / s) ** 2).mean()) for b in v[:4]] for a in v])
    nearest = [min(d[i, j] for j in range(4) if j != i) for i in range(4)]
    limit = 1.5 * np.percentile(nearest, 90)
    (facts,) = TrainingAppearance(weights)(volume(8)[None], network)
    assert facts["unlike_contrast"] == pytest.approx(d[4].min() / limit, rel=0.02)  # the file is rounded
    low, high = json.loads(statistics_file(weights).read_text())["proportions"]
    assert (low, high) == pytest.approx(np.percentile(RATIOS, [5, 95]), abs=1e-4)
    (facts,) = TrainingAppearance(weights)(volume(0, ratio=1.4)[None], network)
    assert facts["unlike_proportions"] == pytest.approx(np.log(1.4 / high) / 0.2, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"bright": 0.6}, "contrast or texture"), ({"ratio": 1.5}, "width by depth"), ({"ratio": 0.4}, "width by depth")],
)
def test_another_body_part_or_contrast_is_named_with_the_remedy(weights, network, caplog, changes, words):
    other = volume(8, **changes)
    other.meta["filename_or_obj"] = "/data/knee.nii.gz"
    output = SaliencyInferer(lambda x, network, slices: x, gate="all", appearance=TrainingAppearance(weights))(
        other[None], network
    )
    assert max(float(output.meta[FACTS][name]) for name in appearance.CHECKS) > 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("knee.nii.gz: unlike the training volumes in ") and words in line
    assert "look at the mask, and check that body part, sequence and orientation" in line


def test_statistics_that_do_not_fit_are_not_used_in_silence(weights, network, caplog, tmp_path):
    assert TrainingAppearance(weights)(volume(0)[None], tiny_network(seed=1, segmenter=True)) == [{}]
    assert "model.statistics.json is of other weights" in caplog.text
    assert TrainingAppearance(tmp_path / "mine.pt")(volume(0)[None], network) == [{}]
    assert "mine.statistics.json does not exist" in caplog.text
    halved = tiny_network(segmenter=True).half().float()  # as weights are stored
    assert TrainingAppearance(weights)(volume(0)[None], halved) != [{}]


def test_too_few_volumes_have_no_statistics(weights, network, caplog):
    cases = [{"case": f"p{i}", "image": "any"} for i in range(2)]
    write_statistics(cases, Lambdad("image", lambda file: volume(0)), network, weights)
    assert "need 3 volumes at least, got 2" in caplog.text
    assert json.loads(statistics_file(weights).read_text())["limit"] > 0, "those of these weights stay"
    network.segmenter.unet.conv_0.conv_0.conv.weight.data.add_(1)
    write_statistics(cases, Lambdad("image", lambda file: volume(0)), network, weights)
    assert not statistics_file(weights).exists(), "those of other weights go"


def test_training_volumes_that_are_all_alike_give_a_limit(weights, network):
    cases = [{"case": f"p{i}", "image": str(weights.parent / f"p{i}.nii.gz")} for i in range(4)]
    write_statistics(cases, Lambdad("image", lambda file: volume(0)), network, weights)
    (facts,) = TrainingAppearance(weights)(volume(0)[None], network)
    assert facts["unlike_contrast"] < 1


def test_weights_without_a_segmenter_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="model.pt has no trained segmenter"):
        write_statistics([], None, tiny_network(), tmp_path / "model.pt")
