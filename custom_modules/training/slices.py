"""The slices of a set of volumes, which training draws from: decoded once, and kept in memory in half precision."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy

import ignite.distributed as idist
import torch
from monai.data import PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, Transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from custom_modules.data.annotation import tagged_cases
from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.files import atomic_path, is_whole, stamp
from custom_modules.inference.cases import reason

logger = logging.getLogger(__name__)
MAX_RATIO = 8.0  # so that a few slices do not make up the loss


class SliceDataset(Dataset):
    """Holds all slices of a set of volumes in half precision, on the device if they take little of its memory.

    Every volume is read and prepared once by `preprocessing` (deterministic; gives `image` (1, H, W, D) in [-1, 1] and
    a tag volume `slice_labels`), and kept in `cache_dir` for the next run. The key of the cache is the case's entry and
    every setting of `preprocessing`, and size, time and inode of the files. Slices without any tissue are left out.

    A mask is never read here: items have a `label` only if `preprocessing` adds one, as `distill.yaml` does from maps,
    and `train_supervised.yaml`, alone, from masks.

    Items are {"image": (1, H, W) float32 in [-1, 1], "tag": int64, "weight": float32, "label"?: (1, H, W) float32, 0, 1
    or `segmentation.UNKNOWN`}.

    Args:
        data: cases with `image` and `slice_labels`, or as an annotation server gives them (`tagged_cases`).
        preprocessing: MONAI transforms of one case.
        cache_dir: folder of the prepared volumes; None: prepare them again in each run.
        num_workers: processes that prepare volumes.
        device: where training runs.
        match_positions: weight the items by `position_weights`; otherwise their weight is 1.
    """

    def __init__(
        self,
        data: Sequence[Mapping],
        preprocessing: Compose,
        cache_dir: str | None = None,
        num_workers: int = 0,
        match_positions: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cases = tagged_cases(data)
        packed = _prepare(self.cases, preprocessing, cache_dir, num_workers)

        def join(key: str) -> torch.Tensor:
            return torch.cat([slices[key] for slices in packed]) if packed else torch.empty(0)

        self.images, self.tags = join("image"), join("tag").long()  # (N, 1, H, W) float16, (N,) int64
        self.labels = join("label") if packed and "label" in packed[0] else None  # (N, 1, H, W) uint8
        lengths = [len(slices["tag"]) for slices in packed]
        self.weights = position_weights(self.tags, lengths) if match_positions else torch.ones(len(self.tags))
        if self._fits(torch.device(device)):
            self.images, self.tags, self.weights = (x.to(device) for x in (self.images, self.tags, self.weights))
            self.labels = None if self.labels is None else self.labels.to(device)

    @property
    def balanced_weights(self) -> list[float]:
        """Computes sampling weights (N,) under which positive and negative slices are drawn equally often.

        Raises:
            ValueError: one of the two tags never occurs.
        """
        counts = torch.bincount(self.tags, minlength=2)
        if not counts.all():
            raise ValueError(
                f"training needs slices of both tags; got {counts[1]} positive and {counts[0]} negative slices."
            )
        return (1.0 / counts.double())[self.tags].tolist()

    def _fits(self, device: torch.device) -> bool:
        """Tells whether the slices take less than a quarter of the free memory of `device`, a GPU."""
        return device.type == "cuda" and 4 * self.images.nbytes < torch.cuda.mem_get_info(device)[0]

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: int) -> dict:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """Gathers a whole batch at once, so a `DataLoader` has nothing left to collate (`whole_batch`)."""
        index = torch.as_tensor(indices, device=self.images.device)
        batch = {"image": self.images[index].float(), "tag": self.tags[index], "weight": self.weights[index]}
        return batch if self.labels is None else batch | {"label": self.labels[index].float()}


def whole_batch(batch: dict) -> dict:
    """Returns what `SliceDataset` has gathered, as the `collate_fn` of a `DataLoader`."""
    return batch


def _prepare(cases: list[dict], preprocessing: Compose, cache_dir: str | None, num_workers: int) -> list[dict]:
    """Reads, prepares and packs all cases; several processes fill a common cache together, and then all read it."""
    # Flat, because PersistentDataset takes a nested Compose for random and would cache nothing; a copy, because a
    # reader remembers the file it read last, which would enter the key of the next data set.
    prepare = deepcopy(Compose([preprocessing, PackSlices()]).flatten())
    volumes = PreparedVolumes(cases, prepare, cache_dir, hash_transform=pickle_hashing)

    def read(indices: Sequence[int], quiet: bool = False) -> list[dict]:
        loader = DataLoader(volumes, batch_size=None, sampler=indices, num_workers=num_workers)
        quiet = quiet or len(indices) < 2 or idist.get_rank() > 0
        return list(tqdm(loader, desc="preparing volumes", unit="volume", disable=quiet))

    everything, shared = range(len(cases)), cache_dir is not None and idist.get_world_size() > 1
    if shared:
        read(everything[idist.get_rank() :: idist.get_world_size()])  # `rank_share` may give one file to two processes
        idist.barrier()
    return read(everything, quiet=shared)


class PreparedVolumes(PersistentDataset):
    """MONAI's `PersistentDataset`, whose files are whole or absent; one that broke later is named and made again.

    Raises:
        ValueError: a case cannot be prepared; the message names it.
    """

    def _cachecheck(self, item_transformed: Mapping) -> dict:
        if self.cache_dir is None:
            return self._prepared(item_transformed)
        files = [item_transformed[name] for name in ("image", "label_file") if name in item_transformed]
        key = {**item_transformed, "stamps": [stamp(file) for file in files if os.path.exists(file)]}
        file = self.cache_dir / f"{self.hash_func(key).decode()}{self.transform_hash}.pt"
        if file.is_file():
            if is_whole(file):
                return torch.load(file, weights_only=True)
            logger.warning("%s, the cache of case %s, is broken and made again.", file, item_transformed.get("case"))
        prepared = self._prepared(item_transformed)
        with atomic_path(file) as aside, open(aside, "wb") as stream:
            torch.save(prepared, stream)
        return prepared

    def _prepared(self, case: Mapping) -> dict:
        try:
            return self._pre_transform(deepcopy(case))
        except Exception as error:  # whatever a file may hold
            raise ValueError(f"case {case['case']!r} cannot be prepared: {reason(error)} ({case['image']})") from error


def position_weights(tags: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Weights negative slices so that they lie where positive ones do, along the volume.

    Tumours are rare at the top and the bottom of a head. So a tag tells where a slice lies, and a denoiser learns to
    draw that anatomy; after weighting, only the target tells the tags apart. Negative slices get the ratio of the two
    shares in their tenth of the volume, at most `MAX_RATIO`, scaled to mean 1; positive ones get 1.

    Args:
        tags: (N,) int64 of all slices, volume after volume.
        lengths: number of slices of each volume.

    Returns:
        (N,) float32.
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


class PackSlices(Transform):
    """Turns a prepared case into its n slices with tissue: {"image": (n, 1, H, W) float16, "tag": (n,) uint8}, and
    "label" (n, 1, H, W) uint8 if the case has one."""

    def __call__(self, data: Mapping) -> dict[str, torch.Tensor]:
        image, tags = data["image"].as_tensor(), tags_of_volume(data["slice_labels"].as_tensor())
        slices = image.movedim(-1, 0)
        tissue = (slices > -0.9).flatten(1).float().mean(dim=1) > 0.02
        packed = {"image": slices[tissue].half(), "tag": tags[tissue].clone()}
        if "label" in data:
            labels = data["label"].as_tensor().movedim(-1, 0)
            packed["label"] = labels[tissue].to(torch.uint8).contiguous()
        return packed
