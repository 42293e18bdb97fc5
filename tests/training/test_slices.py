"""Slices in memory: decoded once, cached, weighted, and with a label only if the preprocessing adds one."""

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    Resized,
    ScaleIntensityRanged,
)

from custom_modules.data.tag_volume import TagVolumed
from custom_modules.files import is_whole
from custom_modules.training.slices import MAX_RATIO, SliceDataset, position_weights, whole_batch
from tests.helpers.volumes import save_volume


class CountingLoad(LoadImaged):
    """`LoadImaged` that counts."""

    loaded = 0

    def __call__(self, data):
        type(self).loaded += 1
        return super().__call__(data)


def preprocessing(size=8):
    return Compose(
        [
            CountingLoad(keys="image"),
            EnsureChannelFirstd(keys="image"),
            EnsureTyped(keys="image", dtype=torch.float32),
            TagVolumed(),
            Resized(keys="image", spatial_size=[size, size, -1], mode="nearest"),
            ScaleIntensityRanged(keys="image", a_min=0, a_max=100, b_min=-1, b_max=1, clip=True),
        ]
    )


@pytest.fixture
def cases(tmp_path):
    """Two volumes (8, 8, 4) whose slice k is k * 10 everywhere, so slice 0 has no tissue; 3 of 8 tags are positive."""
    CountingLoad.loaded = 0
    array = np.broadcast_to(np.arange(4, dtype=np.int16) * 10, (8, 8, 4))
    items = []
    for name, tags in (("a", [1, 0, 1, 1]), ("b", [0, 0, 0, 0])):
        path = save_volume(tmp_path / f"{name}.nii.gz", array)
        items.append({"case": name, "image": str(path), "slice_labels": tags})
    return items


def test_slices_are_decoded_once_to_half_precision(cases):
    dataset = SliceDataset(cases, preprocessing())
    assert CountingLoad.loaded == 2
    items = [dataset[i] for i in range(len(dataset))]
    assert CountingLoad.loaded == 2
    assert dataset.images.dtype == torch.float16 and dataset.images.shape == (6, 1, 8, 8)  # slices 0 are air
    assert [int(item["tag"]) for item in items] == [0, 1, 1, 0, 0, 0]
    assert all(item["image"].shape == (1, 8, 8) and item["image"].dtype == torch.float32 for item in items)
    # 10, 20, 30 of 100 in [-1, 1]
    for item, value in zip(items, [-0.8, -0.6, -0.4] * 2):
        assert (item["image"] - value).abs().max() <= 1e-3


def test_the_cache_serves_the_next_run(cases, tmp_path):
    shared = preprocessing()  # the training and the validation set of a config share one
    first = SliceDataset(cases, shared, cache_dir=tmp_path / "cache")
    assert CountingLoad.loaded == 2 and len(list((tmp_path / "cache").glob("*.pt"))) == 2
    for again in (preprocessing(), shared):
        second = SliceDataset(cases, again, cache_dir=tmp_path / "cache")
        assert CountingLoad.loaded == 2
        assert torch.equal(first.images, second.images) and torch.equal(first.tags, second.tags)


def test_the_cache_key_holds_every_setting_and_the_tags(cases, tmp_path):
    SliceDataset(cases, preprocessing(), cache_dir=tmp_path)
    other = SliceDataset(cases, preprocessing(size=4), cache_dir=tmp_path)
    assert other.images.shape == (6, 1, 4, 4) and CountingLoad.loaded == 4
    retagged = SliceDataset([cases[0] | {"slice_labels": [0, 1, 0, 0]}], preprocessing(), cache_dir=tmp_path)
    assert retagged.tags.tolist() == [1, 0, 0] and CountingLoad.loaded == 5


def test_a_volume_that_is_replaced_is_prepared_again(cases, tmp_path):
    SliceDataset(cases, preprocessing(), cache_dir=tmp_path / "cache")
    save_volume(tmp_path / "a.nii.gz", np.full((8, 8, 4), 40, np.int16))
    again = SliceDataset(cases, preprocessing(), cache_dir=tmp_path / "cache")
    assert CountingLoad.loaded == 3 and (again.images[:4] + 0.2).abs().max() < 1e-3  # 40 of 100 in [-1, 1]


@pytest.mark.parametrize("damage", ["empty", "cut", "bit"])
def test_a_broken_file_of_the_cache_is_named_and_made_again(cases, tmp_path, caplog, damage):
    first = SliceDataset(cases, preprocessing(), cache_dir=tmp_path)
    file = next(tmp_path.glob("*.pt"))
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    file.write_bytes({"empty": b"", "cut": whole[:middle], "bit": flipped}[damage])
    again = SliceDataset(cases, preprocessing(), cache_dir=tmp_path)
    assert file.name in caplog.text and "is broken and made again" in caplog.text
    assert torch.equal(first.images, again.images) and CountingLoad.loaded == 3 and is_whole(file)
    assert len(list(tmp_path.glob("*.pt"))) == 2 and not list(tmp_path.glob(".partial*"))


def test_a_case_that_cannot_be_prepared_is_named(cases, tmp_path):
    (tmp_path / "b.nii.gz").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="case 'b' cannot be prepared: .*b.nii.gz"):
        SliceDataset(cases, preprocessing())


def test_balanced_weights_draw_both_tags_equally(cases):
    dataset = SliceDataset(cases, preprocessing())
    weights = torch.tensor(dataset.balanced_weights)
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4])  # 2 positive, 4 negative
    with pytest.raises(ValueError, match="slices of both tags; got 0 positive and 3 negative"):
        _ = SliceDataset(cases[1:], preprocessing()).balanced_weights


# ---- weights of the negative slices


def per_tenth(tags, lengths, weights, tag):
    """Weighted share of the slices with `tag` in each tenth of their volumes, by integers: floor(10 k / n)."""
    tenths = torch.cat([torch.tensor([10 * k // n for k in range(n)]) for n in lengths])
    shares = torch.bincount(tenths[tags == tag], weights[tags == tag], minlength=10)
    return (shares / shares.sum()).tolist()


def test_weighted_negative_slices_lie_where_positive_ones_do():
    generator, lengths = torch.Generator().manual_seed(0), [40, 60, 100]
    position = torch.cat([torch.arange(n) / n for n in lengths])
    chance = 0.2 + 0.5 * (1 - (2 * position - 1).abs())  # rarer at both ends, where the cap does not act
    tags = (torch.rand(200, generator=generator) < chance).long()
    weights = position_weights(tags, lengths)
    ones = torch.ones(200)
    assert weights.dtype == torch.float32 and (weights[tags == 1] == 1).all()
    assert weights[tags == 0].mean().item() == pytest.approx(1)
    positive = per_tenth(tags, lengths, ones, 1)
    assert per_tenth(tags, lengths, ones, 0) != pytest.approx(positive, abs=0.02)
    assert per_tenth(tags, lengths, weights, 0) == pytest.approx(positive, abs=1e-6)


def test_position_weights_by_hand():
    tags = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0, 0] * 2)  # two volumes of ten slices: a slice is a tenth
    # 3 tenths hold positive slices alone, the others negative ones alone: nothing to weigh by
    assert position_weights(tags, [10, 10])[tags == 0].tolist() == [0] * 14
    tags = torch.tensor([0, 0, 1, 0, 0] + [0, 1, 1, 0, 0])  # two volumes of five
    # positions 0, 2, 4, 6, 8 tenths; negative (2, 1, 0, 2, 2) / 7 of them, positive (0, 1, 2, 0, 0) / 3: only the
    # negative slice in the second place lies among positive ones, with ratio 7 / 3, so it gets all the weight of 7
    assert position_weights(tags, [5, 5]).tolist() == pytest.approx([0, 7, 1, 0, 0, 0, 1, 1, 0, 0])


def test_no_few_slices_make_up_the_loss():
    """A tenth with 1 of 100 negative slices and half of the positive ones has the ratio 50: cut at 8."""
    lengths = [10] * 20
    tags = torch.zeros(20, 10, dtype=torch.long)
    tags[1:, 4], tags[:19, 5] = 1, 1  # one negative slice in either tenth, 19 positive ones; 160 elsewhere
    weights = position_weights(tags.flatten(), lengths).view(20, 10)
    ratio = 0.5 / (1 / 162)
    assert ratio > MAX_RATIO  # and both are cut alike, so the mean of 162 is over two of them
    assert weights[0, 4] == weights[19, 5] == pytest.approx(81)
    tags[:, 0] = torch.arange(20) % 2  # 10 negative and 10 positive slices in the first tenth
    weights = position_weights(tags.flatten(), lengths).view(20, 10)
    first = (10 / 48) / (10 / 152)
    assert first < MAX_RATIO and weights[0, 4] / weights[0, 0] == pytest.approx(MAX_RATIO / first)


@pytest.mark.parametrize("tags", [[0, 0, 0], [1, 1, 1], []])
def test_without_two_tags_all_slices_weigh_alike(tags):
    assert position_weights(torch.tensor(tags).long(), [len(tags)] if tags else []).tolist() == [1] * len(tags)


@pytest.mark.parametrize("length", [7, 10, 30, 155])
def test_the_tenth_of_a_slice_is_exact(length):
    """The one negative slice has weight where, in whole numbers, its tenth is that of the positive ones alone."""
    tags = torch.zeros(2 * length, dtype=torch.long)
    for k in range(length):
        tags[:] = 0
        tags[k] = 1
        weighted = position_weights(tags, [length] * 2).nonzero().flatten().tolist()
        same = [j for j in range(length) if 10 * j // length == 10 * k // length]
        assert weighted == [*same, *(length + j for j in same)]


def test_items_carry_their_weight(cases):
    plain = SliceDataset(cases, preprocessing())
    assert [float(plain[i]["weight"]) for i in range(6)] == [1] * 6
    matched = SliceDataset(cases, preprocessing(), match_positions=True)
    # slices 1, 2, 3 of each case hold tissue; tags 0, 1, 1 and 0, 0, 0: ratio 0 in the first place, else (1/2) / (1/4)
    assert [float(matched[i]["weight"]) for i in range(6)] == pytest.approx([0, 1, 1, 0, 2, 2])
    assert matched[3]["weight"].dtype == torch.float32


# ---- batches, labels


def test_a_loader_gathers_a_whole_batch(cases):
    dataset = SliceDataset(cases, preprocessing())
    batch = next(iter(DataLoader(dataset, batch_size=4, sampler=[5, 0, 2, 1], collate_fn=whole_batch)))
    for key, value in batch.items():
        assert torch.equal(value, torch.stack([dataset[i][key] for i in (5, 0, 2, 1)]))
    assert batch["image"].shape == (4, 1, 8, 8) and batch["image"].dtype == torch.float32


def test_no_case_gives_no_slice():
    assert len(SliceDataset([], preprocessing())) == 0


def test_items_have_a_label_only_where_the_preprocessing_adds_one(cases, tmp_path):
    without = SliceDataset(cases, preprocessing(), cache_dir=tmp_path)
    assert without.labels is None and set(without[0]) == {"image", "tag", "weight"}
    masks = Compose([preprocessing(), lambda case: case | {"label": (case["image"] > -0.7).float()}])
    dataset = SliceDataset(cases, masks, cache_dir=None)
    assert dataset.labels.dtype == torch.uint8 and dataset.labels.shape == dataset.images.shape
    # slices of 10, 20, 30 of 100 are at -0.8, -0.6, -0.4
    assert [dataset[i]["label"].unique().tolist() for i in range(6)] == [[0.0], [1.0], [1.0]] * 2
    assert dataset[1]["label"].dtype == torch.float32 and dataset[1]["label"].shape == (1, 8, 8)
    assert len(SliceDataset([], masks)) == 0
