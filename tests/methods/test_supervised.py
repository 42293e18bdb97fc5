"""The upper bound as a method: probabilities of its own network, and clear errors about its weights."""

import pytest
import torch

from custom_modules.methods.segmenter import UpperBound
from custom_modules.networks.segmenter import Segmenter


def tiny_unet(seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(2, [8] * 6, norm_num_groups=4)


@pytest.fixture
def weights(tmp_path):
    state = {name: value.half() for name, value in tiny_unet(seed=1).state_dict().items()}
    torch.save(state, tmp_path / "supervised.pt")
    return tmp_path / "supervised.pt"


def test_the_method_gives_probabilities_of_its_own_network(weights):
    x_0 = torch.rand(3, 1, 32, 32) * 2 - 1
    method = UpperBound(tiny_unet(seed=2), str(weights), amp=False)
    pred = method(x_0, torch.nn.Identity(), [4, 5, 6])
    assert pred.shape == x_0.shape and pred.dtype == torch.float32 and not pred.requires_grad
    assert 0 <= pred.min() < pred.max() <= 1
    other = tiny_unet(seed=1).eval()
    other.load_state_dict({name: value.half().float() for name, value in other.state_dict().items()})
    mirrored = torch.sigmoid(other(x_0.flip(2))).flip(2)
    torch.testing.assert_close(pred, ((torch.sigmoid(other(x_0)) + mirrored) / 2).detach())
    torch.testing.assert_close(method(x_0[1:2], None, [5]), pred[1:2])  # a slice does not depend on its batch
    mixed = UpperBound(tiny_unet(), weights)(x_0, None, [4, 5, 6])
    assert mixed.dtype == torch.float32 and (mixed - pred).abs().max() < 0.05


def test_missing_weights_say_how_to_train_them(tmp_path):
    message = (
        r"supervised_ckpt_path '.*nowhere.pt' does not exist; train it with masks "
        r"\(configs/train_supervised.yaml over train.yaml\), or give --supervised_ckpt_path FILE"
    )
    with pytest.raises(FileNotFoundError, match=message):
        UpperBound(tiny_unet(), tmp_path / "nowhere.pt")


def test_other_weights_are_an_error(tmp_path):
    torch.save({"denoiser.weight": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="supervised_ckpt_path .* does not hold weights of this network"):
        UpperBound(tiny_unet(), tmp_path / "model.pt")
