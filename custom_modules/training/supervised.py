"""The upper bound: a 2D U-Net that is trained on masks.

THIS IS THE ONLY TRAINING THAT READS MASKS. It is not a weakly supervised method: it shows how well the student's
network (distill.py) segments the same slices when every pixel is labelled, as a ceiling for the label-only methods.
`train_supervised.yaml` over `train.yaml` puts it together. Its weights (`supervised.pt`) are kept apart from the
label-only `model.pt`, which never depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch, Transform

from custom_modules.data.geometry import read_geometry
from custom_modules.data.labels import load_label, target_mask


class LoadMaskd(Transform):
    """READS A MASK, for the supervised training only, and adds it to a prepared case on the grid of its image.

    The target in `label_file` (NIfTI, or a folder of PNGs) becomes 1 and the rest 0 (`target_mask`). Nearest neighbours
    then bring it through all that preprocessing did to the image: orientation, crop and resizing are in its affine.

    Expects `image` (1, H, W, D) MetaTensor, and `image_file`, `label_file` and, if the file is 4D, `channel`;
    adds `label`, the same shape, float32, 0 or 1.

    Raises:
        ValueError: the label does not fit the stored image.
    """

    def __init__(self, target_labels: Sequence[int] | None = None) -> None:
        self.target_labels = list(target_labels or [])
        self.onto_image = ResampleToMatch(mode="nearest", padding_mode="zeros")

    def __call__(self, data: Mapping) -> dict:
        out = dict(data)
        _, affine = read_geometry(out["image_file"], out.get("channel"))
        try:
            label = load_label(out["label_file"], out["image_file"])
        except ValueError as error:
            raise ValueError(f"case {out['case']!r}: {error} ({out['label_file']})") from error
        target = torch.as_tensor(target_mask(label, self.target_labels)[None], dtype=torch.float32)
        out["label"] = self.onto_image(MetaTensor(target, affine=torch.as_tensor(affine)), out["image"])
        return out
