"""Datalists for leave_two_out.yaml: two BraTS volumes are the test, all others with the LGG training patients train.

python -m benchmarks.leave_two_out lgg_brats.json PAIRS
"""

from __future__ import annotations

import sys
from pathlib import Path

from custom_modules.files import read_json, write_json


def main(datalist: str, folder: str) -> None:
    """Write one datalist for each pair of BraTS volumes into a folder.

    Args:
        datalist: JSON with the sections `training` (LGG patients and BraTS volumes) and `test`.
        folder: for `without_<patient>_<patient>.json`.
    """
    content = read_json(datalist)
    brats = [case for name in ("test", "training") for case in content[name] if case["case"].startswith("BraTS")]
    others = [case for case in content["training"] if case not in brats]
    for k in range(0, len(brats), 2):
        pair = brats[k : k + 2]
        split = {"training": others + [case for case in brats if case not in pair], "validation": [], "test": pair}
        path = Path(folder) / f"without_{'_'.join(case['case'].rpartition('_')[2] for case in pair)}.json"
        write_json(path, content | split)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
