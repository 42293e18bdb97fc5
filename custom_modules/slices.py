"""The slices of a set of volumes in memory, which training draws from: decoded once, 8 bits a voxel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from monai.data import PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from custom_modules.transforms import slice_tags


class SliceDataset(Dataset):
    """All slices of a set of volumes, decoded once, as uint8 in memory: random access fast enough for any GPU.

    Every volume is read and prepared once by `preprocessing` (deterministic; gives `image` (1, H, W, D) in [-1, 1] and
    a tag volume `slice_labels`), and kept in `cache_dir` for the next run under a key of the case's entry and of every
    setting of `preprocessing`; a file that changes under the same name is not noticed. Slices without any tissue are
    left out.

    A mask is never read here: items have a `label` only where `preprocessing` adds one, as that of
    `train_supervised.yaml` alone does.

    Args:
        cases: datalist entries with `image` and `slice_labels`.
        preprocessing: MONAI transforms of one case.
        augmentation: random MONAI transforms of one item, keys `image` and `label`.
        cache_dir: folder of the prepared volumes; None to prepare them anew each run.
        num_workers: processes that prepare volumes.

    Items: {"image": (1, H, W) float32 in [-1, 1], "tag": int64, "label"?: (1, H, W) float32, 0 or 1}.
    """

    def __init__(
        self,
        cases: Sequence[Mapping],
        preprocessing: Compose,
        augmentation: Compose | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
    ) -> None:
        # Flat, because PersistentDataset takes a nested Compose for random and would cache nothing; a copy, because a
        # reader remembers the file it read last, which would enter the key of the next data set.
        prepare = deepcopy(Compose([preprocessing, PackSlices()]).flatten())
        volumes = PersistentDataset([dict(c) for c in cases], prepare, cache_dir, hash_transform=pickle_hashing)
        loader = DataLoader(volumes, batch_size=None, num_workers=num_workers)
        packed = list(tqdm(loader, desc="preparing volumes", unit="volume", disable=len(cases) < 2))

        def join(key: str) -> torch.Tensor:
            return torch.cat([slices[key] for slices in packed]) if packed else torch.empty(0)

        self.images, self.tags = join("image"), join("tag").long()  # (N, 1, H, W) uint8, (N,) int64
        self.labels = join("label") if packed and "label" in packed[0] else None  # (N, 1, H, W) uint8
        self.augmentation = augmentation

    @property
    def balanced_weights(self) -> list[float]:
        """Sampling weights (N,) with which positive and negative slices are drawn equally often.

        Raises:
            ValueError: if one of the two tags never occurs.
        """
        counts = torch.bincount(self.tags, minlength=2)
        if not counts.all():
            raise ValueError(
                f"training needs slices of both tags; got {counts[1]} positive and {counts[0]} negative slices."
            )
        return (1.0 / counts.double())[self.tags].tolist()

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: int) -> dict:
        item = {"image": self.images[index].float() / 127.5 - 1, "tag": self.tags[index]}
        if self.labels is not None:
            item["label"] = self.labels[index].float()
        return item if self.augmentation is None else self.augmentation(item)

    def set_random_state(self, seed: int) -> None:
        if self.augmentation is not None:
            self.augmentation.set_random_state(seed=seed)


class PackSlices(Transform):
    """One prepared case -> its n slices with tissue: {"image": (n, 1, H, W) uint8, "tag": (n,) uint8}, and "label"
    (n, 1, H, W) uint8, 0 or 1, where the case has one."""

    def __call__(self, data: Mapping) -> dict[str, torch.Tensor]:
        image, tags = data["image"].as_tensor(), slice_tags(data["slice_labels"].as_tensor())
        slices = image.movedim(-1, 0)
        tissue = (slices > -0.9).flatten(1).float().mean(dim=1) > 0.02
        codes = ((slices[tissue] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        packed = {"image": codes.contiguous(), "tag": tags[tissue].clone()}
        if "label" in data:
            labels = data["label"].as_tensor().movedim(-1, 0)
            packed["label"] = labels[tissue].to(torch.uint8).contiguous()
        return packed
