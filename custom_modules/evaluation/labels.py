"""Label values beside a prediction on the native grid."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from custom_modules.data.labels import load_label
from custom_modules.evaluation.metrics import Row


class LoadLabeld(Transform):
    """Adds the label values `label` (1, H, W, D) of the file or PNG folder in `label_file`, in the stored order.

    It comes after inference, when `pred` is back on the native grid, and takes the affine from there.

    Raises:
        ValueError: the label's shape differs from the image's.
    """

    def __call__(self, data: Row) -> dict[str, Any]:
        label, pred = torch.as_tensor(load_label(data["label_file"], data["image_file"]))[None], data["pred"]
        if label.shape != pred.shape:
            raise ValueError(
                f"the label's shape {tuple(label.shape[1:])} differs from the image's {tuple(pred.shape[1:])}: "
                f"{data['label_file']}."
            )
        return {**data, "label": MetaTensor(label, affine=pred.affine)}
