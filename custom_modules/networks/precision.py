"""Mixed precision: bf16 where the hardware has it."""

from __future__ import annotations

import contextlib

import torch


def autocast(device: torch.device | str, enabled: bool = True) -> contextlib.AbstractContextManager:
    """bf16 mixed precision where the hardware has it, CUDA and CPUs with AMX or AVX512-BF16, and else float32.

    MONAI's engines open `torch.autocast("cuda")` only, so on a CPU this is ours to do. A CPU without bf16 units
    emulates it, several times slower than float32. An autocast that a host has opened ends inside.
    """
    device_type = torch.device(device).type
    if device_type == "cpu" and enabled:
        capabilities = torch.cpu.get_capabilities()
        enabled = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    if device_type not in ("cpu", "cuda"):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)
