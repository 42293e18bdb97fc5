"""One module for all that inference needs: denoiser, classifier of noised slices, and segmenter.

CDM (Hu et al., MICCAI 2023, arXiv 2306.03878) needs the noise prediction f(x_t, t, y) for a condition y and for a
mixture of conditions, CG-CDM also the gradient of log p(y | x_t) of a classifier that was trained on noised slices. The
segmenter learns from the maps and then needs no diffusion.
"""

from __future__ import annotations

import torch
from torch import nn

from custom_modules.networks.classifier import NoisyImageClassifier
from custom_modules.networks.denoiser import ConditionalUNet
from custom_modules.networks.normalisation import choose_layout
from custom_modules.networks.segmenter import Segmenter


class WeakDiffusionNetwork(nn.Module):
    """Holds denoiser, classifier and segmenter: one checkpoint, one thing to load.

    The first two are trained together from slice tags, the segmenter afterwards from their maps (`run distill`). Until
    then `distilled` is 0, and a checkpoint without a segmenter loads, too.

    Args:
        denoiser: f(x_t, t, y).
        classifier: p(y | x_t).
        segmenter: learns from the maps; None for a network without one.

    Forward (the denoiser): `x` (B, C, H, W), or a volume (B, C, H, W, D) whose depth is folded into the batch;
    `timesteps` (B,) int, default 0; `class_labels` (B,) int or (B, 2) float, default y1. Returns the predicted noise,
    same shape as `x`. Export and `verify_net_in_out` call it with the image alone.
    """

    def __init__(
        self, denoiser: ConditionalUNet, classifier: NoisyImageClassifier, segmenter: Segmenter | None = None
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.classifier = classifier
        self.segmenter = segmenter
        self.register_buffer("distilled", torch.zeros((), dtype=torch.long))  # 1: the segmenter has learned
        choose_layout(self)
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x.ndim == 5:
            depth = x.shape[-1]
            slices = x.movedim(-1, 1).flatten(0, 1)
            per_slice = [v if v is None else v.repeat_interleave(depth, 0) for v in (timesteps, class_labels)]
            return self(slices, *per_slice).unflatten(0, (-1, depth)).movedim(1, -1)
        if timesteps is None:
            timesteps = x.new_zeros(x.shape[0], dtype=torch.long)
        if class_labels is None:
            class_labels = x.new_ones(x.shape[0], dtype=torch.long)
        return self.denoiser(x, timesteps, class_labels=class_labels)

    def classify(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, 2) of the classifier for slices `x` (B, C, H, W) float noised to `timesteps` (B,) int."""
        return self.classifier(x, timesteps)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # MONAI Label loads non-strictly, and a network with random weights must not pass as trained.
        own = self.state_dict(prefix=prefix)
        if not any(name.startswith(f"{prefix}segmenter.") for name in state_dict):  # not distilled yet, or of 0.3.0
            state_dict |= {name: own[name] for name in own if name.startswith(f"{prefix}segmenter.")}
            state_dict[f"{prefix}distilled"] = torch.zeros((), dtype=torch.long)
        if absent := own.keys() - state_dict.keys():
            errors.append(
                f"the checkpoint lacks {len(absent)} of the network's {len(own)} tensors, such as {sorted(absent)[0]}: "
                "was it trained with another network_def?"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
