"""The record beside a result: how it was made, and when it counts as done."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import monai
import pytest
import torch
from monai.transforms import Compose

import custom_modules
from custom_modules.files import write_json
from custom_modules.inference import provenance
from custom_modules.inference.cases import CaseDataset
from custom_modules.inference.provenance import Provenance
from custom_modules.knobs import command_line
from tests.helpers.evaluators import PREPROCESSING, Collect, evaluator, save_cases

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc": FIPS 180-2, appendix B.1


@pytest.fixture
def cases(tmp_path) -> list[dict]:
    return save_cases(tmp_path)


def write_volumes(tmp_path) -> list[Path]:
    """The volumes of the case "fine", each with its name in it; inference would have written them."""
    files = [tmp_path / "out" / "fine" / f"fine_{volume}.nii.gz" for volume in ("mask", "saliency")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name.split("_")[1].split(".")[0])
    return files


def test_provenance_tells_how_a_result_came_to_be(cases, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"abc")
    settings = {"method": "cdm", "noise_level": [400, 300], "seed": 0, "threshold": "otsu"}
    provenance = Provenance(str(tmp_path / "out"), str(tmp_path / "model.pt"), settings)
    with pytest.raises(RuntimeError, match="case_dark"):
        evaluator(cases[1:3], gate="tags", handlers=[provenance]).run()
    written = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written == [Path("fine/fine_provenance.json")]  # nothing for the failed case
    text = (tmp_path / "out" / written[0]).read_text()
    assert '"slice_labels": [1, 0, 1]' in text, "lists of numbers are written on one line"
    facts = json.loads(text)
    assert facts.pop("seconds_per_slice") >= 0
    assert facts == {
        "case": "case_fine",
        "image": cases[2]["image"],
        "label": None,
        "warnings": [],
        "slices_processed": 2,
        "settings": settings,
        "overrides": {},
        "config_sha256": None,
        "weights_sha256": ABC,
        "gate_weights_sha256": None,
        "image_sha256": hashlib.sha256(Path(cases[2]["image"]).read_bytes()).hexdigest(),
        "channel": None,
        "slice_labels": [1, 0, 1],
        "outputs_sha256": {"mask.nii.gz": None, "saliency.nii.gz": None},  # nothing here writes them
        "versions": {
            "custom_modules": custom_modules.__version__,
            "monai": monai.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def test_a_result_counts_once_it_is_whole(cases, tmp_path):
    case = CaseDataset(cases, PREPROCESSING).data[2]
    provenance = Provenance(str(tmp_path / "out"), None, {"blur": 3})
    assert not provenance.is_done(case)
    evaluator(cases[2:], handlers=[provenance]).run()
    assert not provenance.is_done(case), "its volumes are not there"
    mask, saliency = write_volumes(tmp_path)
    assert not provenance.is_done(case), "they are not those of the record"
    evaluator(cases[2:], handlers=[provenance]).run()
    assert provenance.is_done(case)
    mask.write_text("saliency")
    saliency.write_text("mask")
    assert not provenance.is_done(case), "swapped"
    write_volumes(tmp_path)
    assert provenance.is_done(case)
    assert not Provenance(str(tmp_path / "out"), None, {"blur": 2}).is_done(case)
    assert not Provenance(str(tmp_path / "out"), None, {"blur": 3}, cases[0]["image"]).is_done(case), "another gate"
    assert not provenance.is_done(case | {"channel": 1})


def test_what_a_reader_should_know_is_recorded_and_said_at_the_end(cases, tmp_path, caplog):
    (tmp_path / "model.pt").write_bytes(b"abc")
    (tmp_path / "model.training.txt").write_text("case_last\n")

    def odd(item):
        return {**item, "unlike_contrast": 1.7} if item["case"] == "case_fine" else {**item, "pred": item["pred"] * 0}

    provenance = Provenance(str(tmp_path / "out"), str(tmp_path / "model.pt"), {})
    evaluator(cases[2:], handlers=[provenance], postprocessing=Compose([odd])).run()
    fine, last = (
        json.loads((tmp_path / "out" / name / f"{name}_provenance.json").read_text()) for name in ("fine", "last")
    )
    assert fine["unlike_contrast"] == 1.7 and len(fine["warnings"]) == 1
    assert fine["warnings"][0].startswith("unlike the training volumes in contrast or texture (1.7 times the limit)")
    assert [text.split(":")[0] for text in last["warnings"]] == [
        "nothing was found",
        "a case of this name was in the training of the weights",
    ]
    assert "2 of 2 cases have warnings, look at their masks: case_fine, case_last (" in caplog.text


def test_provenance_goes_before_its_result_does(cases, tmp_path):
    def refuse(item):
        raise OSError("No space left on device")

    provenance = Provenance(str(tmp_path), None, {})
    evaluator(cases[2:3], handlers=[provenance]).run()
    path = tmp_path / "fine" / "fine_provenance.json"
    assert path.is_file()
    with pytest.raises(RuntimeError, match="No space left"):
        evaluator(cases[2:3], handlers=[provenance], postprocessing=Compose([refuse])).run()
    assert not path.exists()


def test_a_record_that_cannot_be_written_fails_its_case_alone(cases, tmp_path, monkeypatch):
    def full(path, facts):
        if facts["case"] == "case_fine":
            raise OSError("No space left on device")
        write_json(path, facts)

    monkeypatch.setattr(provenance, "write_json", full)
    collect = Collect()
    with pytest.raises(RuntimeError, match="1 of 2 cases failed:\n  case_fine: OSError: No space left on device$"):
        evaluator(cases[2:], handlers=[Provenance(str(tmp_path / "out"), None, {}), collect]).run()
    assert [len(output) for output in collect.outputs] == [0, 1], "later handlers do not count it"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last"]


def test_an_image_that_is_replaced_during_the_run_fails_its_case(cases, tmp_path):
    def replace(item):
        copy = Path(cases[2]["image"]).with_suffix(".copy")
        copy.write_bytes(Path(cases[3]["image"]).read_bytes())
        copy.replace(cases[2]["image"])
        return item

    with pytest.raises(RuntimeError, match="case_fine: ValueError: its image was replaced .* run the same command"):
        evaluator(cases[2:3], handlers=[Provenance(str(tmp_path), None, {})], postprocessing=Compose([replace])).run()
    assert not (tmp_path / "fine" / "fine_provenance.json").exists()


def test_overrides_and_the_first_config_count_and_overlays_do_not(cases, tmp_path):
    program = "/somewhere/monai/bundle/__main__.py"
    inference, overlay = tmp_path / "inference.yaml", tmp_path / "overlay.yaml"
    inference.write_bytes(b"abc")

    def provenance(*words) -> Provenance:
        return Provenance(str(tmp_path / "out"), None, {}, command=command_line([program, "run", *words]))

    first = ["--config_file", str(inference), "--methods#cdm#tau", "0.5", "--batch_size", "4"]
    write_volumes(tmp_path)
    evaluator(cases[2:3], handlers=[provenance(*first)]).run()
    facts = json.loads((tmp_path / "out" / "fine" / "fine_provenance.json").read_text())
    assert facts["overrides"] == {"methods#cdm#tau": "0.5"} and facts["config_sha256"] == ABC
    case = CaseDataset(cases, PREPROCESSING).data[2]
    files = f"['{inference}','{overlay}']"
    assert provenance(*first).is_done(case)
    assert provenance("--config_file", files, "--methods::cdm::tau=0.5").is_done(case)
    assert not provenance("--config_file", files).is_done(case)
    assert not provenance(*first[:3], "0.6").is_done(case)
    assert not provenance(*first, "--preprocessing#transforms#8#upper", "99").is_done(case)
    inference.write_text("edited")
    assert not provenance(*first).is_done(case)


def test_a_second_run_in_one_folder_is_refused_until_the_first_ends(cases, tmp_path):
    first = start_locked(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another process is writing to .*out; wait for it"):
            evaluator(cases[2:3], handlers=[Provenance(str(tmp_path / "out"), None, {})]).run()
    first.kill()
    first.wait()
    first.stdout.close()
    for _ in range(2):
        evaluator(cases[2:3], handlers=[Provenance(str(tmp_path / "out"), None, {})]).run()


def start_locked(folder: Path) -> subprocess.Popen:
    """A process that holds the lock of `folder`, and has a child that outlives it."""
    code = (
        "import os, sys, time; from custom_modules.files import lock_folder; lock_folder(sys.argv[1])\n"
        "if os.fork() == 0: time.sleep(5); os._exit(0)\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process
