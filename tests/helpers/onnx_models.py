"""Outputs of exported ONNX models beside those of the network that they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch


def outputs(folder: Path, network: torch.nn.Module, batch: int, size: int, segmenter_size: int, seed: int) -> dict:
    """{"denoiser", "classifier", "segmenter" where it has learned}: (ONNX's, PyTorch's) output for `batch` random
    slices of size x size, those of the segmenter of segmenter_size x segmenter_size."""
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(batch, 1, size, size, generator=generator), torch.randint(0, 1000, (batch,), generator=generator)
    inputs = {"x": x, "timesteps": t, "class_labels": torch.rand(batch, 2, generator=generator)}
    with torch.no_grad():
        expected = {"denoiser": network(*inputs.values()), "classifier": network.classify(x, t)}
    found = {name: (_run(folder / f"{name}.onnx", inputs), value.numpy()) for name, value in expected.items()}
    if network.distilled:
        x = torch.randn(batch, 1, segmenter_size, segmenter_size, generator=generator)
        with torch.no_grad():
            found["segmenter"] = _run(folder / "segmenter.onnx", {"x": x}), network.segmenter(x).numpy()
    return found


def _run(model: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {node.name: inputs[node.name].numpy() for node in session.get_inputs()})[0]
