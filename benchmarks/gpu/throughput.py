"""Iterations a second of a training as its config runs it, beside forward and backward passes of its network alone."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from torch import nn

from benchmarks.timing import peak_memory, reset_peak_memory
from custom_modules.networks.precision import autocast

CONFIGS = Path(__file__).parents[2] / "bundles" / "brats_flair" / "configs"
WARM_UP = 0.4  # share of the iterations that is not timed: workers start, kernels are chosen


def throughput(overlays: str, folder: Path, device: torch.device, batch_size: int, iterations: int) -> dict:
    """Train for one epoch on the phantoms in `folder`, and time it, and then the bare network on one of its batches.

    Args:
        overlays: config files, joined by "+".
        iterations: of the epoch.
    """
    config = ConfigParser()
    config.read_config([str(CONFIGS / f"{name}.yaml") for name in overlays.split("+")])
    out = folder / f"{overlays}_{batch_size}"
    where = {"dataset_dir": str(folder / "data"), "output_dir": str(out), "cache_dir": str(folder / "cache")}
    config.update({"bundle_root": str(CONFIGS.parent), "device": device, **where})
    config.update({"batch_size": batch_size, "segmenter_batch_size": batch_size, "epoch_length": iterations})
    config.update({"max_epochs": 1, "segmenter_epochs": 1})
    trainer = config.get_parsed_content("train#trainer")
    clock = Clock(int(WARM_UP * iterations), device)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, clock)
    reset_peak_memory(device)
    trainer.run()
    trained = (clock.last - clock.first) / (iterations - clock.warm_up)
    memory = peak_memory(device)
    step, amp = config.get_parsed_content("training_step"), config.get_parsed_content("amp")
    batch = next(iter(config.get_parsed_content("train#dataloader")))
    bare = bare_seconds(step.network, batch["image"].to(device).float(), amp, iterations)
    return {
        "config": overlays,
        "batch_size": batch_size,
        "image_size": batch["image"].shape[-1],
        "iterations_per_second": 1 / trained,
        "bare_iterations_per_second": 1 / bare,
        "fraction_of_bare": bare / trained,
        "slices_per_second": batch_size / trained,
        "peak_memory_mib": memory,
    }


class Clock:
    """Takes the time after a number of iterations, `warm_up`, and after every later one; it waits for the GPU twice."""

    def __init__(self, warm_up: int, device: torch.device) -> None:
        self.warm_up, self.device, self.first, self.last = warm_up, device, 0.0, 0.0

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration == self.warm_up:
            self.first = now(self.device)
        elif engine.state.iteration == engine.state.epoch_length:
            self.last = now(self.device)


def now(device: torch.device) -> float:
    """Return the time in seconds once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bare_seconds(network: nn.Module, x: torch.Tensor, amp: bool, iterations: int) -> float:
    """Time forward and backward passes of the parts that learn, eager and on one batch `x` (B, 1, H, W) float32."""
    network.train()
    t, y = (torch.full((len(x),), value, device=x.device) for value in (200, 1))

    def iteration() -> None:
        network.zero_grad(set_to_none=True)
        with autocast(x.device, amp):
            outputs = [network(x, t, y), network.classify(x, t)] if hasattr(network, "classify") else [network(x)]
        sum(output.float().mean() for output in outputs).backward()

    for _ in range(max(iterations // 3, 1)):
        iteration()
    start = now(x.device)
    for _ in range(iterations):
        iteration()
    return (now(x.device) - start) / iterations
