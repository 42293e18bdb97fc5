"""Exports a bundle for hosts that run no Python of ours: TorchScript and ONNX.

    python -m packing.export bundles/brats_flair [--output_dir dist/export/brats_flair]

    model.ts          the network, traced: what `python -m monai.bundle ckpt_export --use_trace True` makes. Beyond the
                      image it takes timesteps and class labels, and it has `classify`: all that the inferer calls
    segment.ts        the default method `segmenter`, whole: raw volume (1, H, W, D) in LPS -> mask and saliency
    denoiser.onnx     x (B, 1, S, S), timesteps (B,) int64, class_labels (B, 2) float32 -> eps (B, 1, S, S)
    classifier.onnx   x (B, 1, S, S), timesteps (B,) int64 -> logits (B, 2)
    segmenter.onnx    x (B, 1, Z, Z) -> logits (B, 1, Z, Z)
    export.json       what they were made from: `packing.pack` takes them only if that is the bundle it packs

All are float32. The batch is free; the slices' side S is the bundle's `image_size` (model.ts takes others, too), Z its
`segmenter_size`. The .ts files run on the device they are moved to, and hold metadata.json and inference.json as extra
files.

Any knob of `inference.yaml` may follow, such as `--ckpt_path runs/mine/models/model.pt`. The .ts files and export.json
hold the knobs as given, paths too; an export with knobs is not packed. Weights whose segmenter has not learned have no
segment.ts and no segmenter.onnx.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata
from torch import nn

from custom_modules.networks.weights import check_bundle
from packing.program import check_program
from packing.record import RECORD, describe
from packing.torchscript import SETTINGS, SegmentProgram, TracedNetwork

OPSET = 18
WRITERS_OWN = ("version", "byteorder", ".data/version", ".data/serialization_id")  # the writer adds them itself


def inference_file(bundle: str | Path) -> Path:
    """Finds the inference config in a bundle's folder, YAML or JSON.

    Raises:
        FileNotFoundError: if there is none.
    """
    files = [Path(bundle, "configs", f"inference.{ending}").resolve() for ending in ("yaml", "json")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise FileNotFoundError(f"{bundle} is no bundle's folder: {files[0]} (or .json) does not exist.")
    return found[0]


def read_bundle(bundle: str | Path, **knobs) -> ConfigParser:
    """Reads inference config and metadata of a bundle's folder, with `knobs`; makes its custom code importable."""
    file = inference_file(bundle)
    root = str(file.parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    parser = ConfigParser()
    parser.read_config(str(file))
    parser.read_meta(str(file.with_name("metadata.json")))
    parser.update({"bundle_root": root, "device": "cpu", **knobs})
    return parser


def trace(network: nn.Module, image_size: int) -> torch.jit.ScriptModule:
    """Traces a `WeakDiffusionNetwork` in eval mode to a scripted `TracedNetwork`, for any batch, size and device."""
    x, t = torch.rand(2, 1, image_size, image_size), torch.tensor([0, 1])
    inputs = {"forward": (x, t, torch.eye(2)), "classify": (x, t)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # checks of shapes; the tests vary them
        traced = torch.jit.trace_module(network, inputs, check_trace=False)
    for module in (traced.denoiser, traced.classifier):
        _follow_device(module.graph)
    return torch.jit.script(TracedNetwork(traced).eval())


def _follow_device(graph: torch.Graph) -> None:
    """Replaces the device that a trace holds as a constant (the timesteps' embedding) by the input's device."""
    tensor = list(graph.inputs())[1]  # the first is the module
    for constant in graph.findAllNodes("prim::Constant"):
        if constant.output().type().kind() == "DeviceObjType":
            device = graph.create("prim::device", [tensor])
            device.output().setType(constant.output().type())
            device.insertBefore(constant)
            constant.output().replaceAllUsesWith(device.output())


def program(parser: ConfigParser, segmenter: nn.Module) -> torch.jit.ScriptModule:
    """Builds the program of `packing.torchscript` with the bundle's settings; the config has passed `check_program`."""
    transforms = {step["_target_"]: step for step in parser.get("preprocessing")["transforms"]}
    size = parser.get("segmenter_size")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(segmenter, torch.rand(2, 1, size, size), check_trace=False)
    return torch.jit.script(
        SegmentProgram(
            traced,
            {name: parser.get_parsed_content(name) for name in SETTINGS},
            margin=transforms["CropForegroundd"]["margin"],
            batch_size=parser.get_parsed_content("batch_size"),
        ).eval()
    )


def save(module: torch.jit.ScriptModule, file: Path, metadata: Mapping, config: Mapping) -> None:
    """Writes `module` with metadata and config as extra files, and without TorchScript's records of its sources.

    Those records hold paths of the machine that exported, for error messages; nothing else needs them.
    """
    complete = file.with_name(f"complete-{file.name}")
    extra = {"inference.json": json.dumps(config).encode()}
    options = {"include_config_vals": False, "meta_values": metadata, "more_extra_files": extra}
    save_net_with_metadata(module, str(complete), **options)
    reader, writer = torch._C.PyTorchFileReader(str(complete)), torch._C.PyTorchFileWriter(str(file))
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and name not in WRITERS_OWN:
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    complete.unlink()


def write_onnx(network: nn.Module, image_size: int, segmenter_size: int, folder: Path) -> None:
    """Writes denoiser.onnx, classifier.onnx and segmenter.onnx: one file each, opset `OPSET`, dynamic batch."""
    x, t, y = torch.rand(2, 1, image_size, image_size), torch.tensor([0, 1]), torch.eye(2)
    parts = {
        "denoiser": (network, (x, t, y), ["x", "timesteps", "class_labels"], "eps"),
        "classifier": (network.classifier, (x, t), ["x", "timesteps"], "logits"),
    }
    if network.distilled:
        x = torch.rand(2, 1, segmenter_size, segmenter_size)
        parts["segmenter"] = (network.segmenter, (x,), ["x"], "logits")
    for name, (module, inputs, names, output) in parts.items():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing's, and that dynamo is the default now: ten times as slow here
            torch.onnx.export(
                module,
                inputs,
                folder / f"{name}.onnx",
                input_names=names,
                output_names=[output],
                dynamic_axes={key: {0: "batch"} for key in [*names, output]},
                opset_version=OPSET,
                dynamo=False,
            )


def export(bundle: str | Path, output_dir: str | Path | None = None, **knobs) -> Path:
    """Writes these files and export.json; returns their folder, by default `dist/export/<bundle>`.

    They are made in a folder beside it, so that an error leaves the folder as it was, and then renamed one by one,
    export.json last: a kill in between leaves old and new files, but no export.json.

    Raises:
        ValueError: if the config says something that segment.ts does not do, or a knob's value is wrong.
    """
    parser, file = read_bundle(bundle, **knobs), inference_file(bundle)
    check_program(parser)
    check_bundle([parser.get_parsed_content("ckpt_path")], file.parents[1])
    config = ConfigParser(ConfigParser.load_config_file(file))
    config.update(knobs)
    network, image_size = parser.get_parsed_content("network").float().eval(), parser.get("image_size")
    traced = trace(network, image_size)
    folder = Path(output_dir or Path("dist", "export", Path(bundle).resolve().name))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        aside = Path(partial)
        modules = {"model.ts": traced}
        if network.distilled:
            modules["segment.ts"] = program(parser, network.segmenter)
        for name, module in modules.items():
            save(module, aside / name, parser.get("_meta_"), config.get())
        write_onnx(network, image_size, parser.get("segmenter_size"), aside)
        made = sorted(path.name for path in aside.iterdir())
        record = describe(aside, file, Path(parser.get_parsed_content("ckpt_path")), knobs)
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (folder / RECORD).unlink(missing_ok=True)
        for name in (*made, RECORD):
            (aside / name).replace(folder / name)
    return folder


def read_knobs(words: Sequence[str], config: Mapping) -> dict:
    """Reads pairs `--knob value` of ids that `config` has.

    Raises:
        ValueError: if a word is not a pair's, or there is no such knob.
    """
    from custom_modules.knobs import find_knob

    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ValueError(f"expected pairs of --knob value; got {' '.join(words)}.")
    for name in words[::2]:
        if problem := find_knob(name[2:], config):
            raise ValueError(problem)
    return {name[2:]: yaml.safe_load(value) for name, value in zip(words[::2], words[1::2])}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m packing.export", description="Export a bundle: TorchScript, ONNX.")
    parser.add_argument("bundle", type=Path, help="folder of a bundle, of this repository or packed")
    parser.add_argument("--output_dir", type=Path, help="default: dist/export/<bundle>")
    options, rest = parser.parse_known_args(argv)
    try:
        knobs = read_knobs(rest, read_bundle(options.bundle).get())
        folder = export(options.bundle, options.output_dir, **knobs)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error.__cause__ or error)) from error  # MONAI wraps what a component raises
    for file in sorted(folder.glob("*.ts")) + sorted(folder.glob("*.onnx")):
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
