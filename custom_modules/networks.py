"""Networks: a class-conditional denoiser, a classifier of noised slices, a segmenter, and one module that holds them.

The method needs the noise prediction f(x_t, t, y) for an integer condition y and for a mixture of conditions
(tau y1 + (1 - tau) y0 in Algorithm 1 of Hu et al., MICCAI 2023, arXiv 2306.03878), and the gradient of log p(y | x_t)
of a classifier that has seen noised images. Everything here is built on MONAI's `DiffusionModelUNet` and its blocks,
and on its `BasicUNet` for the segmenter, which learns from the maps (distill.py) and then needs no diffusion.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.networks.nets import BasicUNet, DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import get_down_block, get_mid_block, get_timestep_embedding
from torch import nn

NUM_CLASSES = 2  # y0: the slice does not show the target; y1: it does


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


class SoftEmbedding(nn.Embedding):
    """An embedding that takes a label or a mixture of labels.

    Integer labels of shape (B,) are looked up; floating weights over the classes, shape (B, classes), give
    `w @ weight`: a one-hot row equals the lookup, and the derivative by the condition is the network's own.
    """

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        if labels.is_floating_point():
            return labels.to(self.weight.dtype) @ self.weight
        return super().forward(labels)


class ConditionalUNet(DiffusionModelUNet):
    """The noise prediction f(x_t, t, y): MONAI's diffusion U-Net with two classes that may be mixed.

    With `patch_size` p the slice enters as (p p) sub-images of H / p x W / p (space to depth) and leaves the same way:
    at the noise levels that matter here the finest scale holds almost no signal, and the network is two to three times
    as fast (Hoogeboom et al. 2023, "simple diffusion", arXiv 2301.11093).

    Args:
        in_channels: channels of x.
        patch_size: p.
        kwargs: `channels`, `attention_levels`, `num_res_blocks`, ... of `DiffusionModelUNet`.

    Forward: `x` (B, C, H, W) float, `timesteps` (B,) int, `class_labels` (B,) int or (B, 2) float weights; returns
    the predicted noise, same shape as `x`. H and W must be divisible by p 2^(levels - 1).
    """

    def __init__(self, in_channels: int = 1, patch_size: int = 1, **kwargs) -> None:
        width = in_channels * patch_size**2
        super().__init__(2, width, width, num_class_embeds=NUM_CLASSES, **kwargs)
        self.class_embedding = SoftEmbedding(NUM_CLASSES, self.class_embedding.embedding_dim)
        self.patch_size = patch_size
        self.size_divisor = patch_size * 2 ** (len(self.block_out_channels) - 1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if any(size % self.size_divisor for size in x.shape[2:]):
            raise ValueError(
                f"image_size must be divisible by {self.size_divisor} for this network_def; got a slice of "
                f"{tuple(x.shape[2:])}."
            )
        patches = nn.functional.pixel_unshuffle(x, self.patch_size)
        return nn.functional.pixel_shuffle(super().forward(patches, timesteps, *args, **kwargs), self.patch_size)


class NoisyImageClassifier(nn.Module):
    """Classifier p(y | x_t): the encoder of the diffusion U-Net, then a pooled head, so that any resolution works.

    Forward: `x` (B, C, H, W) float, `timesteps` (B,) int; returns logits (B, 2). At t = 0 it judges clean slices.
    The encoder follows Dhariwal & Nichol 2021 (arXiv 2105.05233).
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        attention_levels: Sequence[bool],
        num_res_blocks: int,
        num_head_channels: int,
        norm_num_groups: int = 32,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.time_channels, time_embed_dim = channels[0], channels[0] * 4
        self.time_embed = nn.Sequential(
            nn.Linear(channels[0], time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim)
        )
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels[0], kernel_size=3, padding=1)
        common = dict(norm_num_groups=norm_num_groups, norm_eps=1e-6, with_cross_attn=False, resblock_updown=False)
        common |= dict(transformer_num_layers=1, cross_attention_dim=None, upcast_attention=False)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                spatial_dims=2,
                in_channels=channels[max(level - 1, 0)],
                out_channels=width,
                temb_channels=time_embed_dim,
                num_res_blocks=num_res_blocks,
                add_downsample=level < len(channels) - 1,
                with_attn=attention_levels[level],
                num_head_channels=num_head_channels,
                **common,
            )
            for level, width in enumerate(channels)
        )
        self.middle_block = get_mid_block(
            spatial_dims=2,
            in_channels=channels[-1],
            temb_channels=time_embed_dim,
            norm_num_groups=norm_num_groups,
            norm_eps=1e-6,
            with_conditioning=False,
            num_head_channels=num_head_channels,
            transformer_num_layers=1,
            cross_attention_dim=None,
            upcast_attention=False,
        )
        self.norm = nn.GroupNorm(norm_num_groups, channels[-1])
        self.activation = nn.SiLU()  # a module, so that class activation maps can name it
        self.head = nn.Linear(channels[-1], NUM_CLASSES)

    def features(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The last feature map before pooling, (B, channels[-1], H / d, W / d) with d = patch_size 2^(levels - 1)."""
        emb = self.time_embed(get_timestep_embedding(timesteps, self.time_channels).to(x.dtype))
        h = self.conv_in(nn.functional.pixel_unshuffle(x, self.patch_size))
        for block in self.down_blocks:
            h, _ = block(hidden_states=h, temb=emb)
        return self.activation(self.norm(self.middle_block(hidden_states=h, temb=emb)))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x, timesteps).mean(dim=(2, 3)))


class Segmenter(nn.Module):
    """MONAI's U-Net on patches of p x p pixels (space to depth): p times the resolution for the same time and memory.

    Args:
        patch_size: p.
        features: widths of `BasicUNet`.
        norm_num_groups: of its group normalisation.

    Forward: slices `x` (B, 1, H, W) float in [-1, 1]; returns logits of the target (B, 1, H, W). H and W must be
    divisible by 16 p.
    """

    def __init__(self, patch_size: int, features: Sequence[int], norm_num_groups: int = 8) -> None:
        super().__init__()
        norm = ("group", {"num_groups": norm_num_groups})
        self.unet = BasicUNet(2, patch_size**2, patch_size**2, features, norm=norm)
        self.patch_size, self.size_divisor = patch_size, 16 * patch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(size % self.size_divisor for size in x.shape[2:]):
            raise ValueError(
                f"segmenter_size must be divisible by {self.size_divisor} for this segmenter; got a slice of "
                f"{tuple(x.shape[2:])}."
            )
        patches = nn.functional.pixel_unshuffle(x, self.patch_size)
        return nn.functional.pixel_shuffle(self.unet(patches), self.patch_size)


class WeakDiffusionNetwork(nn.Module):
    """Denoiser, classifier and segmenter in one module: one checkpoint, one thing to load.

    The first two are trained together from slice tags, the segmenter afterwards from their maps (`run distill`). Until
    then `distilled` is 0, and a checkpoint without any segmenter loads as well.

    Args:
        denoiser: f(x_t, t, y).
        classifier: p(y | x_t).
        segmenter: the student of the maps; None: there is none.

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
        """Logits (B, 2) of the classifier for noised slices (B, C, H, W) at `timesteps` (B,)."""
        return self.classifier(x, timesteps)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Hosts load non-strictly (MONAI Label does); a network with random weights must not pass as trained.
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


def load_weights(
    network: nn.Module, path: str | Path | None, knob: str = "ckpt_path", remedy: str = "train first"
) -> nn.Module:
    """Loads a flat state dict (`model.pt`) into `network` and returns it; with None the network stays as it is.

    Errors name the `knob` that set `path`, and a `remedy` for a file that is not there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a state dict of this network.
    """
    if path is None:
        return network
    if not Path(path).is_file():
        raise FileNotFoundError(f"{knob} {str(path)!r} does not exist; {remedy}, or give --{knob} FILE.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{knob} {str(path)!r} does not hold weights of this network_def: {error}") from error
    return network
