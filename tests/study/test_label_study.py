"""The study of labels: a map that is the mask gives labels of Dice 1, and a map of the wrong place of 0."""

import json

import nibabel as nib
import numpy as np
import pytest

from study.__main__ import main
from tests.helpers.bundles import BUNDLES, REPO

AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


@pytest.fixture
def data(tmp_path):
    """A head with a bright block as its tumour, maps on it, and the datalist."""
    rows, columns = np.mgrid[-48:48, -48:48]
    image = np.where(np.hypot(rows, columns) < 40, 80.0, 0.0)[..., None].repeat(6, axis=2)
    mask = np.zeros(image.shape, np.uint8)
    mask[40:56, 30:46, 2:5] = 1
    image[mask > 0] = 160
    folder = tmp_path / "data" / "p1"
    for name, array in (("flair", image), ("seg", mask)):
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array.astype(np.float32), AFFINE), folder / f"p1_{name}.nii.gz")
    tags = mask.any(axis=(0, 1)).astype(int).tolist()
    case = {"case": "p1", "image": "p1/p1_flair.nii.gz", "label": "p1/p1_seg.nii.gz", "slice_labels": tags}
    (folder.parent / "datalist.json").write_text(json.dumps({"training": [case]}))
    return folder.parent, mask


def table(data, maps, capsys):
    where = [f"--bundle={REPO / 'bundles' / BUNDLES[0]}", f"--dataset_dir={data}", f"--maps_dir={maps}"]
    main(["labels", *where, f"--datalist={data}/datalist.json"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    return {name: (float(volume), float(slices)) for name, volume, slices in rows}


@pytest.mark.parametrize("right", [True, False])
def test_labels_are_compared_with_masks(right, data, tmp_path, capsys):
    folder, mask = data
    saliency = np.where(mask if right else np.roll(mask, 26, axis=1), 1.0, 0.0).astype(np.float32)
    (tmp_path / "maps" / "p1_flair").mkdir(parents=True)
    nib.save(nib.Nifti1Image(saliency, AFFINE), tmp_path / "maps" / "p1_flair" / "p1_flair_saliency.nii.gz")
    found = table(folder, tmp_path / "maps", capsys)
    assert len(found) == 5
    for volume, slices in found.values():
        assert (volume > 0.9 and slices > 0.9) if right else volume < 0.1
