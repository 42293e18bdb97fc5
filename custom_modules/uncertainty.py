"""How sure a mask is, voxel by voxel and as one number.

A method may give several maps of one volume (noise draws), and each map its own mask; the share of masks that hold a
voxel estimates the probability p that it belongs to the target. A single map must hold probabilities, and is read as
it is. With M the mask and p_k the k-th of K masks, or the one map of probabilities (K = 1):

    entropy = -p log2 p - (1 - p) log2 (1 - p)              0 (sure) to 1 bit (undecided)
    expected Dice = mean over k of 2 sum(p_k M) / (sum(p_k) + sum(M))
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def voxel_entropy(estimates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Computes the binary entropy in bits of the mean of `estimates`, masks or probabilities in [0, 1] of one shape."""
    p = torch.stack([torch.as_tensor(estimate).float() for estimate in estimates]).mean(dim=0)
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / np.log(2)


def expected_dice(estimates: Sequence[torch.Tensor], mask: torch.Tensor) -> float | None:
    """Computes the Dice to expect of `mask` (0 and 1), if the truth were like `estimates`, masks or probabilities.

    An estimate that is as empty as the mask has no Dice and is left out; None where all are.
    """
    sums = [(float((estimate * mask).sum()), float(estimate.sum() + mask.sum())) for estimate in estimates]
    dice = [2 * both / total for both, total in sums if total]
    return sum(dice) / len(dice) if dice else None
