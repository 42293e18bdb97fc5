"""How a volume looks, compared with the volumes that the weights were trained on.

A network answers whatever it is shown: a brain model finds a "tumour" in an abdomen. Two checks of a prepared volume,
each a number that is 1 at what is tolerated:

    contrast     the first layers of the segmenter respond to texture and contrast. v is the median over slices with
                 tissue, evenly spaced, of the mean and the spread of their features, d the distance of v to the nearest
                 training volume, the root mean square of (v - v_i) / s, s the standard deviation over the training
                 volumes. It is divided by `MARGIN` times the 90th percentile of what these have among themselves, each
                 without itself. The nearest one, because training data come in kinds (with the skull and without).
    proportions  width by depth of the body's box in a slice (a head: 0.7 to 0.9, a trunk: 1.2 to 1.7): its logarithm
                 beyond the 5th and 95th percentile of the training volumes, divided by `STRETCH`. A quarter turn shows.

No mask is read. The statistics lie beside the weights, in `model.statistics.json`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import nn
from tqdm import tqdm

from custom_modules.files import read_json, write_json
from custom_modules.inference.cases import ERROR, CaseDataset
from custom_modules.networks.weights import training_cases

SIDE = 64  # pixels, to which slices are resized, whatever the method works on
SLICES = 64  # of a volume, at most
MARGIN, STRETCH = 1.5, 0.2
LEAST = 1e-3  # limit where all training volumes are alike: the statistics have three digits
FEWEST, MOST = 3, 200  # training volumes
CHECKS = {"unlike_contrast": "contrast or texture", "unlike_proportions": "width by depth of the body"}
logger = logging.getLogger(__name__)


def statistics_file(weights: str | Path) -> Path:
    """Returns the file beside `weights` that describes their training volumes."""
    return Path(weights).with_suffix(".statistics.json")


@torch.no_grad()
def describe(slices: torch.Tensor, segmenter: nn.Module) -> torch.Tensor:
    """Computes v (F,) float32 of a volume, `slices` (D, 1, H, W) float32 in [-1, 1]."""
    tissue = (slices > -0.9).flatten(1).float().mean(dim=1)
    slices = slices[tissue > tissue.max() / 4]
    slices = slices[:: max(1, -(-len(slices) // SLICES))]
    slices = nn.functional.interpolate(slices, (SIDE, SIDE), mode="bilinear", antialias=True)
    return torch.cat([segmenter.appearance(batch) for batch in slices.split(SLICES)]).median(dim=0).values.float().cpu()


def proportions(volumes: torch.Tensor) -> list[float | None]:
    """Computes width by depth in mm of volumes (B, 1, H, W, D), cropped to the body; None where no affine tells."""
    if not isinstance(volumes, MetaTensor):
        return [None] * len(volumes)
    height, width = torch.linalg.norm(volumes.affine.reshape(-1, 4, 4)[:, :3, :2], dim=1).T.cpu()
    ratio = height / width * volumes.shape[2] / volumes.shape[3]  # H runs from right to left
    return ratio.expand(len(volumes)).tolist()


def fingerprint(segmenter: nn.Module) -> str:
    """Names the weights that `describe` uses, in half precision as they are stored: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for layer in segmenter.first_layers():
        for tensor in layer.state_dict().values():
            digest.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def distances(volumes: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Computes the distances (m, n) of `volumes` (m, F) to `training` (n, F), both in units of s."""
    return np.sqrt(((volumes[:, None] - training[None]) ** 2).mean(axis=2))


class TrainingAppearance:
    """Compares volumes with those that `weights` were trained on.

    Where there are no statistics, or those of other weights, that is logged and nothing is compared.

    Args:
        weights: file of the network's weights.
    """

    def __init__(self, weights: str | Path | None) -> None:
        self.file = statistics_file(weights) if weights else None  # None: a network without weights is measured
        self.content = read_json(self.file) if self.file and self.file.is_file() else {}
        if self.file and not self.content:
            logger.warning("%s does not exist, so no volume is compared with those of training; `run statistics` of "
                           "inference.yaml writes it, from %d training volumes on.", self.file, FEWEST)  # fmt: skip

    def __call__(self, volumes: torch.Tensor, network: nn.Module) -> list[dict[str, float]]:
        """Returns `CHECKS` of each of the prepared `volumes` (B, 1, H, W, D) in [-1, 1], and logs those above 1.

        They are empty where nothing can be compared.
        """
        segmenter = getattr(network, "segmenter", None)
        if self.content and hasattr(segmenter, "appearance"):  # model.ts has none
            if self.content["weights"] == fingerprint(segmenter):
                files = getattr(volumes, "meta", {}).get("filename_or_obj", "the volume")
                names = [Path(file).name for file in ([files] if isinstance(files, str) else files)]
                tensor = volumes.as_tensor() if isinstance(volumes, MetaTensor) else volumes
                each = zip(tensor.movedim(-1, 1), proportions(volumes), names * len(tensor))
                return [self._check(slices, segmenter, ratio, name) for slices, ratio, name in each]
            self.content = {}
            logger.warning("%s is of other weights, so no volume is compared with those of training; "
                           "`run statistics` of inference.yaml writes it.", self.file)  # fmt: skip
        return [{} for _ in volumes]

    def _check(self, slices: torch.Tensor, segmenter: nn.Module, ratio: float | None, name: str) -> dict[str, float]:
        """Compares one volume, `slices` (D, 1, H, W), whose width by depth is `ratio`."""
        training, scale = np.asarray(self.content["volumes"]), np.asarray(self.content["scale"])
        distance = float(distances(describe(slices, segmenter).numpy()[None] / scale, training).min())
        facts = dict.fromkeys(CHECKS, 0.0) | {"unlike_contrast": distance / self.content["limit"]}
        if ratio is not None:
            low, high = np.log(self.content["proportions"])
            facts["unlike_proportions"] = float(max(np.log(ratio) - high, low - np.log(ratio), 0) / STRETCH)
        if why := unlike_training(facts):
            logger.warning("%s: %s", name, why)
        return facts


def unlike_training(facts: Mapping[str, float]) -> str:
    """Says in which of `CHECKS` a volume is unlike those of training, and what to do; "" for none."""
    found = [
        f"{name} ({float(facts[key]):.1f} times the limit)" for key, name in CHECKS.items() if facts.get(key, 0) > 1
    ]
    if not found:
        return ""
    return (
        f"unlike the training volumes in {' and '.join(found)}: look at the mask, and check that body part, sequence "
        "and orientation are those that the weights were trained on."
    )


def write_statistics(
    cases: Sequence[dict], transform, network: nn.Module, weights: str | Path, device: torch.device | str = "cpu"
) -> None:
    """Writes the statistics of those `cases` that `weights` were trained on (all, if that was not recorded).

    Of more than `MOST` volumes, that many evenly spaced ones are taken; with fewer than `FEWEST` there are none.

    Args:
        cases: of a datalist.
        transform: preprocessing of a case, which gives `image` (1, H, W, D) in [-1, 1].
        network: has these weights.
        weights: file, beside which the statistics are written.
        device: of the network.

    Raises:
        ValueError: the network has no trained segmenter, or a case cannot be read.
    """
    if network.segmenter is None or not network.distilled:
        raise ValueError(f"{weights} has no trained segmenter, whose features describe the volumes; run distill first.")
    known, file = training_cases(weights), statistics_file(weights)
    cases = [case for case in cases if known is None or case["case"] in known]
    if len(cases) < FEWEST:
        if file.is_file() and read_json(file).get("weights") != fingerprint(network.segmenter):
            file.unlink()  # of other weights
        logger.warning("no statistics of the training volumes in %s: they need %d volumes at least, got %d.", file,
                       FEWEST, len(cases))  # fmt: skip
        return
    chosen = np.linspace(0, len(cases) - 1, min(len(cases), MOST)).round().astype(int)
    segmenter, rows, ratios = network.to(device).eval().segmenter, [], []
    for item in tqdm(CaseDataset([cases[i] for i in chosen], transform), desc="statistics", unit="volume"):
        if ERROR in item:
            raise ValueError(f"case {item['case']}: {item[ERROR]}")
        rows.append(describe(item["image"].as_tensor().movedim(-1, 0).to(device), segmenter).numpy())
        ratios += proportions(item["image"][None])
    volumes = np.stack(rows).astype(float)
    scale = volumes.std(axis=0) + 1e-6
    volumes /= scale
    among = distances(volumes, volumes)
    np.fill_diagonal(among, np.inf)
    content = {
        "weights": fingerprint(segmenter),
        "limit": max(LEAST, MARGIN * float(np.percentile(among.min(axis=1), 90))),
    }
    content["proportions"] = np.percentile(ratios, [5, 95]).round(4).tolist()
    write_json(file, content | {"scale": scale.tolist(), "volumes": volumes.round(3).tolist()})
    logger.info("statistics of %d training volumes in %s", len(volumes), file)
