"""Seconds a slice of CDM and CG-CDM: the released procedure, ours, and each technique alone, side by side in one run;
and seconds a volume of the default method, by stage.

    python -m benchmarks.speed --quick --output speed.json     # compact network with its weights, under two minutes
    python -m benchmarks.speed --output speed.json             # all techniques, and the paper-size network
    ... --dataset_dir DIR --datalist LIST                      # slices of validation patients, not of a synthetic head

The rounds interleave what is compared, so that a busy machine slows all alike. Medians over the rounds, their spread,
and ratios count; seconds are this machine's. Agreement is that of the maps (correlation) and of the masks (Dice) with
the same setting computed plainly in float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from torch import nn
from tqdm import tqdm

from benchmarks.released import TAU, R, released
from benchmarks.slices import prepared_slices, read_config
from benchmarks.timing import Row, bare, clock, func_jvp, ours, peak_memory, reset_peak_memory
from benchmarks.volume import volume_line, volume_seconds
from custom_modules.files import write_json
from custom_modules.inference.inferer import SaliencyInferer
from custom_modules.inference.mask import threshold_slices
from custom_modules.inference.provenance import VERSIONS, hardware
from custom_modules.methods.exact import ExactCDM, build_cdm

RELEASED = "released procedure"
SLOW = 30.0  # seconds


class Bench:
    """The rows of one network.

    Args:
        config: `inference.yaml`, perhaps under an overlay for the network, with a device.
        settings: of the method `cdm`, by `inference.yaml` alone.
        x: slices (4 batch_size, 1, H, W) in [-1, 1].
        batch_size: slices a batch.
        trained: whether the network has its weights, without which agreement means nothing.
    """

    def __init__(
        self, config: ConfigParser, settings: dict, x: torch.Tensor, batch_size: int, trained: bool, quick: bool
    ) -> None:
        self.config, self.x, self.batch_size, self.trained = config, x, batch_size, trained
        self.network = config.get_parsed_content("network").eval()
        self.diffusion = config.get_parsed_content("diffusion").to(x.device)
        self.plain = deepcopy(self.network).to(memory_format=torch.contiguous_format)
        self.level, self.n_few = settings["noise_level"], 2 if trained else 1
        self.settings = settings
        self.rows = self._main_rows() if quick else self._main_rows() + self._technique_rows()
        self.bare = {n: Row(f"network, batch {n}", bare(self.network, n, True), 1, n) for n in self._bare_batches()}

    def _bare_batches(self) -> list[int]:
        return [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if self.batch_size // 2 <= n <= 4 * self.batch_size]

    def _released(self, name: str, network: nn.Module, scale: float = 0.0, amp: bool = False) -> Row:
        reference = RELEASED if name != RELEASED and not scale else None
        return Row(name, released(network, self.diffusion, self.level, scale, amp), 2 * R, self.n_few, reference)

    def _ours(
        self,
        name: str,
        network: nn.Module | None = None,
        batch_size: int | None = None,
        reference: str | None = None,
        **changes,
    ) -> Row:
        """The default with `changes`; one batch is timed, or a few slices where a batch is one."""
        method = build_cdm(self.diffusion, **{**self.settings, **changes})
        batch_size = batch_size or self.batch_size
        calls = method.num_draws * method.num_steps * (1 if isinstance(method, ExactCDM) else 2)
        maps = ours(network or self.network, method, batch_size)
        return Row(name, maps, calls, max(batch_size, self.n_few), reference)

    def _main_rows(self) -> list[Row]:
        rows = [self._released(RELEASED, self.plain)]
        for name, changes in {
            "default": {},
            "one draw": {"num_draws": 1},
            "exact derivative, one draw": {"num_draws": 1, "derivative": "exact"},
        }.items():
            rows.append(self._ours(name, reference=f"{name}, float32", **changes))
            rows.append(self._ours(f"{name}, float32", amp=False, **changes))
        return rows

    def _technique_rows(self) -> list[Row]:
        theirs = dict(num_steps=R, tau=TAU, num_draws=1, amp=False, reference=RELEASED)
        jvp, compiled, s = func_jvp(self.plain, self.diffusion, self.level), deepcopy(self.network), 0.3
        compiled.denoiser.compile(dynamic=False)
        return [
            self._released("channels_last alone", self.network),
            self._released("bf16 alone", self.plain, amp=True),
            self._ours("conditions in one batch alone", self.plain, 1, **theirs),
            self._ours(f"batches of {self.batch_size} slices alone", self.plain, **theirs),
            self._ours("one step of the full difference, two draws, alone", self.plain, 1, amp=False),
            Row("exact derivative by torch.func.jvp", jvp, 1, self.batch_size, "exact derivative, one draw, float32"),
            self._ours("default, torch.compile", compiled, reference="default, float32"),
            self._released("released procedure, CG-CDM", self.plain, s),
            self._ours("default, CG-CDM", reference="default, CG-CDM, float32", guidance_scale=s),
            self._ours("default, CG-CDM, float32", guidance_scale=s, amp=False),
        ]

    def run(self, rounds: int) -> dict:
        """Time every row in each round; the first round warms up and gives the maps and the peak memory.

        A row that takes longer than `SLOW` is run once: warming up does not matter there.
        """
        rows = [*self.rows, *self.bare.values()]
        seconds: dict[str, list[float]] = {row.name: [] for row in rows}
        maps, memory, warm_up = {}, {}, {}
        progress = tqdm(total=(rounds + 1) * len(rows), unit="run")
        for round_ in range(rounds + 1):
            for row in rows:
                progress.update()
                if round_ and warm_up[row.name] > SLOW:
                    continue
                progress.set_description(row.name)
                if round_ == 0:
                    reset_peak_memory(self.x.device)
                elapsed, result = clock(row.maps, self.x[: row.n_slices])
                if round_ == 0:
                    maps[row.name], memory[row.name] = result, peak_memory(self.x.device)
                    warm_up[row.name] = elapsed
                if round_ or elapsed > SLOW:
                    seconds[row.name].append(elapsed / row.n_slices)
        progress.close()
        return self._result(seconds, maps, memory, warm_up)

    def _result(self, seconds: dict, maps: dict, memory: dict, warm_up: dict) -> dict:
        median = {name: statistics.median(values) for name, values in seconds.items()}
        base = median[RELEASED]
        table = [
            {
                "name": row.name,
                "network_calls": row.calls,
                "seconds_per_slice": median[row.name],
                "spread": [min(seconds[row.name]), max(seconds[row.name])],
                "speedup": base / median[row.name],
                "seconds_of_first_run": warm_up[row.name],
                "peak_memory_mib": memory[row.name],
                **(self._agreement(row, maps) if self.trained and row.reference else {}),
            }
            for row in self.rows
        ]
        best = min(self.bare, key=lambda n: median[self.bare[n].name])
        call = median[self.bare[best].name]
        default = next(row for row in table if row["name"] == "default")
        return {
            "parameters": sum(p.numel() for p in self.network.denoiser.parameters()),
            "image_size": self.x.shape[-1],
            "batch_size": self.batch_size,
            "speedup_default": default["speedup"],
            "speedup_single_draw": next(row["speedup"] for row in table if row["name"] == "one draw"),
            "overhead_over_network": default["seconds_per_slice"] / (default["network_calls"] * call),
            "mask_agreement": default.get("mask_agreement"),
            "bare_network": {"batch": best, "seconds_per_call": call},
            "rows": table,
        }

    def _agreement(self, row: Row, maps: dict) -> dict:
        """Return correlation of the maps and Dice of the masks with those of the reference, both means over slices."""
        n = min(len(maps[row.name]), len(maps[row.reference]))
        pair = [maps[name][:n].float() for name in (row.name, row.reference)]
        flat = [m.flatten(1) - m.flatten(1).mean(dim=1, keepdim=True) for m in pair]
        correlation = nn.functional.cosine_similarity(*flat)
        masks = [self._masks(m, self.x[:n]) for m in pair]
        return {"correlation": float(correlation.mean()), "mask_agreement": float(compute_dice(*masks).nanmean())}

    def _masks(self, maps: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Turn maps (n, 1, H, W) into masks as the bundle does, on this grid and without 3D steps."""
        weigh = {key: self.config.get_parsed_content(key) for key in ("blur", "intensity_power", "erosion")}
        inferer = SaliencyInferer(lambda x_0, network, slices: maps, "all", batch_size=len(maps), **weigh)
        pred = inferer(x.movedim(0, -1)[None].cpu(), self.network)[0].as_tensor().movedim(-1, 1).numpy()
        return torch.as_tensor(threshold_slices(pred[0], pred[1] > 0.5, "otsu"))[:, None]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the compact network and the main rows only")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--dataset_dir", help="folder that the datalist's paths start from")
    parser.add_argument("--datalist", help="its validation section gives the slices; a synthetic head without it")
    parser.add_argument("--volume", type=Path, help="NIfTI file; a synthetic head of a BraTS volume's size without it")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {"hardware": hardware(device), "versions": VERSIONS, "slices": options.datalist or "synthetic head"}
    for size in ("compact",) if options.quick else ("compact", "paper"):
        report[size] = measure(size, device, options)
        print(f"\n{size} network, {hardware(device)}\n\n{markdown(report[size])}\n", flush=True)
    report |= volume_seconds(read_config(device, "inference.yaml"), options.volume, options.rounds)
    print(volume_line(report), flush=True)
    report |= {key: value for key, value in report["compact"].items() if not isinstance(value, (list, dict))}
    write_json(options.output, report)
    print(f"written to {options.output}")


def measure(size: str, device: torch.device, options: argparse.Namespace, bench=Bench, changes: dict | None = None):
    cdm, gpu = {"method": "cdm"}, device.type == "cuda"
    default, config = (read_config(device, "inference.yaml", **cdm) for _ in range(2))
    if size == "paper":
        config = read_config(device, "inference.yaml", "paper.yaml", **cdm, ckpt_path=None)
    config.update(changes or {})
    keys = ("noise_level", "num_steps", "num_draws", "tau", "derivative", "seed", "amp")
    settings = {key: default.get_parsed_content(key) for key in keys}
    batch_size = {"compact": 128 if gpu else 16, "paper": 16 if gpu else 2}[size]
    x = prepared_slices(config, options.datalist, options.dataset_dir, 4 * batch_size).to(device)
    torch.manual_seed(0)
    return bench(config, settings, x, batch_size, size == "compact", options.quick).run(options.rounds)


def markdown(result: dict) -> str:
    lines = [
        "| | calls | s / slice | spread | times as fast | first run, s | peak MiB | correlation | mask Dice |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = [row["name"], f"{row['network_calls']:g}", f"{row['seconds_per_slice']:.4f}"]
        cells += ["{:.4f}-{:.4f}".format(*row["spread"]), f"{row['speedup']:.1f}"]
        cells += [f"{row['seconds_of_first_run']:.1f}", str(row["peak_memory_mib"])]
        cells += [f"{row[key]:.4f}" if key in row else "" for key in ("correlation", "mask_agreement")]
        lines.append(f"| {' | '.join(cells)} |")
    call = result["bare_network"]
    lines += [
        "",
        f"Network alone: {call['seconds_per_call']:.4f} s a call at batch {call['batch']}; the default takes "
        f"{result['overhead_over_network']:.2f} times the cost of its calls.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
