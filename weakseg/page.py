"""The tagging page: one HTML file with the slices of every volume as small pictures, and a script that tags them.

The file needs no server and no network: its policy lets it load nothing, and run and style itself by what `page.html`
holds. All names are data, which the script shows as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, LoadImaged
from tqdm import tqdm

from custom_modules.data.reader import VolumeReader
from custom_modules.data.tags import Tags, named_tags, raise_all, read_tags, stored_slices
from custom_modules.files import atomic_path
from custom_modules.inference.body import ScaleToBodyd
from custom_modules.inference.cases import reason
from custom_modules.inference.checks import CheckVolumed
from custom_modules.report.slices import View, is_placed, jpeg, picture_size

logger = logging.getLogger(__name__)
TEMPLATE = Path(__file__).with_name("page.html")
SIZE = 256  # pixels, of the longer side: about 6 kB a slice, 1 MB a volume of 155 slices
READ = Compose(
    [
        LoadImaged("image", reader=VolumeReader),
        EnsureChannelFirstd("image"),
        EnsureTyped("image", dtype=torch.float32),
        CheckVolumed("image"),
    ]
)


def write_page(
    cases: Sequence[Mapping],
    output: str | Path,
    tags: str | Path | None = None,
    slice_axis: int = 2,
    first_slice: int = 0,
) -> dict[str, str]:
    """Writes the tagging page.

    Args:
        cases: {"case", "image", "channel"?}, as `find_cases` returns them.
        output: HTML file to write.
        tags: CSV with tags to go on with or to check; None: all slices are untagged.
        slice_axis: stored axis along which the slices are counted.
        first_slice: number of the first slice in `tags`, 0 or 1.

    Returns:
        {case: why it is not on the page}.

    Raises:
        ValueError: no case can be read, or the tags are not as `read_tags` wants them, or name a case or a slice that
            does not exist.
    """
    known = {} if tags is None else read_tags(tags, first_slice)
    shown, skipped = [], {}
    for case in tqdm(cases, desc="drawing slices", unit="case", disable=None):
        try:
            shown.append(_draw(case, slice_axis))
        except Exception as error:  # whatever a file may hold
            skipped[case["case"]] = reason(error)
            logger.warning("%s is not on the page: %s", case["case"], skipped[case["case"]])
    if not shown:
        raise ValueError("no case can be shown. " + " ".join(f"{case}: {why}" for case, why in skipped.items()))
    _name_other_planes(shown, slice_axis)
    _add_tags(shown, known, cases)
    with atomic_path(output) as aside:
        aside.write_text(_render(shown, skipped), encoding="utf-8")
    return skipped


def _draw(case: Mapping, slice_axis: int) -> dict:
    """Draws the slices of a case, {"name", "slices" (JPEG, Base64), "sides"}, as bright as the method sees them."""
    data = READ(dict(case))
    image, affine = data["image"], data["image"].affine.numpy()
    view = View(affine, slice_axis)
    data["image"] = image.movedim(slice_axis + 1, -1)  # where `ScaleToBodyd` expects the slices
    scaled = ScaleToBodyd("image")(data)["image"][0].movedim(-1, slice_axis).numpy()
    planes = [view.plane(scaled, index) for index in range(scaled.shape[slice_axis])]
    shape = picture_size(planes[0].shape, view.pixel, SIZE)
    slices = [jpeg(plane, shape) for plane in planes]
    return {"name": case["case"], "slices": slices, "sides": view.sides if is_placed(case["image"]) else {}}


def _name_other_planes(shown: Sequence[Mapping], slice_axis: int) -> None:
    """Logs which cases would be tagged in other slices than those that a shipped bundle trains on."""
    if others := [one["name"] for one in shown if {"S", "I"} & set(one["sides"].values())]:
        logger.warning(
            "%d of %d volumes have slices along axis %d that are not axial, as those of the shipped bundles are "
            "(such as %s); --slice_axis chooses another axis, here and in training.",
            *(len(others), len(shown), slice_axis, others[0]),
        )


def _add_tags(shown: Sequence[dict], tags: Tags, cases: Sequence[Mapping]) -> None:
    """Adds to each case its tags as the page has them: a character a slice, 0, 1 or a dot."""
    problems, items = [], {case["case"]: case for case in cases}
    named = named_tags(cases, tags, problems)
    raise_all(problems, "in the tags")
    for one in shown:
        count = len(one["slices"])
        given = stored_slices(items[one["name"]], named[one["name"]], count) if one["name"] in named else {}
        one["tags"] = "".join(str(given.get(index, ".")) for index in range(count))


def _render(shown: Sequence[dict], skipped: Mapping[str, str]) -> str:
    content = {"cases": shown, "skipped": [f"{case} ({why})" for case, why in skipped.items()]}
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()  # another content, another draft
    data = json.dumps({"key": f"weakseg {key}", **content}).replace("<", "\\u003c")  # no tag ends the data
    text = TEMPLATE.read_text(encoding="utf-8")
    sums = {kind: _sha256(re.search(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[1]) for kind in ("script", "style")}
    policy = f"default-src 'none'; img-src data:; script-src '{sums['script']}'; style-src '{sums['style']}'; "
    policy += "base-uri 'none'; form-action 'none'"
    return text.replace("{{policy}}", policy).replace("{{data}}", data)


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
