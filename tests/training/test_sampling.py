"""Sampling: draws in balance, and several processes that together draw what one does."""

import pytest
import torch
from monai.transforms import Compose

from custom_modules.training.sampling import BalancedSampler, rank_share
from custom_modules.training.slices import SliceDataset


def processes(monkeypatch, rank, number):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: number)


def test_each_process_has_its_share_and_none_is_without(monkeypatch):
    assert rank_share(range(5)) == range(5)
    shares = []
    for rank in range(3):
        processes(monkeypatch, rank, 3)
        shares.append(rank_share(list("abcde")))
        assert rank_share(["a", "b"]) == ["a", "b"] and rank_share([]) == []
    assert shares == [["a", "d"], ["b", "e"], ["c"]]


def test_the_processes_batches_are_together_the_batch_of_one(monkeypatch):
    dataset = SliceDataset([], Compose([]))
    dataset.tags = torch.tensor([0, 1, 1, 0, 0, 0])

    def draws(rank, number, epoch=1, seed=0, num_samples=12):
        processes(monkeypatch, rank, number)
        sampler = BalancedSampler(dataset, num_samples // number, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler)) == num_samples // number
        return list(sampler)

    whole, parts = draws(0, 1), [draws(rank, 3) for rank in range(3)]
    for k in range(2):  # batches of 6, and of 2 in each of the three
        assert sorted(whole[6 * k : 6 * k + 6]) == sorted(sum((part[2 * k : 2 * k + 2] for part in parts), []))
    assert whole == draws(0, 1) and whole not in (draws(0, 1, epoch=2), draws(0, 1, seed=1))
    many = draws(0, 1, num_samples=2000)
    positive = sum(int(dataset.tags[index]) for index in many)
    assert positive == pytest.approx(1000, abs=90)  # 4 standard deviations of sqrt(2000) / 2
