"""MONAI Deploy: the app of examples/deploy_app, started as its README says, against the command line's masks.

Both read the same DICOM series, drawn here; the app runs a packed bundle in an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation

from examples.phantom import head_phantom
from tests.helpers.bundles import BUNDLES, REPO, config, monai_bundle_process
from tests.helpers.series import save_series

APP = REPO / "examples" / "deploy_app"
CODES = {  # category, type and region, all of SNOMED CT
    "brats_flair": [
        ("49755003", "Morphologically Abnormal Structure"),
        ("108369006", "Neoplasm"),
        ("12738006", "Brain"),
    ],
    "chaos_kidney": [("91723000", "Anatomical Structure"), ("64033007", "Kidney"), ("818981001", "Abdomen")],
}
SERIES = ("axial", "tilted", "one_slice")


@pytest.fixture(scope="module")
def python(toolchain_env) -> Path:
    requirements = ["-c", str(REPO / "requirements.txt"), "-r", str(APP / "requirements.txt")]
    started = time.perf_counter()
    python = toolchain_env("deploy", requirements)
    megabytes = sum(file.lstat().st_size for file in python.parents[1].rglob("*")) / 1e6
    print(f"\nenvironment: {megabytes:.0f} MB, set up or found in {time.perf_counter() - started:.0f} s")
    return python


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    """A synthetic head as DICOM series, one a folder: `axial`, `tilted` (all that a scanner may do), `one_slice`."""
    folder = tmp_path_factory.mktemp("series")
    head, lesion = head_phantom(4)
    save_series(folder / "axial", np.asarray(head.dataobj), head.affine, SeriesInstanceUID="1.2.3.1")
    turned = head.as_reoriented([[1, -1], [0, 1], [2, -1]])  # rows are columns, one is reversed; slices run downwards
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", [14, -6, 8], degrees=True).as_matrix()
    affine = tilt @ turned.affine @ np.diag([1, 1.2, 1, 1])  # and pixels are not square
    anonymous = dict.fromkeys(["PatientID", "PatientName", "SeriesNumber"])
    rescaled = {"RescaleSlope": "0.37", "RescaleIntercept": "-2"}
    padded = np.asarray(turned.dataobj).copy()
    padded[..., [0, -1]] = 0  # -2 throughout: integers, as the other slices' intensities are not
    uid = {"SeriesInstanceUID": "1.2.3.2"}
    save_series(folder / "tilted", padded, affine, **uid, **anonymous, **rescaled)
    k = int(np.asarray(lesion.dataobj).sum((0, 1)).argmax())
    one = head.slicer[..., k : k + 1]
    save_series(folder / "one_slice", np.asarray(one.dataobj), one.affine, SeriesInstanceUID="1.2.3.3")
    return folder


@pytest.fixture(scope="module", params=BUNDLES)
def masks(request, series, tmp_path_factory) -> tuple[str, Path]:
    """A bundle, and what the command line makes of all the series."""
    out = tmp_path_factory.mktemp("command_line")
    where = ["--dataset_dir", series, "--output_dir", out]
    done = monai_bundle_process("run", "--config_file", config(request.param, "inference"), *where)
    assert done.returncode == 0, done.stdout
    return request.param, out


def run_app(python: Path, source: Path, out: Path, bundle: Path) -> subprocess.CompletedProcess:
    """`run.sh -i SOURCE -o OUT -m BUNDLE`, from a folder where nothing of the repository can be imported."""
    out.mkdir(parents=True)
    command = [APP / "run.sh", "-i", source, "-o", out, "-m", bundle]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHON": str(python)}
    print(f"\n$ PYTHON={python} {' '.join(map(str, command))}")
    started = time.perf_counter()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=out.parent, env=environment, encoding="utf-8", timeout=600, **streams)
    print(f"exit status {done.returncode} after {time.perf_counter() - started:.1f} s")
    return done


def volume_of(segmentation: highdicom.seg.Segmentation) -> nib.Nifti1Image:
    """Its volume in RAS; highdicom gives the indices (slice, row, column) in LPS."""
    volume = segmentation.get_volume(combine_segments=True)
    affine = np.diag([-1, -1, 1, 1]) @ volume.affine[:, [2, 1, 0, 3]]
    return nib.Nifti1Image(volume.array.T.astype(np.uint8), affine)


@pytest.mark.parametrize("name", SERIES)
def test_the_app_gives_the_mask_of_the_command_line(name, masks, series, python, packed_bundles, tmp_path):
    bundle, out = masks
    packed = packed_bundles[bundle]
    done = run_app(python, series / name, tmp_path / "out", packed)
    assert done.returncode == 0, done.stdout
    (file,) = (tmp_path / "out").iterdir()
    segmentation = highdicom.seg.segread(file)
    print(pydicom.dcmread(file).SegmentSequence[0])

    wanted = nib.as_closest_canonical(nib.load(out / name / f"{name}_mask.nii.gz"))
    got = nib.as_closest_canonical(volume_of(segmentation))
    a, b = (np.asarray(mask.dataobj) for mask in (wanted, got))
    affine = np.abs(wanted.affine - got.affine).max()
    print(f"{bundle}, {name}: {a.shape}, {a.sum()} and {b.sum()} voxels, affines differ by {affine:.1e}")
    assert np.array_equal(a, b)
    assert a.any() or name == "one_slice" or bundle == "chaos_kidney"  # of a head, which shows no kidney
    assert affine < 1e-4
    check_source(segmentation, [pydicom.dcmread(path) for path in (series / name).iterdir()])
    check_segment(segmentation, CODES[bundle], json.loads((packed / "configs" / "metadata.json").read_text()))


def check_source(segmentation: highdicom.seg.Segmentation, sources: list[pydicom.Dataset]) -> None:
    """It refers to the series that it was made of, all of its slices."""
    (reference,) = segmentation.ReferencedSeriesSequence
    assert reference.SeriesInstanceUID == sources[0].SeriesInstanceUID
    assert segmentation.StudyInstanceUID == sources[0].StudyInstanceUID
    assert segmentation.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    referenced = {item.ReferencedSOPInstanceUID for item in reference.ReferencedInstanceSequence}
    assert referenced == {source.SOPInstanceUID for source in sources}


def check_segment(segmentation: highdicom.seg.Segmentation, wanted: list[tuple[str, str]], metadata: dict) -> None:
    """It says what it shows, in SNOMED CT's codes, and which bundle found it."""
    segment = segmentation.get_segment_description(1)
    codes = [segment.segmented_property_category, segment.segmented_property_type, *segment.anatomic_regions]
    assert [(code.value, code.meaning) for code in codes] == wanted
    assert {code.scheme_designator for code in codes} == {"SCT"}
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (metadata["name"], metadata["version"])


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("a slice is missing", "slices are missing or unevenly spaced: 8.00 mm"),
        ("a second series", "the input must hold one MR series; got 2."),
        ("a second echo", "the series has 12 slices at 6 positions"),
    ],
)
def test_what_is_no_volume_is_refused(harm, why, series, python, packed_bundles, tmp_path):
    head = np.asarray(head_phantom(4)[0].dataobj)[..., :6]
    folder, affine = tmp_path / "in", np.diag([-0.9, -0.9, 4, 1])
    save_series(folder, head, affine, range(6))
    if harm == "a slice is missing":
        (folder / "3").unlink()
    elif harm == "a second series":
        save_series(folder, head, affine, range(6, 12), SeriesInstanceUID="1.2.3.9")
    else:
        save_series(folder, head, affine, range(6, 12))
    done = run_app(python, folder, tmp_path / "out", packed_bundles["brats_flair"])
    print(done.stdout.strip().splitlines()[-1])
    assert done.returncode != 0 and why in done.stdout, done.stdout
    assert not list((tmp_path / "out").iterdir())
