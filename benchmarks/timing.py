"""What is timed, rows of maps of slices, and how: seconds and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import CDM, slice_noise
from custom_modules.networks.precision import autocast

Maps = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Row:
    """One setting that is timed: `maps` turns slices (n, 1, H, W) into maps of the same shape."""

    name: str
    maps: Maps
    calls: float  # network calls a slice, conditions counted
    n_slices: int  # timed at once
    reference: str | None = None  # the row whose maps these should equal


def ours(network: nn.Module, method: CDM, batch_size: int) -> Maps:
    """Return CDM or CG-CDM in batches."""

    def maps(x: torch.Tensor) -> torch.Tensor:
        batches = zip(x.split(batch_size), torch.arange(len(x)).split(batch_size), strict=True)
        return torch.cat([method(batch, network, indices.tolist()) for batch, indices in batches])

    return maps


def func_jvp(network: nn.Module, diffusion: Diffusion, noise_level: int) -> Maps:
    """Return one exact derivative step by `torch.func.jvp`, which needs contiguous tensors and unfused attention."""

    def maps(x: torch.Tensor) -> torch.Tensor:
        t = torch.full((len(x),), noise_level, device=x.device)
        x_t = diffusion.add_noise(x, slice_noise(x, 0, 0, range(len(x))), t)
        y, dy = (torch.tensor([v], device=x.device).repeat(len(x), 1) for v in ([0.0, 1.0], [-1.0, 1.0]))
        with torch.no_grad(), autocast(x.device, False), sdpa_kernel(SDPBackend.MATH):
            _, d_eps = torch.func.jvp(lambda condition: network(x_t, t, condition), (y,), (dy,))
        return diffusion.ddim_step(torch.zeros_like(x), d_eps, t)

    return maps


def bare(network: nn.Module, batch_size: int, amp: bool) -> Maps:
    """Return forward passes only, one for each row of x."""

    def maps(x: torch.Tensor) -> torch.Tensor:
        y = torch.ones(len(x), dtype=torch.long, device=x.device)
        with torch.no_grad(), autocast(x.device, amp):
            return torch.cat([network(b, 200 * c, c) for b, c in zip(x.split(batch_size), y.split(batch_size))])

    return maps


def clock(function: Maps, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the seconds of `function(x)`, and its result on the CPU."""
    synchronize = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = function(x)
    synchronize()
    return time.perf_counter() - start, result.cpu()


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak memory again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak in MiB since the reset: allocated on a GPU, resident of the process on Linux, else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)
