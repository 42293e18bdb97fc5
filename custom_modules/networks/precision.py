"""Mixed precision: bf16 where the hardware has it."""

from __future__ import annotations

import contextlib

import torch


def autocast(device: torch.device | str, enabled: bool = True) -> contextlib.AbstractContextManager:
    """Opens bf16 mixed precision where the hardware has it (CUDA, CPUs with AMX or AVX512-BF16), otherwise float32.

    MONAI's engines open `torch.autocast("cuda")` only. A CPU without bf16 units emulates bf16, several times slower
    than float32. Inside, the autocast of a host has no effect.
    """
    device_type = torch.device(device).type
    if device_type == "cpu" and enabled:
        capabilities = torch.cpu.get_capabilities()
        enabled = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    if device_type not in ("cpu", "cuda"):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)
