"""Weakly supervised 3D MR segmentation with conditional diffusion models (Hu et al., MICCAI 2023)."""

__version__ = "0.2.0"
