"""Label values beside a prediction on the native grid."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from custom_modules.data.labels import load_label
from custom_modules.evaluation.metrics import Row


class LoadLabeld(Transform):
    """Adds the label values `label` (1, H, W, D) of the file or PNG folder in `label_file`, on the grid of the image.

    It comes after inference, when `pred` is back on the native grid, and takes the affine from there.

    Raises:
        ValueError: the label does not fit the image (`load_label`).
    """

    def __call__(self, data: Row) -> dict[str, Any]:
        try:
            label = torch.as_tensor(load_label(data["label_file"], data["image_file"]))[None]
        except ValueError as error:
            raise ValueError(f"{error} ({data['label_file']})") from None
        return {**data, "label": MetaTensor(label, affine=data["pred"].affine)}
