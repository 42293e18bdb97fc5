"""Which slices are drawn, and by which process.

Several processes (torchrun) share work and draws: whatever is random is drawn alike in all of them, for all of them,
and each takes its `rank_share`. So N processes with a batch of B compute what one process with a batch of N * B does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ignite.distributed as idist
import torch
from torch.utils.data import DistributedSampler

from custom_modules.training.slices import SliceDataset


def rank_share(items: Sequence) -> Sequence:
    """Gives this process its share of `items` (a sequence, or the rows of a tensor): every N-th, of N processes.

    If there are fewer items than processes, each gets all of them: one without work would leave the others waiting.
    """
    processes = idist.get_world_size()
    return items[idist.get_rank() :: processes] if len(items) >= processes else items


def epoch_seed(seed: int, epoch: int) -> int:
    """Derives a seed from the seed of a run and an epoch."""
    return (seed * 1_000_003 + epoch * 1_009) % 2**31


class BalancedSampler(DistributedSampler):
    """Draws slices, as many positive as negative ones, as a function of (seed, epoch).

    The k-th batches of all processes together are the k-th batch of one process whose batch is as large as theirs
    together. MONAI's `DistributedWeightedRandomSampler` draws others for each number of processes. It is a
    `DistributedSampler` because MONAI's engines tell those the epoch.

    Args:
        dataset: the slices.
        num_samples: draws of this process in an epoch.
        seed: seed of the run.
    """

    def __init__(self, dataset: SliceDataset, num_samples: int, seed: int = 0) -> None:
        super().__init__(dataset, idist.get_world_size(), idist.get_rank(), seed=seed)
        self.num_samples = num_samples
        self.weights = torch.tensor(dataset.balanced_weights, dtype=torch.double)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch) + 1)  # the noise has + 0
        total = self.num_samples * self.num_replicas
        return iter(rank_share(torch.multinomial(self.weights, total, replacement=True, generator=generator).tolist()))
