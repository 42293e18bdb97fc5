"""The best threshold: by hand on a phantom, and the command on a head whose scalp is brighter than its tumour."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np

from study.__main__ import main
from study.floor import LEVELS, best_thresholds, count
from tests.helpers.bundles import BUNDLES, LPS, REPO


def phantom(*slices: int) -> np.ndarray:
    """200 voxels (10, 10, 2), no two alike: the brightest ten in the slice named first, and so on; the rest of slice 1,
    then that of slice 0."""
    free = [[*range(100)], [*range(100, 200)]]
    order = [free[k].pop() for k in slices for _ in range(10)]
    image = np.empty(200)
    image[[*order, *free[1], *free[0]]] = np.arange(200, 0, -1)
    return np.stack([image[:100].reshape(10, 10), image[100:].reshape(10, 10)], axis=-1)


def test_best_thresholds_by_hand():
    # ten voxels of target in slice 0: the brightest of the first volume, and of the second the brightest but ten
    first, second = phantom(0, 1), phantom(1, 0)
    counts = [count(first, first >= 0, first > 190), count(second, second >= 0, (second > 180) & (second <= 190))]
    assert counts[0].shape == (3, 2, LEVELS)
    assert counts[0][:, :, 0].tolist() == [[100, 100], [10, 0], [10, 0]]  # the lowest threshold leaves all
    assert counts[0][:, :, 950].tolist() == [[10, 0], [10, 0], [10, 0]]  # the brightest 5 %: the target
    assert counts[1][:, :, 950].tolist() == [[0, 10], [10, 0], [0, 0]]
    # All of the target and nothing else of slice 0 is above the rest of slice 1, so down to (20 + 90) / 200. Of each
    # volume the brightest 10 % are 20 voxels, the target among them: 20 / 30. The first volume alone can have 1.
    assert best_thresholds("phantom", counts) == [
        "| phantom (2 volumes, 2 slices): one for all | 1.000 (brightest 55.0%) | 0.667 (brightest 10.0%) "
        "| 0.667 (brightest 10.0%) |",
        "| one for each volume | 1.000 | 0.833 | |",
    ]


def test_what_is_outside_the_body_is_in_no_mask():
    image = phantom(0)
    body = np.ones(image.shape, bool)
    body[..., 0] = False
    counts = count(image, body, image > 190)
    assert counts[0, 0].max() == 0 and counts[0, 1, 0] == 100
    assert counts[1, 0].tolist() == [10] * LEVELS and counts[2].max() == 0  # the target there is missed


def test_the_command_with_and_without_the_scalp(tmp_path, capsys):
    rows, columns = np.mgrid[-48:48, -48:48]
    radius = np.hypot(rows, columns)
    image = np.where(radius < 40, 80.0, 0.0)[..., None].repeat(6, axis=2)
    image[radius > 36] *= 3  # the scalp
    mask = np.zeros(image.shape, np.uint8)
    mask[40:56, 30:46, 2:5] = 1
    image[mask > 0] = 160
    for name, array in (("flair", image.astype(np.float32)), ("seg", mask)):
        (tmp_path / "p1").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, LPS), tmp_path / "p1" / f"p1_{name}.nii.gz")
    tags = mask.any(axis=(0, 1)).astype(int).tolist()
    case = {"case": "p1", "image": "p1/p1_flair.nii.gz", "label": "p1/p1_seg.nii.gz", "slice_labels": tags}
    (tmp_path / "datalist.json").write_text(json.dumps({"test": [case]}))
    where = [f"--bundle={REPO / 'bundles' / BUNDLES[0]}", f"--dataset_dir={tmp_path}"]
    main(["floor", *where, f"--datalist={tmp_path}/datalist.json"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].split(", ", 1)[1] for row in rows[::2]] == [
        "whole body (1 volumes, 3 slices): one for all",
        "without its rim (1 volumes, 3 slices): one for all",
    ]
    whole, rest = ([float(cell.split()[0]) for cell in (*one[1:], *own[1:3])] for one, own in (rows[:2], rows[2:]))
    assert max(whole) < 0.5  # 256 pixels of tumour in a slice, and 950 of brighter scalp
    assert rest == [1.0] * 5
