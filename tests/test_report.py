"""Pictures: a result folder becomes a gallery, and what is missing is said."""

import json

import nibabel as nib
import numpy as np
import pytest

from custom_modules.report import main


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture
def results(tmp_path):
    """One case in BraTS layout with its label, and its result."""
    volume = np.random.default_rng(0).random((16, 12, 3)).astype(np.float32)
    mask = (volume > 0.7).astype(np.uint8)
    write(tmp_path / "data/p1/p1_flair.nii.gz", volume)
    write(tmp_path / "data/p1/p1_seg.nii.gz", mask)
    out = tmp_path / "out/p1_flair"
    write(out / "p1_flair_saliency.nii.gz", volume)
    write(out / "p1_flair_mask.nii.gz", mask)
    image = str(tmp_path / "data/p1/p1_flair.nii.gz")
    (out / "p1_flair_provenance.json").write_text(json.dumps({"case": "p1", "image": image}))
    return tmp_path / "out"


def test_gallery_is_drawn(results, tmp_path):
    main([str(results), "--output", str(tmp_path / "pictures/gallery.png")])
    assert (tmp_path / "pictures/gallery.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_case_names_those_there_are(results):
    with pytest.raises(SystemExit, match=r"no result to draw.*\['p1'\]"):
        main([str(results), "--cases", "p2"])


def test_image_that_is_gone_is_named(results, tmp_path):
    (tmp_path / "data/p1/p1_flair.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="p1_flair.nii.gz any more"):
        main([str(results)])
