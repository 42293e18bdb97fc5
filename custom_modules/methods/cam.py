"""Class activation maps: where the classifier sees the target in a clean slice, from one of its own layers.

With the activations A_k (k = 1..K) of a layer, the logit S of y1 at t = 0 and its gradient G = dS / dA, the map is

    L = relu(sum over k of w_k A_k)

    GradCAM    w_k = mean over space of G_k                                                    Selvaraju et al. 2017
    GradCAM++  w_k = sum over space of alpha_k relu(G_k),                                      Chattopadhay et al. 2018
               alpha_k = G_k^2 / (2 G_k^2 + sum over space of A_k G_k^3)
    ScoreCAM   w_k = softmax over k of S(x masked by A_k, brought to the slice and to [0, 1])  Wang et al. 2020
    LayerCAM   w_k = relu(G_k), a weight for every position                                    Jiang et al. 2021

Two smoothings: `eigen_smooth` takes the first principal component of the w_k A_k in place of their sum, `aug_smooth`
the mean over six views of the slice. Each map is scaled to [0, 1] before that mean: gradients have no common unit, and
the slice or view with the largest would dominate all that follows (the mean, smoothing along the slices, a threshold
for the whole volume). Before mean pooling and a linear head G_k is constant in space, and GradCAM is the plain CAM.

MONAI's maps are not used: its hooks stay on the network, its backward pass fills the parameters' `.grad`, and its
GradCAM++ multiplies G by exp(S), which is right for one slice only, since S (B,) broadcasts along the width.

References: Selvaraju et al., ICCV 2017, arXiv 1610.02391; Chattopadhay et al., WACV 2018, arXiv 1710.11063; Wang et
al., CVPR Workshops 2020, arXiv 1910.01279; Jiang et al., IEEE TIP 2021, doi 10.1109/TIP.2021.3089943. The smoothings
are those of jacobgil/pytorch-grad-cam, whose names the paper uses.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Sequence

import torch
from torch import nn

from custom_modules.networks.precision import autocast

INTENSITIES = (0.9, 1.0, 1.1)  # of aug_smooth
CHUNK = 2**19  # pixels in one forward pass of ScoreCAM: bounds its memory, changes nothing else


def scale_intensity(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """Multiplies the intensities of slices `x` (B, 1, H, W) in [-1, 1] by `factor`; -1, the background, counts as 0."""
    return (x + 1) * factor - 1


def min_max(maps: torch.Tensor) -> torch.Tensor:
    """Scales each map of `maps` (..., h, w) to [0, 1]; a constant map has no peak and becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    constant = high - low <= 1e-5 * high.abs().maximum(low.abs())  # interpolating a constant leaves rounding behind
    return ((maps - low) / (high - low)).masked_fill(constant, 0)


def upsample(maps: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Interpolates `maps` (B, 1, h, w) to the size of `x` (B, 1, H, W), bilinear."""
    return nn.functional.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)


def positive_logit(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns S, the logit (B,) of y1 at t = 0, for clean slices `x` (B, 1, H, W)."""
    return network.classify(x, x.new_zeros(len(x), dtype=torch.long))[:, 1]


def activation_and_gradient(
    network: nn.Module, x: torch.Tensor, target_layer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and G = dS / dA, both (B, K, h, w), of the layer with that name (of its first output, if several).

    Raises:
        ValueError: if there is no such layer, or it gives no feature map while `network` classifies.
    """
    maps = {}

    def record(name: str, module: nn.Module, args: tuple, output: object) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            maps[name] = output

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for name, layer in network.named_modules():
            hooks.enter_context(layer.register_forward_hook(functools.partial(record, name)))
        # The slice requires the gradient, so frozen weights do not stop it. Slices do not mix, so the gradient of the
        # sum is that of each slice.
        score = positive_logit(network, x.detach().requires_grad_()).sum()
    if target_layer not in maps:
        close = difflib.get_close_matches(target_layer, maps, n=5, cutoff=0)
        raise ValueError(
            "target_layer must be a layer that gives a feature map (B, K, h, w) when the network classifies; got "
            f"{target_layer!r}; close names: {close}."
        )
    A = maps[target_layer]
    return A.detach(), torch.autograd.grad(score, A)[0]


def gradcam(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """Returns GradCAM's w (B, K, 1, 1) for A and G (B, K, h, w)."""
    return G.mean((2, 3), keepdim=True)


def gradcam_pp(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """Returns GradCAM++'s w (B, K, 1, 1) for A and G (B, K, h, w); alpha is 0 where its denominator is 0.

    Derived for A >= 0: at a layer with signed activations the denominator, and with it alpha, can be negative.
    """
    denominator = 2 * G**2 + (A * G**3).sum((2, 3), keepdim=True)
    alpha = (G**2 / denominator).masked_fill(denominator == 0, 0)
    return (alpha * G.relu()).sum((2, 3), keepdim=True)


def layercam(A: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """Returns LayerCAM's w (B, K, h, w) for A and G (B, K, h, w)."""
    return G.relu()


def scorecam(A: torch.Tensor, network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns ScoreCAM's w (B, K, 1, 1), without a gradient, for A (B, K, h, w) and the slices `x` (B, 1, H, W).

    What the mask hides becomes background, -1, and not the grey 0 of a product with `x` itself. The paper's baseline,
    the score of an empty slice, is left out: it cancels in the softmax.
    """
    pairs = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in A.shape[:2]))  # all slices and channels
    scores = []
    for chunk in pairs.split(max(1, CHUNK // x[0].numel())):
        b, k = chunk.T
        mask = min_max(upsample(A[b, k][:, None], x))
        scores.append(positive_logit(network, scale_intensity(x[b], mask)))
    return torch.cat(scores).view(*A.shape[:2], 1, 1).softmax(dim=1)


GRADIENT_WEIGHTS = {"gradcam": gradcam, "gradcam_pp": gradcam_pp, "layercam": layercam}
VARIANTS = (*GRADIENT_WEIGHTS, "scorecam")


def first_component(weighted: torch.Tensor) -> torch.Tensor:
    """Returns the first principal component (B, 1, h, w) of the channels `weighted` (B, K, h, w), centred over space.

    The sign of a singular vector is arbitrary. Here the component correlates positively with the sum over the channels:
    the K entries of its direction add up to a positive number.
    """
    points = weighted.flatten(2).mT  # (B, h w, K)
    points = points - points.mean(dim=1, keepdim=True)
    direction = torch.linalg.svd(points, full_matrices=False).Vh[:, 0]
    direction = direction * torch.where(direction.sum(dim=1, keepdim=True) < 0, -1, 1)
    return torch.einsum("bnk,bk->bn", points, direction).view(len(weighted), 1, *weighted.shape[2:])


class ClassActivationMap:
    """Computes one of the four maps of a batch of slices, in float32, smoothed or not.

    Args:
        variant: `gradcam`, `gradcam_pp`, `scorecam` or `layercam`.
        target_layer: name of a layer inside the network, as in `named_modules`: `classifier.activation` is the last
            before pooling; `classifier.down_blocks.1` comes before the attention, where positions exchange evidence.
        aug_smooth: mean over six views: the slice and its left-right mirror, times 0.9, 1 and 1.1.
        eigen_smooth: first principal component of the w_k A_k in place of their sum.

    Raises:
        ValueError: if there is no such variant; when called, if there is no such layer, or it gives no feature map.
    """

    def __init__(self, variant: str, target_layer: str, aug_smooth: bool = True, eigen_smooth: bool = True) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {list(VARIANTS)}; got {variant!r}.")
        self.variant, self.target_layer = variant, target_layer
        self.aug_smooth, self.eigen_smooth = aug_smooth, eigen_smooth

    def __call__(self, x_0: torch.Tensor, network: nn.Module, slices: Sequence[int]) -> torch.Tensor:
        """Returns the saliency (B, 1, H, W) float32 in [0, 1] of `x_0` (B, 1, H, W) in [-1, 1]; `slices` is ignored."""
        x_0 = x_0.float()
        with torch.no_grad(), autocast(x_0.device, enabled=False):
            if not self.aug_smooth:
                return self._one_map(x_0, network)
            # Slices are stored left to right along H (LPS), and training mirrors that axis; W, front to back, has a
            # direction that the classifier knows.
            views = [scale_intensity(x_0, factor) for factor in INTENSITIES]
            maps = [self._one_map(x, network) for x in views]
            maps += [self._one_map(x.flip(2), network).flip(2) for x in views]
            return torch.stack(maps).mean(dim=0)

    def _one_map(self, x: torch.Tensor, network: nn.Module) -> torch.Tensor:
        A, G = activation_and_gradient(network, x, self.target_layer)
        w = scorecam(A, network, x) if self.variant == "scorecam" else GRADIENT_WEIGHTS[self.variant](A, G)
        L = first_component(w * A) if self.eigen_smooth else (w * A).sum(dim=1, keepdim=True)
        return min_max(upsample(L.relu(), x))
