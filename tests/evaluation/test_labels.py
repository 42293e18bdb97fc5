"""Label values beside a prediction on the native grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom_modules.evaluation.labels import LoadLabeld
from tests.helpers.volumes import save_volume


def test_the_label_is_read_on_the_grid_of_the_image(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    affine = np.diag([2.0, 3.0, 5.0, 1.0])
    path, image = (
        save_volume(tmp_path / f"{name}.nii.gz", x, affine) for name, x in (("a_seg", values), ("a", -values))
    )
    pred = MetaTensor(torch.zeros(1, 2, 3, 4), affine=torch.as_tensor(affine))
    case = {"pred": pred, "label_file": str(path), "image_file": str(image)}
    label = LoadLabeld()(case)["label"]
    assert label.shape == (1, 2, 3, 4) and (label[0].numpy() == values).all() and torch.equal(label.affine, pred.affine)
    save_volume(path, values[:1], affine)
    with pytest.raises(ValueError, match=r"label's shape \(1, 3, 4\) differs from the image's \(2, 3, 4\).*a_seg"):
        LoadLabeld()(case)
