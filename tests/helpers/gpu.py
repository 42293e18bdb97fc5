"""Every method on a tiny network whose three parts have random weights, for tests on a GPU and on a simulated one."""

from __future__ import annotations

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cam import VARIANTS, ClassActivationMap
from custom_modules.methods.cg_diff import CGDiff
from custom_modules.methods.exact import build_cdm
from custom_modules.methods.intensity import IntensityFloor
from custom_modules.methods.segmenter import Student
from tests.helpers.tiny_network import tiny_network

CDM = {"noise_level": 20, "num_steps": 2, "num_draws": 2, "tau": 0.0}
METHODS = ("cdm", "cg_cdm", "exact", "exact_cg_cdm", "cg_diff", *VARIANTS, "segmenter", "intensity")


def distilled_network():
    network = tiny_network(segmenter=True)
    network.distilled.fill_(1)
    return network


def build_method(name: str, amp: bool = True, diffusion: Diffusion | None = None):
    diffusion = diffusion or Diffusion()
    if name in ("cdm", "cg_cdm", "exact", "exact_cg_cdm"):
        derivative = "exact" if name.startswith("exact") else "finite_difference"
        scale = 1.0 if name.endswith("cg_cdm") else 0.0
        return build_cdm(diffusion, **CDM, guidance_scale=scale, derivative=derivative, amp=amp)
    if name == "cg_diff":
        return CGDiff(diffusion, noise_level=20, guidance_scale=10.0, stride=10, amp=amp)
    if name in VARIANTS:
        return ClassActivationMap(name, "classifier.down_blocks.1")
    return Student(amp) if name == "segmenter" else IntensityFloor()
