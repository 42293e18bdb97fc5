"""One run over a folder of three good volumes and many odd and broken ones: what can be right is, all else is named.

The method is `intensity`, and the lesion is brightest, so that a right mask is the lesion.
"""

from __future__ import annotations

import itertools
import os
import re
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from custom_modules.files import flat_name, printable, stem_of
from tests.helpers.bundles import LPS, TINY, config, save_nifti
from tests.helpers.processes import forked_bundle
from tests.odd.files import BAD_FILES, HEAD, LESION, ODD_FILES, RAW, bright
from tests.odd.series import BAD_FOLDERS, BAD_SERIES, ODD_SERIES, save_odd_series

ORIENTATIONS = [
    "".join(codes) for axes in itertools.permutations(("LR", "PA", "SI")) for codes in itertools.product(*axes)
]


def turn(codes: str, others: str) -> np.ndarray:
    orientations = [nib.orientations.axcodes2ornt(c) for c in (codes, others)]
    return nib.orientations.ornt_transform(*orientations)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """The one run: its folders, exit code and output, and the report at its end, {case: line}."""
    root = tmp_path_factory.mktemp("odd")
    data, out = root / "in", root / "out"
    for seed in range(3):
        save_nifti(bright(seed)[0], data / f"good{seed}.nii.gz")
    for name, content in ({n: c for n, (c, _) in BAD_FILES.items()} | ODD_FILES).items():
        (data / name).write_bytes(content)
    for codes in ORIENTATIONS:
        nib.save(nib.Nifti1Image(HEAD, LPS).as_reoriented(turn("LPS", codes)), data / f"{codes}.nii")
    save_odd_series(data)
    (data / "loop").symlink_to(data)
    (data / "good0" / "up").mkdir(parents=True)
    (data / "good0" / "up" / "again.nii.gz").symlink_to(data / "good0.nii.gz")
    (data / "nowhere.nii.gz").symlink_to(root / "nowhere.nii.gz")
    (data / "pair.img").write_bytes(RAW[352:])
    os.mkfifo(data / "pipe.nii")
    (data / "pages").mkdir()
    (data / "pages" / "1.dcm").write_bytes(b"<html>")
    (data / "series.zip").write_bytes(b"PK")
    quick = [word for word in TINY if "image_size" not in word] + [
        "--image_size=48",
        "--gate=all",
        "--method=intensity",
    ]
    quick += ["--blur=0", "--erosion=1", "--smoothing=0", "--threshold=1.45", "--ckpt_path=$None"]
    where = ["--dataset_dir", data, "--output_dir", out]
    process = forked_bundle("run", "--config_file", config("brats_flair", "inference"), *where, *quick)
    lines = re.findall("^  (.*?): (.*)$", process.stdout.rpartition("cases failed:\n")[2], re.MULTILINE)
    return SimpleNamespace(data=data, out=out, code=process.returncode, report=dict(lines), text=process.stdout)


def result(run, name: str, kind: str = "mask") -> nib.Nifti1Image:
    """The mask or the map of a case, turned to the order in which `HEAD` is stored."""
    image = nib.load(run.out / name / f"{name}_{kind}.nii.gz")
    return image.as_reoriented(turn("".join(nib.aff2axcodes(image.affine)), "LPS"))


def dice(run, name: str, lesion: np.ndarray) -> float:
    mask = np.asarray(nib.load(run.out / name / f"{name}_mask.nii.gz").dataobj)
    return 2 * (mask & lesion).sum() / (mask.sum() + lesion.sum())


def test_every_good_volume_is_finished_and_right(run):
    assert all(dice(run, f"good{seed}", bright(seed)[1]) > 0.9 for seed in range(3)), "the rim of a lesion may differ"


def test_every_odd_one_that_can_be_read_is_right(run):
    names = [*map(flat_name, map(stem_of, ODD_FILES)), *ODD_SERIES, "frames"]
    found = {name: round(dice(run, name, LESION), 3) for name in names}
    assert min(found.values()) > 0.95, found
    done = sorted(path.name for path in run.out.iterdir() if path.is_dir())
    assert done == sorted([*names, *ORIENTATIONS, "good0", "good1", "good2"])


def test_48_orientations_give_one_mask(run):
    assert len(set(ORIENTATIONS)) == 48
    mask, saliency = (np.asarray(result(run, "good0", kind).dataobj) for kind in ("mask", "saliency"))
    for codes in ORIENTATIONS:
        assert nib.aff2axcodes(nib.load(run.out / codes / f"{codes}_mask.nii.gz").affine) == tuple(codes)
        assert np.array_equal(result(run, codes).dataobj, mask), codes
        np.testing.assert_allclose(result(run, codes, "saliency").dataobj, saliency, atol=1e-5, err_msg=codes)


def test_every_bad_one_is_named_with_what_is_wrong_and_a_remedy(run):
    bad = {printable(stem_of(name)): why for name, (_, why) in (BAD_FILES | BAD_SERIES).items()} | BAD_FOLDERS
    assert len(bad) + len(ODD_FILES) + len(ODD_SERIES) > 60 and run.code != 0
    wrong = {name: run.report.get(name) for name, why in bad.items() if not re.search(why, run.report.get(name, ""))}
    assert not wrong, run.text
    done = sum(path.is_dir() for path in run.out.iterdir())
    assert f"{len(bad)} of {len(bad) + done} cases failed" in run.text  # links are no cases
    (unread,) = re.findall("not read: (.*); give each as a NIfTI file", run.text)
    assert sorted(path.rpartition("/")[2] for path in unread.split(", ")) == [
        *("1.dcm", "nowhere.nii.gz", "pair.img", "pipe.nii", "series.zip")
    ]
    assert sorted(path.name for path in run.data.parent.iterdir()) == ["in", "out"]
