"""The slices of a set of volumes in memory, which training draws from: decoded once, 8 bits a voxel.

Several processes (torchrun) share work and draws: whatever is random is drawn alike in all of them, for all of them,
and each takes its `rank_share`. So N processes with a batch of B compute what one process with a batch of N * B does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import PersistentDataset, get_track_meta, set_track_meta
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Randomizable, Transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from custom_modules.data.annotation import tagged_cases
from custom_modules.data.tag_volume import tags_of_volume

MAX_RATIO = 8.0  # so that a few slices do not make up the loss


class SliceDataset(Dataset):
    """All slices of a set of volumes, decoded once, as uint8 in memory: random access fast enough for any GPU.

    Every volume is read and prepared once by `preprocessing` (deterministic; gives `image` (1, H, W, D) in [-1, 1] and
    a tag volume `slice_labels`), and kept in `cache_dir` for the next run under a key of the case's entry and of every
    setting of `preprocessing`; a file that changes under the same name is not noticed. Slices without any tissue are
    left out.

    A mask is never read here: items have a `label` only where `preprocessing` adds one, as that of `distill.yaml` does
    from maps, and that of `train_supervised.yaml` alone from masks.

    Args:
        data: cases with `image` and `slice_labels`, or as an annotation server gives them (`tagged_cases`).
        preprocessing: MONAI transforms of one case.
        augmentation: random MONAI transforms of one item, keys `image` and `label`.
        cache_dir: folder of the prepared volumes; None to prepare them anew each run.
        num_workers: processes that prepare volumes.
        match_positions: the items' weights are `position_weights`; without it they are 1.

    Items: {"image": (1, H, W) float32 in [-1, 1], "tag": int64, "weight": float32, "label"?: (1, H, W) float32, 0, 1 or
    `segmentation.UNKNOWN`}, by the number of the slice or, as `BalancedSampler` gives it, by (number, seed): then the
    augmentation depends on the seed alone.
    """

    def __init__(
        self,
        data: Sequence[Mapping],
        preprocessing: Compose,
        augmentation: Compose | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        match_positions: bool = False,
    ) -> None:
        # Flat, because PersistentDataset takes a nested Compose for random and would cache nothing; a copy, because a
        # reader remembers the file it read last, which would enter the key of the next data set.
        prepare = deepcopy(Compose([preprocessing, PackSlices()]).flatten())
        self.cases = tagged_cases(data)
        volumes = PersistentDataset(self.cases, prepare, cache_dir, hash_transform=pickle_hashing)
        everything = range(len(self.cases))

        def read(indices: Sequence[int], quiet: bool = False) -> list[dict]:
            loader = DataLoader(volumes, batch_size=None, sampler=indices, num_workers=num_workers)
            quiet = quiet or len(indices) < 2 or idist.get_rank() > 0
            return list(tqdm(loader, desc="preparing volumes", unit="volume", disable=quiet))

        shared = cache_dir is not None and idist.get_world_size() > 1
        if shared:  # each process fills its share of the cache, from which all read
            read(everything[idist.get_rank() :: idist.get_world_size()])  # `rank_share` may give one file to two
            idist.barrier()
        try:
            packed = read(everything, quiet=shared)
        except RuntimeError as error:
            if "PytorchStreamReader" not in str(error):
                raise
            raise ValueError(
                f"a prepared volume in cache_dir {cache_dir} is broken (was a run killed while it wrote it?); remove "
                f"that folder, and the next run prepares the volumes anew. {error}"
            ) from error

        def join(key: str) -> torch.Tensor:
            return torch.cat([slices[key] for slices in packed]) if packed else torch.empty(0)

        self.images, self.tags = join("image"), join("tag").long()  # (N, 1, H, W) uint8, (N,) int64
        self.labels = join("label") if packed and "label" in packed[0] else None  # (N, 1, H, W) uint8
        lengths = [len(slices["tag"]) for slices in packed]
        self.weights = position_weights(self.tags, lengths) if match_positions else torch.ones(len(self.tags))
        self.augmentation, self.random = augmentation, np.random.RandomState()
        _draw_from(augmentation, self.random)

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

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        if isinstance(index, tuple):
            index, seed = index
            self.set_random_state(seed)
        item = {"image": self.images[index].float() / 127.5 - 1, "tag": self.tags[index], "weight": self.weights[index]}
        if self.labels is not None:
            item["label"] = self.labels[index].float()
        if self.augmentation is None:
            return item
        tracking = get_track_meta()
        set_track_meta(False)  # a slice needs no affine, and to carry one takes longer than the augmentation itself
        try:
            return self.augmentation(item)
        finally:
            set_track_meta(tracking)

    def set_random_state(self, seed: int) -> None:
        self.random.seed(seed)


def position_weights(tags: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Weights (N,) float32 under which negative slices lie where positive ones do, along the volume.

    Tumours are rare at the top and the bottom of a head, so a tag says where a slice lies, and a denoiser learns to
    draw that anatomy; weighted, what is left to tell the tags apart is the target. Negative slices get the ratio of the
    two shares in their tenth of the volume, at most `MAX_RATIO`, scaled to mean 1, and positive ones 1.

    Args:
        tags: (N,) int64 of all slices, volume after volume.
        lengths: slices of each volume.
    """
    negative = tags == 0
    if negative.all() or not negative.any():
        return torch.ones(len(tags))
    position = torch.cat([torch.arange(n) / n for n in lengths])  # 0 at one end of the volume, 1 at the other
    tenth = (10 * position).long()
    shares = [torch.bincount(tenth[mask], minlength=10) / mask.sum() for mask in (negative, ~negative)]
    ratio = (shares[1] / shares[0]).nan_to_num(nan=0.0).clamp(max=MAX_RATIO)[tenth]  # nan: no slice at all
    scaled = ratio / ratio[negative].mean().clamp(min=1e-6)
    return torch.where(negative, scaled, 1.0)


def _draw_from(transform: Transform | None, random: np.random.RandomState) -> None:
    """Makes `random` the one generator of all that is random in `transform`: to seed it anew takes a microsecond, while
    `Compose.set_random_state`, which makes a generator for each part, takes nearly as long as the augmentation."""
    if isinstance(transform, Randomizable):
        transform.set_random_state(state=random)
    for part in getattr(transform, "transforms", ()):
        _draw_from(part, random)


class PackSlices(Transform):
    """One prepared case -> its n slices with tissue: {"image": (n, 1, H, W) uint8, "tag": (n,) uint8}, and "label"
    (n, 1, H, W) uint8 where the case has one."""

    def __call__(self, data: Mapping) -> dict[str, torch.Tensor]:
        image, tags = data["image"].as_tensor(), tags_of_volume(data["slice_labels"].as_tensor())
        slices = image.movedim(-1, 0)
        tissue = (slices > -0.9).flatten(1).float().mean(dim=1) > 0.02
        codes = ((slices[tissue] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        packed = {"image": codes.contiguous(), "tag": tags[tissue].clone()}
        if "label" in data:
            labels = data["label"].as_tensor().movedim(-1, 0)
            packed["label"] = labels[tissue].to(torch.uint8).contiguous()
        return packed
