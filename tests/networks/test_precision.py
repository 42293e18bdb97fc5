"""Mixed precision: bf16 where the hardware computes in it, and a line in the log that says which it is."""

import pytest
import torch

from custom_modules.networks import precision
from custom_modules.networks.precision import autocast


@pytest.mark.parametrize(("native", "says"), [(True, "amp: bf16 on cuda"), (False, "this GPU has no bf16 of its own")])
def test_bf16_only_where_the_gpu_has_it(monkeypatch, caplog, native, says):
    """A T4 (compute capability 7.5) says that it supports bf16, since it emulates it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype, enabled: (device_type, dtype, enabled))
    precision._log_once.cache_clear()
    caplog.set_level("INFO")
    for _ in range(2):
        assert autocast(torch.device("cuda", 1)) == ("cuda", torch.bfloat16, native)
    assert autocast("cuda", enabled=False) == ("cuda", torch.bfloat16, False)
    assert caplog.text.count(says) == caplog.text.count("amp:") == 1


@pytest.mark.parametrize(("units", "dtype"), [({"amx_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_bf16_only_where_the_cpu_has_it(monkeypatch, units, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    x = torch.ones(2, 2)
    with autocast("cpu"):
        assert (x @ x).dtype == dtype
    with autocast("cpu", enabled=False):
        assert (x @ x).dtype == torch.float32
