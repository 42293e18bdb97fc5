"""Label values beside a prediction on the native grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom_modules.evaluation.labels import LoadLabeld
from tests.helpers.volumes import save_volume


def test_the_label_is_read_in_the_stored_order(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = save_volume(tmp_path / "a_seg.nii.gz", values)
    affine = torch.diag(torch.tensor([2.0, 3.0, 5.0, 1.0], dtype=torch.float64))
    case = {"pred": MetaTensor(torch.zeros(1, 2, 3, 4), affine=affine), "label_file": str(path), "image_file": "a"}
    label = LoadLabeld()(case)["label"]
    assert label.shape == (1, 2, 3, 4) and (label[0].numpy() == values).all() and torch.equal(label.affine, affine)
    with pytest.raises(ValueError, match=r"label's shape \(2, 3, 4\) differs from the image's \(2, 3, 5\)"):
        LoadLabeld()(case | {"pred": MetaTensor(torch.zeros(1, 2, 3, 5))})
