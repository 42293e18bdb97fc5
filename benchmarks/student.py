"""Seconds a slice of the student, beside `cdm`, and laid out otherwise, compiled and quantised, on one thread.

    python -m benchmarks.student --output student.json [--dataset_dir DIR --datalist LIST] [--rounds 5]

Seconds are the processor's, so that a busy machine changes little. The first run holds the compilation: over 20
volumes of 139 slices a variant has to save more than that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from monai.metrics import compute_dice
from monai.networks.nets.basic_unet import UpCat
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from benchmarks.slices import prepared_slices, read_config
from custom_modules.files import write_json
from custom_modules.inference.provenance import VERSIONS, hardware
from custom_modules.methods.segmenter import probability
from custom_modules.networks.precision import autocast

BATCH, VOLUMES, SLICES = 16, 20, 139  # slices with brain of a BraTS volume
DEFAULT, PLAIN = "default (channels_last, bf16)", "contiguous, float32"


class Join(nn.Module):
    """MONAI's `UpCat` without padding; FX traces past its skip connection."""

    def __init__(self, up: UpCat) -> None:
        super().__init__()
        self.upsample, self.convs = up.upsample, up.convs

    def forward(self, x: torch.Tensor, x_e: torch.Tensor) -> torch.Tensor:
        return self.convs(torch.cat([x_e, self.upsample(x)], dim=1))


def variants(network: nn.Module, x: torch.Tensor) -> dict[str, tuple[nn.Module, bool]]:
    """Returns the student's network, in ways that give the same map or almost, and whether bf16 is on."""
    plain = deepcopy(network).to(memory_format=torch.contiguous_format)
    compiled = deepcopy(network)
    compiled.compile(dynamic=False)
    return {
        DEFAULT: (network, True),
        PLAIN: (plain, False),
        "contiguous, bf16": (plain, True),
        "channels_last, float32": (network, False),
        "default, torch.compile": (compiled, True),
        "int8 convolutions, calibrated": (quantised(plain, x), False),
    }


def quantised(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """Quantises the convolutions after training, calibrated on `x`; normalisation and activations stay float32."""
    out = deepcopy(network)
    for name, module in out.unet.named_children():
        if isinstance(module, UpCat):
            setattr(out.unet, name, Join(module))
    patches = nn.functional.pixel_unshuffle(torch.cat([x, x.flip(2)]), network.patch_size)
    observed = prepare_fx(out.unet, get_default_qconfig_mapping("x86"), (patches,))
    observed(patches)
    out.unet = convert_fx(observed)
    return out


def measure(rows: dict[str, tuple[nn.Module, bool]], x: torch.Tensor, rounds: int) -> list[dict]:
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    maps = {}
    for _ in range(rounds + 1):
        for name, (network, amp) in rows.items():
            start = time.process_time()
            maps[name] = torch.cat([probability(network, batch, amp) for batch in x.split(BATCH)])
            seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(values[1:]) / len(x) for name, values in seconds.items()}
    gain = {name: VOLUMES * SLICES * (median[DEFAULT] - m) - seconds[name][0] for name, m in median.items()}
    return [
        {
            "name": name,
            "seconds_per_slice": median[name],
            "times_as_fast": median[DEFAULT] / median[name],
            "seconds_of_first_run": seconds[name][0],
            "saved_over_20_volumes": gain[name],
            "dice": float(compute_dice(maps[name] > 0.5, maps[PLAIN] > 0.5).nanmean()),
        }
        for name in rows
    ]


def beside_cdm(options: argparse.Namespace) -> dict[str, float]:
    """Returns the least CPU seconds a slice of the student and of `cdm`, in turns, both as in `inference.yaml`."""
    jobs, seconds = {}, {}
    for method in ("segmenter", "cdm"):
        config = read_config(torch.device("cpu"), "inference.yaml", method=method)
        x = prepared_slices(config, options.datalist, options.dataset_dir, 2 * BATCH)
        jobs[method] = config.get_parsed_content("method_factory")(), config.get_parsed_content("network").eval(), x
    for _ in range(2 * options.rounds):
        for method, (maps, network, x) in jobs.items():
            with autocast(x.device, False):  # as the inferer does
                start = time.process_time()
                for batch in x.split(BATCH):
                    maps(batch, network, range(BATCH))
            seconds.setdefault(method, []).append((time.process_time() - start) / len(x))
    return {method: min(values[1:]) for method, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--dataset_dir", help="folder that the datalist's paths start from")
    parser.add_argument("--datalist", help="its validation section gives the slices; a synthetic head without it")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    config = read_config(device := torch.device("cpu"), "inference.yaml")
    x = prepared_slices(config, options.datalist, options.dataset_dir, 2 * BATCH)
    with torch.no_grad():
        pair = beside_cdm(options)
        rows = measure(variants(config.get_parsed_content("network").segmenter.eval(), x), x, options.rounds)
    print("| | CPU s / slice | times as fast | first run, s | saved over 20 volumes, s | mask Dice with float32 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print("| {} | {:.4f} | {:.2f} | {:.1f} | {:.0f} | {:.4f} |".format(*row.values()))
    print("ms / slice: student {:.2f}, cdm {:.2f}".format(*(1000 * value for value in pair.values())))
    write_json(options.output, {"hardware": hardware(device), "versions": VERSIONS, "rows": rows, "beside_cdm": pair})


if __name__ == "__main__":
    main()
