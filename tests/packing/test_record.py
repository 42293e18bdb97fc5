"""Only exports of the very bundle that is packed are packed with it."""

from __future__ import annotations

import json
import shutil

import pytest

import custom_modules
from packing import pack, record
from tests.helpers.bundles import REPO


def write_export(folder, bundle, **knobs):
    """A folder as `packing.export` leaves it, without the minutes."""
    folder.mkdir(parents=True)
    (folder / "model.ts").write_bytes(b"traced")
    said = record.describe(folder, bundle / "configs" / "inference.yaml", bundle / "models" / "model.pt", knobs)
    (folder / record.RECORD).write_text(json.dumps(said))


def test_exported_models_are_taken_along_and_nothing_else(tmp_path):
    bundle = tmp_path / "brats_flair"
    shutil.copytree(REPO / "bundles" / "brats_flair", bundle)
    for stray in ("models/checkpoint_epoch=1.pt", "runs/cache/p0.npy", "custom_modules/__pycache__/data.pyc"):
        (bundle / stray).parent.mkdir(parents=True, exist_ok=True)
        (bundle / stray).write_bytes(b"stray")
    before = pack.contents(bundle, tmp_path / "exports").keys()
    assert not [name for name in before if "checkpoint_epoch" in name or "cache" in name]
    write_export(tmp_path / "exports", bundle)
    files = pack.contents(bundle, tmp_path / "exports")
    assert files.keys() - before == {"models/model.ts"} and b"  models/model.ts\n" in files["SHA256SUMS"]


def say(exports, **said):
    path = exports / record.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def append(path, text):
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, e: (b / "models" / "model.pt").write_bytes(b"trained again"), "models/model.pt was another file"),
        (lambda b, e: append(b / "configs" / "inference.yaml", "#"), "inference.yaml was another file"),
        (lambda b, e: append(b / "configs" / "metadata.json", " "), "metadata.json was another file"),
        (lambda b, e: say(e, version="0.0.1"), f"of version 0.0.1, the bundle of {custom_modules.__version__}"),
        (lambda b, e: say(e, knobs={"ckpt_path": "/home/me/m.pt", "tau": 0}), "with --ckpt_path --tau"),
        (lambda b, e: (e / "model.ts").write_bytes(b"of another export"), "model.ts was not made then, or differs"),
        (lambda b, e: (e / "stray.ts").write_bytes(b""), "stray.ts was not made then"),
        (lambda b, e: (e / record.RECORD).unlink(), "has no export.json"),
        (lambda b, e: (e / record.RECORD).write_text("{"), "has no export.json"),
    ],
)
def test_the_export_of_something_else_is_not_packed(change, message, tmp_path):
    bundle, exports = tmp_path / "brats_flair", tmp_path / "exports"
    shutil.copytree(REPO / "bundles" / "brats_flair", bundle)
    write_export(exports, bundle)
    change(bundle, exports)
    with pytest.raises(ValueError, match=message) as error:
        pack.contents(bundle, exports)
    assert str(error.value).endswith(f"Export brats_flair again (make export), or remove {exports}.")
    assert "/home/me" not in str(error.value)


def test_nothing_is_packed_where_one_bundle_cannot_be(tmp_path):
    write_export(tmp_path / "exports" / "chaos_kidney", REPO / "bundles" / "chaos_kidney", tau=0.5)
    with pytest.raises(SystemExit, match="error: .*chaos_kidney as it is: it was made with --tau"):
        pack.main(["--output_dir", str(tmp_path / "dist"), "--export_dir", str(tmp_path / "exports")])
    assert not (tmp_path / "dist").exists()
