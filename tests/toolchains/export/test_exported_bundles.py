"""The bundles as shipped, exported by the command: against the command line, in onnxruntime, and in a C++ program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from examples.phantom import head_phantom
from packing.export import read_bundle
from tests.helpers.bundles import BUNDLES, REPO
from tests.helpers.onnx_models import outputs

KNOBS = {"brats_flair": [], "chaos_kidney": ["--threshold", "0.001"]}  # there is no kidney in a head
SEED = 2


def run(*command, cwd: Path) -> str:
    """The command's output; an error with all that it said where it failed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, encoding="utf-8", **streams)
    print(f"$ {' '.join(map(str, command))}\n{done.stdout}")
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module", params=BUNDLES)
def exported(request, packed_bundles, tmp_path_factory) -> SimpleNamespace:
    """What the command writes for a bundle of this repository and for the packed one."""
    out, bundle = tmp_path_factory.mktemp("export"), request.param
    sources = {"repository": f"bundles/{bundle}", "packed": packed_bundles[bundle]}
    for name, source in sources.items():
        run(sys.executable, "-m", "packing.export", source, "--output_dir", out / name, *KNOBS[bundle], cwd=REPO)
    network = read_bundle(REPO / "bundles" / bundle).get_parsed_content("network").eval()
    return SimpleNamespace(bundle=bundle, folder=out / "repository", packed=out / "packed", network=network)


@pytest.fixture(scope="module")
def segmented(exported, tmp_path_factory) -> SimpleNamespace:
    """A synthetic head in LPS, its masks by the command line in float32 and as it comes, and the program's."""
    folder = tmp_path_factory.mktemp("segmented")
    image = head_phantom(4)[0]
    image = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt("LPS")))
    nib.save(image, folder / "head.nii.gz")
    masks, config = {}, f"bundles/{exported.bundle}/configs/inference.yaml"
    for amp in ("False", "True"):
        where = ["--dataset_dir", folder / "head.nii.gz", "--output_dir", folder / amp]
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, *where, "--device", "cpu"]
        run(*command, "--amp", amp, *KNOBS[exported.bundle], cwd=REPO)
        masks[amp] = np.asarray(nib.load(folder / amp / "head" / "head_mask.nii.gz").dataobj)
    volume = torch.as_tensor(image.get_fdata(dtype=np.float32))[None]
    for name, source in (("program", exported.folder), ("packed", exported.packed)):
        masks[name] = torch.jit.load(source / "segment.ts")(volume)[0][0].numpy()
    return SimpleNamespace(volume=volume, **masks, bfloat=masks["True"], float=masks["False"])


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * int(np.count_nonzero(a & b)) / int(np.count_nonzero(a) + np.count_nonzero(b))


def test_the_program_gives_the_command_lines_mask(segmented):
    assert np.count_nonzero(segmented.float) > 100
    found = {name: dice(segmented.program, getattr(segmented, name)) for name in ("float", "bfloat", "packed")}
    print(f"Dice of segment.ts with the command line's mask: {found}")
    assert found["float"] > 0.999 and found["bfloat"] > 0.98 and found["packed"] == 1


def test_a_cpp_program_gives_the_same_mask(segmented, exported, tmp_path):
    compiler = shutil.which("g++")
    assert compiler, "g++ is missing; install it (on Debian and Ubuntu: apt-get install g++)"
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    source = Path(__file__).with_name("segment.cpp")
    run(compiler, "-std=c++20", "-O1", abi, *include, source, "-o", "segment", *link, cwd=tmp_path)
    segmented.volume.numpy().tofile(tmp_path / "head.f32")
    shape = segmented.volume.shape[1:]
    run("./segment", exported.folder / "segment.ts", "head.f32", *shape, "mask.u8", cwd=tmp_path)
    assert np.array_equal(np.fromfile(tmp_path / "mask.u8", np.uint8).reshape(shape), segmented.program)


@pytest.mark.parametrize("root", [True, False], ids=["from the bundle", "from the repository"])
def test_monais_own_export_makes_the_same_network(exported, root, tmp_path):
    bundle = REPO / "bundles" / exported.bundle
    where = ["--config_file", "configs/inference.yaml"]
    if not root:
        where = ["--config_file", f"bundles/{exported.bundle}/configs/inference.yaml"]
        where += ["--bundle_root", f"bundles/{exported.bundle}"]
    command = [sys.executable, "-m", "monai.bundle", "ckpt_export", "--use_trace", "True", *where]
    run(*command, "--filepath", tmp_path / "model.ts", cwd=bundle if root else REPO)
    theirs, ours = (torch.jit.load(folder / "model.ts") for folder in (tmp_path, exported.folder))
    for shape in ((1, 1, 64, 64, 1), (2, 1, 64, 64, 3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        with torch.no_grad():
            torch.testing.assert_close(theirs(x), exported.network(x), rtol=0, atol=1e-5)
            torch.testing.assert_close(ours(x), exported.network(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5])
def test_onnxruntime_gives_the_networks_outputs(exported, batch):
    compared = outputs(exported.folder, exported.network, batch, 64, 128, SEED)
    assert set(compared) == {"denoiser", "classifier", "segmenter"}
    for name, (found, expected) in compared.items():
        print(f"{name}.onnx, batch {batch}: largest difference {np.abs(found - expected).max():.1e}")
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())  # float32, summed anew
