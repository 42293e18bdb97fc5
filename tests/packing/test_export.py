"""Export: the TorchScript programs and the ONNX graphs say the same as the Python they come from."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
from monai.data import load_net_with_metadata

from custom_modules.diffusion import Diffusion
from custom_modules.inference.inferer import FACTS, SaliencyInferer
from custom_modules.methods.cdm import CDM
from packing import export, record
from tests.helpers.bundles import REPO, TINY, config, head, monai_bundle, save_nifti
from tests.helpers.onnx_models import outputs

KNOBS = [knob for knob in TINY if not knob.startswith(("--device", "--logging_file"))]
KNOBS += [f"--network_def#{part}#norm_num_groups=4" for part in ("denoiser", "classifier")]  # else no y gets through
KNOBS += ["--segmenter_size=64"]
KNOBS += ["--noise_level=[20,300]", "--erosion=1"]
SEED = 3
ONNX = ("denoiser", "classifier", "segmenter")


@pytest.fixture(scope="module", params=["chaos_kidney"])
def exported(request, tmp_path_factory) -> SimpleNamespace:
    """A bundle with a tiny network of random weights, exported by the command, and that network in Python."""
    folder = tmp_path_factory.mktemp("export")
    weights = ["--ckpt_path", str(folder / "model.pt")]
    given = export.read_knobs([*KNOBS, *weights], export.read_bundle(REPO / "bundles" / request.param).get())
    parser = export.read_bundle(REPO / "bundles" / request.param, **given)
    network, generator = parser.get_parsed_content("network_def").eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    network.distilled.fill_(1)
    torch.save(network.state_dict(), folder / "model.pt")
    export.main([str(REPO / "bundles" / request.param), "--output_dir", str(folder / "out"), *KNOBS, *weights])
    return SimpleNamespace(bundle=request.param, folder=folder / "out", network=network, knobs=[*KNOBS, *weights])


def test_only_whole_files_are_there(exported):
    names = {path.name for path in exported.folder.iterdir()}
    assert names == {*("model.ts", "segment.ts", "export.json"), *(f"{name}.onnx" for name in ONNX)}


def test_the_record_says_what_the_files_were_made_from(exported):
    bundle, folder = REPO / "bundles" / exported.bundle, exported.folder
    said = json.loads((folder / "export.json").read_text())
    sources = [bundle / "configs" / "inference.yaml", bundle / "configs" / "metadata.json", folder.parent / "model.pt"]
    assert sorted(said["from"].values()) == sorted(sha256(path.read_bytes()).hexdigest() for path in sources)
    made = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix != ".json"}
    assert said["made"] == made and said["version"] == json.loads(sources[1].read_text())["version"]
    assert said["knobs"]["noise_level"] == [20, 300] and said["knobs"]["ckpt_path"] == str(sources[2])
    with pytest.raises(ValueError, match="made with .*--ckpt_path; models/model.pt was another file. Export"):
        record.check(folder, bundle)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (5, 1, 16, 32), (2, 1, 32, 32, 3)])
def test_the_trace_equals_the_network_for_any_batch_and_size(exported, shape):
    model, generator = torch.jit.load(exported.folder / "model.ts"), torch.Generator().manual_seed(SEED)
    x, t = torch.randn(shape, generator=generator), torch.randint(0, 1000, shape[:1], generator=generator)
    soft = torch.rand(shape[0], 2, generator=generator)
    calls = [(x,), (x, t), (x, t, torch.arange(shape[0]) % 2), (x, t, soft)]
    with torch.no_grad():
        results = [(model(*call), exported.network(*call)) for call in calls]
        if x.ndim == 4:
            results.append((model.classify(x, t), exported.network.classify(x, t)))
    for found, expected in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (results[1][0] - results[0][0]).abs().max() > 1e-3 < (results[3][0] - results[2][0]).abs().max()


def test_the_programs_are_tied_to_no_device(exported):
    for name in ("model", "segment"):
        modules = torch.jit.load(exported.folder / f"{name}.ts").modules()
        assert not [m for m in modules if hasattr(m, "code") and "torch.device(" in m.code]


def test_the_bundles_inferer_runs_the_trace(exported):
    """Guidance differentiates the classifier: a host that loads model.ts instead of the network has every method."""
    x = torch.as_tensor(head()[0])[None, None, :32, :32] / 100 - 1
    method = CDM(Diffusion(), 20, num_steps=1, guidance_scale=5.0, amp=False)
    inferer = SaliencyInferer(method, gate="classifier", gate_threshold=0.4, amp=False)
    found, expected = inferer(x, torch.jit.load(exported.folder / "model.ts")), inferer(x, exported.network)
    assert expected.meta[FACTS]["n_slices"].all() and expected[:, :1].abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def segmented(exported, tmp_path_factory):
    """Image, mask and saliency (H, W, D) of the command line for one head, and the program's mask and saliency."""
    folder = tmp_path_factory.mktemp("segmented")
    image = head()[0] + np.random.default_rng(0).normal(0, 3, head()[0].shape).astype(np.float32)
    save_nifti(image, folder / "p0.nii.gz")
    where = ["--dataset_dir", folder / "p0.nii.gz", "--output_dir", folder / "out", f"--seed={SEED}"]
    more = ["--amp=False", "--device=cpu", "--logging_file=False"]
    monai_bundle("run", "--config_file", config(exported.bundle, "inference"), *where, *more, *exported.knobs)
    expected = [nib.load(folder / "out" / "p0" / f"p0_{name}.nii.gz") for name in ("mask", "saliency")]
    mask, saliency = torch.jit.load(exported.folder / "segment.ts")(torch.as_tensor(image)[None])
    return image, *(np.asarray(volume.dataobj) for volume in expected), mask[0].numpy(), saliency[0].numpy()


def test_the_program_gives_the_command_lines_mask(segmented):
    image, mask, saliency, found_mask, found_saliency = segmented
    assert found_mask.shape == image.shape and found_mask.dtype == np.uint8
    assert mask.any() and not mask.all()
    np.testing.assert_allclose(found_saliency, saliency, rtol=0, atol=1e-4)  # probabilities
    assert saliency.max() > 0.5 and 2 * np.sum(found_mask & mask) / (found_mask.sum() + mask.sum()) > 0.99


def test_the_program_repeats_itself_and_draws_nothing(segmented, exported):
    program, image = torch.jit.load(exported.folder / "segment.ts"), torch.as_tensor(segmented[0])[None]
    state = torch.get_rng_state()
    first, again = program(image)[1], program(image)[1]
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state) and not first.requires_grad


def test_the_program_takes_a_single_slice(segmented, exported):
    image = torch.as_tensor(segmented[0])[None, ..., 2:3]
    mask, saliency = torch.jit.load(exported.folder / "segment.ts")(image)
    assert mask.shape == saliency.shape == image.shape and mask.any() and not mask.all()


def test_the_program_needs_torch_alone(segmented, exported, tmp_path):
    torch.save(torch.as_tensor(segmented[0])[None], tmp_path / "volume.pt")
    code = (
        "import sys\nfor name in ('monai', 'custom_modules', 'packing', 'scipy', 'skimage', 'einops'):\n"
        "    sys.modules[name] = None\n"
        "import torch\ntorch.set_num_threads(1)\n"
        f"mask, _ = torch.jit.load({str(exported.folder / 'segment.ts')!r})(torch.load('volume.pt'))\n"
        "torch.save(mask, 'mask.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert np.array_equal(torch.load(tmp_path / "mask.pt")[0].numpy(), segmented[3])


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (torch.zeros(4, 4, 4), r"volume must be \(1, H, W, D\)"),
        (torch.full((1, 8, 8, 2), 7.0), "constant"),
        (torch.full((1, 8, 8, 2), torch.nan), "NaN"),
        (torch.eye(8)[None, :, :, None], "no body"),
    ],
)
def test_the_program_says_what_is_wrong(exported, volume, message):
    with pytest.raises(torch.jit.Error, match=message):
        torch.jit.load(exported.folder / "segment.ts")(volume)


def test_the_programs_do_not_tell_where_they_were_made(exported):
    for name in ("model", "segment"):
        reader = torch._C.PyTorchFileReader(str(exported.folder / f"{name}.ts"))
        records = {record: reader.get_record(record) for record in reader.get_all_records()}
        assert "extra/metadata.json" in records
        assert not [record for record, content in records.items() if str(REPO).encode() in content]


def test_the_programs_hold_metadata_and_config(exported):
    for name in ("model", "segment"):
        _, metadata, extra = load_net_with_metadata(
            str(exported.folder / f"{name}.ts"), more_extra_files=["inference.json"]
        )
        expected = json.loads((REPO / "bundles" / exported.bundle / "configs" / "metadata.json").read_text())
        assert metadata == expected
        inference = json.loads(extra["inference.json"])
        assert inference["noise_level"] == [20, 300] and inference["bundle_root"].startswith("$")


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_equals_the_network(exported, batch):
    compared = outputs(exported.folder, exported.network, batch, 32, 64, SEED)
    assert set(compared) == set(ONNX)
    for name, (found, expected) in compared.items():
        graph = onnx.load(exported.folder / f"{name}.onnx")
        onnx.checker.check_model(graph, full_check=True)
        assert [opset.version for opset in graph.opset_import] == [export.OPSET]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
