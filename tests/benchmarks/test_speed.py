"""The speed benchmark: its transcription of the released procedure, and what it writes. Never a time."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import speed
from benchmarks.released import TAU, R, released
from benchmarks.timing import func_jvp
from custom_modules.diffusion import Diffusion
from custom_modules.methods.exact import build_cdm
from tests.helpers.tiny_network import tiny_network


@pytest.mark.parametrize("scale", [0.0, 10.0])
def test_the_released_procedure_gives_our_map_at_its_settings(scale):
    network, diffusion = tiny_network(), Diffusion()
    with torch.no_grad():
        network.denoiser.class_embedding.weight.mul_(300)  # a map well above the rounding error
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    method = build_cdm(diffusion, 300, num_steps=R, tau=TAU, guidance_scale=scale)
    expected = method(x, network, range(2))
    maps = released(network, diffusion, 300, scale)(x)
    # float32 keeps 1e-7 of values near 1, divided by 1 - tau = 0.05 and summed over 10 steps: some 1e-4
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=5e-4)
    assert expected.abs().max() > 0.01


def test_func_jvp_gives_our_exact_derivative():
    network, diffusion = tiny_network().to(memory_format=torch.contiguous_format), Diffusion()
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    method = build_cdm(diffusion, 300, num_steps=1, derivative="exact", amp=False)
    expected = method(x, network, range(2))
    torch.testing.assert_close(func_jvp(network, diffusion, 300)(x), expected, rtol=1e-3, atol=1e-5)


def test_the_quick_benchmark_writes_ratios_and_agreement(tmp_path, capsys):
    speed.main(["--quick", "--rounds", "1", "--output", str(tmp_path / "speed.json")])
    report = json.loads((tmp_path / "speed.json").read_text())
    ratios = [report[key] for key in ("speedup_default", "speedup_single_draw", "overhead_over_network")]
    assert all(ratio > 0 for ratio in ratios)
    assert report["mask_agreement"] > 0.95  # bf16 where the machine has it, else the same numbers
    assert report["compact"]["parameters"] > 1e6
    rows = {row["name"]: row for row in report["compact"]["rows"]}
    assert rows["default"]["correlation"] > 0.99 and rows["released procedure"]["network_calls"] == 20
    stages = report["seconds_per_volume"]
    assert list(stages) == ["reading", "preparing", "method", "back", "writing", "total"] and min(stages.values()) > 0
    assert report["pipeline_over_method"] == pytest.approx(stages["total"] / stages["method"])
    assert 0 < report["cpu_seconds_per_volume"]["method"] < report["cpu_seconds_per_volume"]["total"]
    assert "| default |" in capsys.readouterr().out
