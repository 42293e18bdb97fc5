"""Evaluation inside MONAI's engine: measures every case that an evaluator returns, then writes and prints the tables.

The numbers are those of `custom_modules.evaluation.metrics`; this file adds the engine and the files. The rows of each
case are kept in a file, and the tables are made from these files: it makes no difference which process or run measured
a case.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.metrics import compute_roc_auc
from scipy.stats import spearmanr

from custom_modules import __version__
from custom_modules.data.labels import target_mask
from custom_modules.data.tag_volume import tags_of_volume
from custom_modules.evaluation import metrics, tables
from custom_modules.evaluation.metrics import Row
from custom_modules.files import read_json_or_empty, result_file, sha256, write_json
from custom_modules.inference.evaluator import one_case

SPECIFICITY = 0.95  # at which the classifier's sensitivity is reported
logger = logging.getLogger(__name__)


class EvaluationMetrics:
    """Ignite handler that measures the output of a `VolumeEvaluator`.

    `engine.state.output` is a list of decollated dicts (empty when a case failed): `pred` ((1, H, W, D) MetaTensor,
    0/1, on the native grid; its affine gives the spacing), `label` (same shape, label values as stored), `case` and
    `stem`, optionally `seconds_per_slice` (s), and `gate_probability` (D,) with `slice_labels` (a tag volume), which
    give the classifier's AUC. The `group` is that of the data set's case.

    Writes each case's rows into `<output_dir>/metrics/cases/<stem>.json`. At the end, the first process makes
    `per_slice.csv`, `per_volume.csv` and `summary.json` in `<output_dir>/metrics` from the rows of all cases that were
    measured now or earlier, in the data set's order; an undefined number is `nan` in the CSVs. A case that cannot be
    measured (a key is missing, the shapes of pred and label differ, pred is not binary or has no affine) or written
    goes into the engine's `failures`.

    Args:
        output_dir: folder that receives `metrics/`, and holds the masks.
        bundle: name of the bundle; recorded in the summary, as are `method` and `settings` (the method's).
        seed: seed of this repeat, or the number of the fold; repeated in every row.
        target_labels: label values that make the target; None or empty means all above 0.
        min_area, slice_axis: as in `slice_metrics`.
        training_cases: cases in the checkpoint's training list; None means unknown: `in_training` stays empty.

    Raises:
        ValueError: `min_area` or `slice_axis` is out of range; at the end of the run, if the rows of a case are gone.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        bundle: str,
        method: str,
        seed: int = 0,
        target_labels: Sequence[int] | None = None,
        min_area: float = 0,
        slice_axis: int = 2,
        settings: Row | None = None,
        training_cases: Iterable[str] | None = None,
    ) -> None:
        metrics.check_protocol(slice_axis, min_area)
        self.output_dir, self.folder, self.seed = Path(output_dir), Path(output_dir) / "metrics", seed
        self.target_labels, self.min_area, self.slice_axis = list(target_labels or []), min_area, slice_axis
        self.protocol = {"target_labels": self.target_labels, "min_area": min_area, "slice_axis": slice_axis}
        self.context = {"bundle": bundle, "method": method, "settings": self.protocol | dict(settings or {})}
        self.training_cases = None if training_cases is None else set(map(str, training_cases))
        self.measured: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Adds the handlers to `engine`; each run starts with empty tables."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def is_done(self, case: Row) -> bool:
        """Says whether the rows of `case` exist, measured by this protocol on the mask and label that are on disk."""
        rows = read_json_or_empty(self._rows_file(case["stem"]))
        return rows.keys() >= tables.ROW_KEYS and rows.get("measured") == self._origin(case)

    def _rows_file(self, stem: str) -> Path:
        return self.folder / "cases" / f"{stem}.json"

    def _origin(self, case: Row) -> dict[str, Any]:
        """Collects all that the rows of a case depend on. A mask that is not kept has no hash."""
        files = {"mask": result_file(self.output_dir, case["stem"], "mask.nii.gz"), "label": case["label_file"]}
        hashes = {f"{name}_sha256": sha256(file) if os.path.exists(file) else None for name, file in files.items()}
        return {"custom_modules": __version__} | self.protocol | hashes

    def _started(self, engine: Engine) -> None:
        self.measured = []

    def _iteration_completed(self, engine: Engine) -> None:
        for item in engine.state.output:
            with one_case(engine, item["case"]):
                rows = {"measured": self._origin(engine.cases[item["stem"]])} | self._measure(item)
                tables.write_case_rows(self._rows_file(item["stem"]), rows)
                self.measured.append(item["stem"])

    def _target(self, item: Row) -> torch.Tensor:
        """Selects the target in the label, bool (1, H, W, D); warns where the label looks wrong."""
        affines = [torch.as_tensor(item[key].affine).cpu() for key in ("pred", "label") if hasattr(item[key], "affine")]
        if not torch.allclose(affines[0], affines[-1], atol=1.0e-2):
            logger.warning("case %r: pred and label have one shape, but different affines.", item["case"])
        label = np.asarray(item["label"].cpu())
        target = target_mask(label, self.target_labels)
        if not target.any():
            values, wanted = np.unique(label)[:10].tolist(), self.target_labels or "> 0"
            logger.warning("case %r has no target: its label holds %s, wanted %s.", item["case"], values, wanted)
        return torch.as_tensor(target)

    def _measure(self, item: Row) -> dict[str, Any]:
        """Makes the rows of one case: its slices', its volume's, and the classifier's (probability, tag) per slice."""
        if missing := [key for key in ("pred", "label") if item.get(key) is None]:
            raise ValueError(f"evaluation needs {missing}, got {sorted(item)}.")
        pred, label = item["pred"], item["label"]
        if pred.shape != label.shape or pred.ndim != 4 or len(pred) != 1 or not hasattr(pred, "pixdim"):
            raise ValueError(
                "pred and label must share one shape (1, H, W, D), pred as a MetaTensor on the native grid; got pred "
                f"{type(pred).__name__} {tuple(pred.shape)}, label {tuple(label.shape)}."
            )
        gate = []
        if item.get("gate_probability") is not None and item.get("slice_labels") is not None:
            tags = tags_of_volume(item["slice_labels"].as_tensor())
            gate = list(zip(item["gate_probability"].tolist(), tags.tolist()))
        target = self._target(item)[0]
        slices = metrics.slice_metrics(pred[0], target, self.slice_axis, pred.pixdim.tolist(), self.min_area)
        volume = {"n_slices": len(slices), "n_undefined": metrics.n_undefined(slices, "hd95")}
        volume |= {key: metrics.mean_defined(slices, key) for key in ("dice", "iou", "hd95")}
        volume |= metrics.volume_metrics(pred[0], target)
        volume |= {key: metrics.number(item, key) for key in ("expected_dice", "seconds_per_slice")}
        return {"gate": gate, "volume": volume, "slices": slices}

    def _completed(self, engine: Engine) -> None:
        finished = set().union(*idist.all_gather([*self.measured, *engine.done]))  # waits for all processes
        if idist.get_rank() == 0:
            self._tabulate([case for stem, case in engine.cases.items() if stem in finished])

    def _tabulate(self, cases: Sequence[Row]) -> None:
        """Writes and prints the tables of `cases`, whose rows are on disk."""
        per_slice, per_volume, gate, known = [], [], [], self.training_cases
        for case in cases:
            rows = tables.read_case_rows(self._rows_file(case["stem"]))
            row = {"case": case["case"], "group": case.get("group"), "seed": self.seed}
            row["in_training"] = None if known is None else int(case["case"] in known)
            per_slice += [row | values for values in rows["slices"]]
            per_volume.append(row | rows["volume"])
            gate += rows["gate"]
        n_known = None if known is None else sum(row["in_training"] for row in per_volume)
        summary = metrics.summarise(per_slice, per_volume, **self.context, n_in_training=n_known)
        summary |= _classifier_measures(gate)
        summary["expected_dice_spearman"] = _rank_correlation(per_volume, "expected_dice", "volume_dice")
        tables.write_csv(self.folder / "per_slice.csv", per_slice, tables.SLICE_COLUMNS)
        tables.write_csv(self.folder / "per_volume.csv", per_volume, tables.VOLUME_COLUMNS)
        write_json(self.folder / "summary.json", summary)
        if not per_volume:
            logger.error("no case was evaluated: the tables in %s are empty.", self.folder)
            return
        if summary["classifier_auc"] is not None:
            values = (len(gate), summary["classifier_auc"], summary["classifier_sensitivity"], SPECIFICITY)
            logger.info("classifier over %d slices: AUC %.3f, sensitivity %.3f at specificity %g", *values)
        print(tables.printed_table(per_volume, summary), f"written to {self.folder}", sep="\n", flush=True)
        if n_known:
            logger.warning("%d of %d cases were in the checkpoint's training list.", n_known, len(per_volume))


def _classifier_measures(gate: Sequence[tuple[float, int]]) -> dict[str, float | None]:
    """Measures the classifier over (probability, tag) of all slices of all volumes: its AUC, and the share of positive
    slices that are found at the threshold that leaves out `SPECIFICITY` of the negative ones; None for one tag only."""
    positive, negative = (torch.tensor([p for p, tag in gate if tag == wanted]) for wanted in (1, 0))
    auc = sensitivity = None
    if len(positive) and len(negative):
        tags = torch.tensor([1] * len(positive) + [0] * len(negative))
        auc = float(compute_roc_auc(torch.cat([positive, negative]), tags))
        sensitivity = float((positive > negative.quantile(SPECIFICITY)).float().mean())
    return {"classifier_auc": auc, "classifier_sensitivity": sensitivity}


def _rank_correlation(rows: Sequence[Row], *keys: str) -> float | None:
    """Computes Spearman's correlation of two columns over the rows that have both; None for fewer than three, or if
    one column is constant."""
    pairs = [pair for row in rows if not any(map(math.isnan, pair := [metrics.number(row, key) for key in keys]))]
    ranked = len(pairs) > 2 and all(len(set(column)) > 1 for column in zip(*pairs))
    return float(spearmanr(pairs).statistic) if ranked else None
