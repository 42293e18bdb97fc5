"""The cases of a run: named, checked, and shared by several processes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import ignite.distributed as idist
from monai.data import DataLoader, Dataset, DistributedSampler

from custom_modules.data.dicom import OUTPUT_FORMATS, check_source
from custom_modules.files import NIFTI, check_name, flat_name, folded, stamp, stem_of

DONE, ERROR, STAMP = "done", "error", "stamp"


def reason(error: BaseException) -> str:
    """Gives the innermost cause of an error on one line: MONAI wraps each transform's error in one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if "cannot find a suitable writer" in text:  # MONAI's SaveImage puts the traceback of what happened in the message
        text = next(reversed(re.findall(r"^\w[\w.]*: .*", text, re.MULTILINE)), text)
        return " ".join(text.split())
    return f"{type(error).__name__}: {' '.join(text.split())}"


class CaseDataset(Dataset):
    """MONAI's `Dataset`, but a case that cannot be read is an item {"case", "error"} instead of an exception.

    Args:
        data: cases {"case", "image", ...}; one with an "error" becomes such an item. Each gets "stem", the name of its
            results: the image's file name without its ending, or the case's name for a DICOM series and wherever two
            stems would collide.
        transform: MONAI transforms of one case.
        records: handlers that write results; a case for which all of them say `is_done(case)` is not prepared, but an
            item {"case", "stem", "done"}.
        overwrite: no case counts as done.
        output_format: `nifti`, or `dicom_seg`, for which an image has to be a DICOM series.

    Raises:
        ValueError: `output_format` is neither.
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
        super().__init__([{**case, "stem": stem} for case, stem in zip(data, _unique_stems(data))], transform)

    def _transform(self, index: int) -> dict:
        case = self.data[index]
        try:
            check_name(case["stem"])
            if ERROR in case:
                raise ValueError(case[ERROR])
            if self.records and all(record.is_done(case) for record in self.records):
                return {"case": case["case"], "stem": case["stem"], DONE: True}
            before = stamp(case["image"])
            check_source(case, self.output_format)
            return {**super()._transform(index), STAMP: before}
        except Exception as error:  # whatever a file may hold
            return {"case": case["case"], ERROR: reason(error)}


def _unique_stems(cases: Sequence[Mapping]) -> list[str]:
    names = [flat_name(case["case"]) for case in cases]
    files = [case["image"] if NIFTI.search(case["image"]) else None for case in cases]
    stems = [flat_name(stem_of(file)) if file else name for file, name in zip(files, names)]
    counts, taken = Counter(map(folded, stems)), set(map(folded, names))  # another case may fall back on its name
    return [
        stem if counts[folded(stem)] == 1 and (folded(stem) == folded(name) or folded(stem) not in taken) else name
        for name, stem in zip(names, stems)
    ]


class LoaderAhead(DataLoader):
    """MONAI's `DataLoader`, but a thread prepares the next batch while one is computed.

    `ThreadDataLoader` does, too, but an error in its thread ends the run as if all cases had been done.
    """

    def __iter__(self) -> Iterator:
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as thread:
            following = thread.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = thread.submit(next, batches, None)
                yield batch


class CaseSampler(DistributedSampler):
    """Divides the cases among the processes (torchrun) without repeating any to even out the shares.

    Args:
        dataset: the cases.

    Raises:
        ValueError: there are fewer cases than processes.
    """

    def __init__(self, dataset: CaseDataset) -> None:
        n_cases, n_processes = len(dataset), idist.get_world_size()
        if n_cases < n_processes:
            raise ValueError(
                f"{n_cases} cases for {n_processes} processes: start at most as many processes as cases, "
                f"--nproc_per_node {n_cases}."
            )
        super().__init__(dataset, even_divisible=False, shuffle=False)
