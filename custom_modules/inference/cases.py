"""The cases of a run: named, checked, and shared by several processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
from monai.data import Dataset, DistributedSampler

from custom_modules.data.dicom import OUTPUT_FORMATS, check_source

DONE, ERROR = "done", "error"


def reason(error: BaseException) -> str:
    """The innermost cause of an error, in one line: MONAI wraps each transform's in one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class CaseDataset(Dataset):
    """MONAI's `Dataset`, for which a case that cannot be read is an item {"case", "error"} instead of an exception.

    Args:
        data: cases {"case", "image", ...}. Each gets "stem", the name of its results: the image's file name without its
            ending, or the case's name for a DICOM series and wherever two stems would collide.
        transform: MONAI transforms of one case.
        records: handlers that write results; a case for which all of them say `is_done(case)` is an item {"case",
            "stem", "done"} and not prepared.
        overwrite: no case counts as done.
        output_format: `nifti`, or `dicom_seg`: for that, an image has to be a DICOM series.

    Raises:
        ValueError: if `output_format` is something else.
    """

    def __init__(
        self,
        data: Sequence[Mapping],
        transform,
        records: Sequence = (),
        overwrite: bool = False,
        output_format: str = "nifti",
    ) -> None:
        if output_format not in OUTPUT_FORMATS:
            raise ValueError(f"output_format must be one of {list(OUTPUT_FORMATS)}; got {output_format!r}.")
        self.output_format = output_format
        self.records = [] if overwrite else list(records)
        stems = [_stem(case) for case in data]
        counts, names = Counter(stems), {case["case"] for case in data}
        named = []
        for case, stem in zip(data, stems, strict=True):
            unique = counts[stem] == 1 and (stem == case["case"] or stem not in names)  # another may fall back on it
            named.append({**case, "stem": stem if stem and unique else case["case"]})
        super().__init__(named, transform)

    def _transform(self, index: int) -> dict:
        case = self.data[index]
        try:
            if self.records and all(record.is_done(case) for record in self.records):
                return {"case": case["case"], "stem": case["stem"], DONE: True}
            check_source(case, self.output_format)
            return super()._transform(index)
        except Exception as error:  # whatever a file may hold
            return {"case": case["case"], ERROR: reason(error)}


def _stem(case: Mapping) -> str:
    name = Path(case["image"]).name
    return next((name[: -len(ending)] for ending in (".nii.gz", ".nii") if name.endswith(ending)), "")


class CaseSampler(DistributedSampler):
    """Divides the cases among the processes (torchrun), none of them twice to fill up.

    Args:
        dataset: the cases.

    Raises:
        ValueError: if there are fewer cases than processes.
    """

    def __init__(self, dataset: CaseDataset) -> None:
        n_cases, n_processes = len(dataset), idist.get_world_size()
        if n_cases < n_processes:
            raise ValueError(
                f"{n_cases} cases for {n_processes} processes: start at most as many processes as cases, "
                f"--nproc_per_node {n_cases}."
            )
        super().__init__(dataset, even_divisible=False, shuffle=False)
