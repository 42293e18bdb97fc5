"""Datalists for leave_two_out.yaml: two BraTS volumes are the test, all others with the LGG training patients train.

python -m benchmarks.leave_two_out lgg_brats.json PAIRS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(datalist: str, folder: str) -> None:
    content = json.loads(Path(datalist).read_text(encoding="utf-8"))
    sections = ("test", "training")
    brats = [case for section in sections for case in content[section] if case["case"].startswith("BraTS")]
    others = [case for case in content["training"] if case not in brats]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for k in range(0, len(brats), 2):
        pair = brats[k : k + 2]
        split = {"training": others + [case for case in brats if case not in pair], "validation": [], "test": pair}
        path = Path(folder) / f"without_{'_'.join(case['case'].rpartition('_')[2] for case in pair)}.json"
        path.write_text(json.dumps(content | split, indent=1), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
