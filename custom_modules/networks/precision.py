"""Mixed precision: bf16 where the hardware has it."""

from __future__ import annotations

import contextlib
import functools
import logging

import torch

logger = logging.getLogger(__name__)


def has_bf16(device: torch.device | str) -> bool:
    """Says whether the hardware computes in bf16: GPUs from Ampere on (A100, RTX 30), CPUs with AMX or AVX512-BF16.

    Older GPUs (T4, RTX 20) and CPUs emulate it, several times slower than float32, or have no kernel for it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device: torch.device | str, enabled: bool = True) -> contextlib.AbstractContextManager:
    """Opens bf16 mixed precision where the hardware has it (`has_bf16`), otherwise float32, and logs once which.

    MONAI's engines open `torch.autocast("cuda")` only. Inside, the autocast of a host has no effect.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return contextlib.nullcontext()
    if enabled and not (enabled := has_bf16(device)):
        _log_once(f"amp: float32, because this {device.type.replace('cuda', 'GPU')} has no bf16 of its own")
    elif enabled:
        _log_once(f"amp: bf16 on {device.type}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
