"""Label values beside a prediction on the native grid."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from custom_modules.data.labels import load_label
from custom_modules.evaluation.metrics import Row


class LoadLabeld(MapTransform):
    """Adds the label values `label` (1, H, W, D) of the file or PNG folder in `label_file`, in the stored order.

    It comes after inference, when `pred` is back on the native grid, and takes the affine from there.

    Raises:
        ValueError: the label's shape differs from the image's.
    """

    def __init__(self, keys: str = "label") -> None:
        super().__init__(keys)

    def __call__(self, data: Row) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            label = torch.as_tensor(load_label(out[f"{key}_file"], out["image_file"]))[None]
            if label.shape != out["pred"].shape:
                raise ValueError(
                    f"the label's shape {tuple(label.shape[1:])} differs from the image's "
                    f"{tuple(out['pred'].shape[1:])}: {out[f'{key}_file']}."
                )
            out[key] = MetaTensor(label, affine=out["pred"].affine)
        return out
