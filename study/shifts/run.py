"""The shift study: what each kind of change to a volume costs, as volume Dice with and without it.

    OUT/shifts.json              what all measurements share
    OUT/cases/<case>.json        {change: volume Dice, or why it failed}, written after each change
    OUT/shifts.csv, shifts.md    a row a change: mean, its difference to the unchanged volumes, the worst case; also as
                                 results.json
    OUT/shifts.png               Dice against strength

A change that ends in an error counts as Dice 0. What exists is not done again, failures are.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from tqdm import tqdm

from custom_modules.data.datalist import labelled_cases
from custom_modules.data.labels import load_label, target_mask
from custom_modules.evaluation.metrics import volume_metrics
from custom_modules.files import atomic_path, read_json, read_json_or_empty, sha256, write_json
from custom_modules.inference.cases import reason
from custom_modules.inference.checks import CheckVolumed
from study.figures.pictures import save
from study.figures.shifts import draw_shifts
from study.shifts.changes import SHIFTS, Shift

logger = logging.getLogger(__name__)
PLAIN = "unchanged"


class Segmentation:
    """A bundle's inference on volumes that are changed after they are read.

    Args:
        bundle: its folder.
        knobs: {knob: value} of inference.yaml.
    """

    def __init__(self, bundle: Path, knobs: Mapping[str, Any]) -> None:
        self.parser = ConfigParser()
        self.parser.read_config(str(bundle / "configs" / "inference.yaml"))
        self.parser.update({"bundle_root": str(bundle), **knobs})
        steps = self.parser.get("postprocessing#transforms")
        self.parser["postprocessing#transforms"] = [step for step in steps if "Save" not in step["_target_"]]
        steps = self.get("preprocessing").transforms
        first = 1 + next(i for i, step in enumerate(steps) if isinstance(step, CheckVolumed))
        self.read, self.prepare = Compose(steps[:first]), Compose(steps[first:])
        self.device, self.axis = torch.device(self.get("device")), 1 + self.get("slice_axis")
        self.network = self.get("network").eval()

    def get(self, name: str) -> Any:
        return self.parser.get_parsed_content(name)

    def load(self, case: Mapping) -> tuple[dict, torch.Tensor]:
        """Returns a case as it is read, without tags, and its truth (1, H, W, D) float32."""
        truth = target_mask(load_label(case["label_file"], case["image_file"]), self.get("labels"))
        item = self.read({key: value for key, value in case.items() if key != "slice_labels"})
        return item, torch.as_tensor(truth)[None].float()

    def dice(self, item: Mapping, truth: torch.Tensor, shift: Shift | None, strength: float, seed: str) -> float:
        """Returns the volume Dice of the changed case against the truth, which has moved with it."""
        image = item["image"]
        if shift is not None:
            changed = shift.apply(*(x.movedim(self.axis, -1) for x in (image.as_tensor(), truth)), strength, seed)
            changed, truth = (x.movedim(-1, self.axis) for x in changed)
            image = MetaTensor(changed.contiguous(), meta=image.meta)
        prepared = self.prepare({**item, "image": image})
        with torch.no_grad():
            pred = self.get("inferer")(inputs=prepared["image"][None].to(self.device), network=self.network)
        mask = self.get("postprocessing")({**prepared, "pred": pred[0]})["pred"]
        return volume_metrics(mask[0].as_tensor().cpu(), truth[0] > 0.5)["volume_dice"]


def changes() -> Iterator[tuple[str, str | None, float]]:
    """Yields (name of the change, kind, strength), the unchanged volume first."""
    yield PLAIN, None, 0.0
    for kind, shift in SHIFTS.items():
        yield from ((f"{kind}: {strength:g}", kind, strength) for strength in shift.strengths)


def run_shifts(
    bundle: Path, dataset_dir: str, datalist: str, section: str, output_dir: Path, knobs: Mapping[str, Any]
) -> list[Path]:
    """Measures every case under every change, unless that is done; returns the tables and the picture.

    Raises:
        ValueError: `output_dir` holds a study of other weights, settings or data.
    """
    given = {"dataset_dir": dataset_dir, "datalist": datalist, "section": section}
    segmentation = Segmentation(bundle.resolve(), {**knobs, **given})
    get, about = segmentation.get, output_dir / "shifts.json"
    mine = {"bundle": bundle.resolve().name, **given, "settings": json.loads(json.dumps(get("settings")))}
    mine |= {"weights_sha256": sha256(get("weights"))}
    if about.is_file() and (found := read_json(about)) != mine:
        differing = [key for key in mine if found.get(key) != mine[key]]
        raise ValueError(f"{output_dir} holds a study with other {differing}; give another --output_dir.")
    write_json(about, mine)
    cases = labelled_cases(datalist, dataset_dir, section, get("labels"), get("slice_axis"))
    todo = list(changes())
    with tqdm(total=len(cases) * len(todo), desc="shifts", unit="volume") as bar:
        results = {case["case"]: _measure(segmentation, case, todo, output_dir, bar) for case in cases}
    return write_results(output_dir, results)


def _measure(segmentation: Segmentation, case: Mapping, todo: Sequence, output_dir: Path, bar: tqdm) -> dict:
    """Measures one case under the changes that its file lacks; returns {change: Dice or an error's text}."""
    name, loaded = case["case"], None
    path = output_dir / "cases" / f"{name}.json"
    found = read_json_or_empty(path)
    for change, kind, strength in todo:
        bar.set_postfix_str(f"{name}, {change}")
        if not isinstance(found.get(change), float):
            try:
                loaded = loaded or segmentation.load(case)
                found[change] = segmentation.dice(*loaded, SHIFTS.get(kind), strength, f"{name} {kind}")
            except Exception as error:  # whatever a change may break, the others are worth having
                found[change] = reason(error)
                logger.warning("case %s, %s failed: %s", name, change, found[change])
            write_json(path, found)
        bar.update()
    return found


def write_results(output_dir: Path, results: Mapping[str, Mapping]) -> list[Path]:
    """Writes table and picture of {case: {change: Dice or an error's text}}."""
    rows, plain = [], None
    for change, kind, strength in changes():
        dice = {case: found[change] if isinstance(found[change], float) else 0.0 for case, found in results.items()}
        mean, worst = fmean(dice.values()), min(dice, key=dice.get)
        plain = mean if plain is None else plain
        failed = sum(not isinstance(found[change], float) for found in results.values())
        rows.append({"kind": kind or PLAIN, "strength": strength, "volume_dice": mean, "difference": mean - plain})
        rows[-1] |= {"worst": dice[worst], "worst_case": worst, "failed": failed, "n_volumes": len(dice)}
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    lines = ["| change | strength | volume Dice | difference | worst case |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = f"{row['strength']:g} | {row['volume_dice']:.3f} | {row['difference']:+.3f} | {row['worst']:.3f}"
        lines.append(f"| {row['kind']} | {cells} |")
    for name, content in (("shifts.csv", text.getvalue()), ("shifts.md", "\n".join([*lines, ""]))):
        with atomic_path(output_dir / name) as aside:
            aside.write_text(content, encoding="utf-8")
    write_json(output_dir / "results.json", {"results": rows})
    groups = {kind: shift.group for kind, shift in SHIFTS.items()}
    return [output_dir / "shifts.md", save(draw_shifts(rows, groups), output_dir / "shifts.png")]
