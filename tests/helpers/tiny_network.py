"""A network of a few thousand weights, all of them random: MONAI starts some at 0, and a zero output tests nothing."""

import torch

from custom_modules.networks.classifier import NoisyImageClassifier
from custom_modules.networks.denoiser import ConditionalUNet
from custom_modules.networks.segmenter import Segmenter
from custom_modules.networks.weak_diffusion import WeakDiffusionNetwork

SIZES = {
    "in_channels": 1,
    "channels": [8, 16],
    "attention_levels": [False, True],
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 4,
}


def tiny_network(seed=0, patch_size=2, segmenter=False, **sizes):
    """Takes slices whose sides are divisible by 4 (patch_size 2 times one downsampling), the segmenter by 32."""
    sizes = {**SIZES, "patch_size": patch_size, **sizes}
    student = Segmenter(2, [8] * 6, norm_num_groups=4) if segmenter else None
    network = WeakDiffusionNetwork(ConditionalUNet(**sizes), NoisyImageClassifier(**sizes), student)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network.eval()
