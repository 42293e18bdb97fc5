"""The upper bound: a 2D U-Net that is trained on masks.

THIS IS THE ONLY TRAINING THAT READS MASKS. It is no weakly supervised method: it says how well the same slices can be
segmented when every pixel is labelled, by the network and the training of the student (distill.py), so that the
label-only methods have a ceiling to be compared with. `train_supervised.yaml` puts it together over `train.yaml`; its
weights (`supervised.pt`) are apart from the label-only `model.pt`, which never depends on them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResampleToMatch

from custom_modules.data.geometry import read_geometry
from custom_modules.data.labels import load_label, target_mask


class LoadMaskd(MapTransform):
    """READS A MASK, for the supervised training only: adds it to a prepared case, on the grid of its prepared image.

    The label values of `label_file` (NIfTI, or a folder of PNGs) become 1 where they are among `target_labels` (empty:
    above 0), else 0, and follow the image by nearest neighbour through whatever its preprocessing did: orientation,
    crop and resizing are in its affine.

    Expects `image` (1, H, W, D) MetaTensor and the entries `image_file`, `label_file` and, where the file is 4D,
    `channel`; adds `label`, the same shape, float32.

    Raises:
        ValueError: if the label's shape differs from the stored image's.
    """

    def __init__(
        self, keys: str = "label", image_key: str = "image", target_labels: Sequence[int] | None = None
    ) -> None:
        super().__init__(keys)
        self.image_key, self.target_labels = image_key, list(target_labels or [])
        self.onto_image = ResampleToMatch(mode="nearest", padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        out = dict(data)
        shape, affine = read_geometry(out["image_file"], out.get("channel"))
        for key in self.keys:
            label = load_label(out[f"{key}_file"], out["image_file"])
            if label.shape != shape:
                raise ValueError(f"the label's shape {label.shape} differs from the image's {shape}: {out['case']!r}.")
            target = target_mask(label, self.target_labels)
            mask = MetaTensor(torch.as_tensor(target[None], dtype=torch.float32), affine=torch.as_tensor(affine))
            out[key] = self.onto_image(mask, out[self.image_key])
        return out
