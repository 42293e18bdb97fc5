"""The evaluator over volumes: names of results, what a failed case leaves behind, and the record beside each result."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path

import monai
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, LoadImaged
from torch import distributed, nn

import custom_modules
from custom_modules.data.tag_volume import TagVolumed
from custom_modules.files import sha256, write_json
from custom_modules.inference import cases as cases_module
from custom_modules.inference import evaluator as evaluator_module
from custom_modules.inference import provenance
from custom_modules.inference.cases import CaseDataset, CaseSampler, reason
from custom_modules.inference.checks import CheckVolumed
from custom_modules.inference.evaluator import VolumeBatch, VolumeEvaluator
from custom_modules.inference.inferer import SaliencyInferer
from custom_modules.inference.provenance import Provenance
from tests.helpers.bundles import LPS, save_nifti

PREPROCESSING = Compose(
    [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        EnsureTyped("image", dtype=torch.float32),
        CheckVolumed("image"),
        TagVolumed(),
    ]
)


# ---- reason


def raised(*errors: Exception) -> Exception:
    """The last of `errors`, each the cause of the next."""
    caught = None
    for error in errors:
        try:
            raise error from caught
        except Exception as current:
            caught = current
    return caught


def test_reason_is_the_innermost_cause_in_one_line():
    assert reason(ValueError("tau must be\n  in [0, 1)")) == "ValueError: tau must be in [0, 1)"
    error = raised(OSError("disk full"), RuntimeError("applying transform A"), RuntimeError("applying transform B"))
    assert reason(error) == "OSError: disk full"
    assert reason(KeyError()) == "KeyError: "


def test_reason_sees_through_monai():
    with pytest.raises(RuntimeError, match="applying transform") as caught:
        Compose([EnsureTyped("image"), CheckVolumed("image")])({"image": np.zeros((1, 2, 2, 2)), "case": "p1"})
    assert reason(caught.value).startswith("ValueError: case 'p1': the image is constant")


# ---- stems and items


def stems(*cases: tuple[str, str]) -> list[str]:
    return [item["stem"] for item in CaseDataset([{"case": c, "image": i} for c, i in cases], None).data]


def test_a_stem_is_the_file_name_without_its_ending():
    assert stems(("p1", "/a/p1_flair.nii.gz"), ("p2", "/a/scan.v2.nii")) == ["p1_flair", "scan.v2"]


def test_a_dicom_series_is_named_by_its_case(tmp_path):
    folder = tmp_path / "1" / "T2SPIR" / "DICOM_anon"
    assert stems(("1", str(folder)), ("2", str(folder.parents[2] / "2" / "DICOM_anon"))) == ["1", "2"]


def test_colliding_stems_give_way_to_the_case():
    assert stems(("a", "/a/t2.nii.gz"), ("b", "/b/t2.nii.gz"), ("c", "/c/t1.nii")) == ["a", "b", "t1"]
    assert stems(("a", "/a/t2.nii.gz"), ("b", "/b/t2.nii")) == ["a", "b"]  # they differ in their ending only


def test_a_stem_never_takes_the_name_of_another_case():
    assert stems(("a", "/x/b.nii.gz"), ("b", "/y/DICOM_anon")) == ["a", "b"]
    assert stems(("b", "/x/b.nii.gz"), ("a", "/y/DICOM_anon")) == ["b", "a"]


def test_dataset_items(tmp_path):
    good = save_nifti(np.arange(8, dtype=np.float32).reshape(2, 2, 2), tmp_path / "good.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    cases = [{"case": "p1", "image": str(good)}, {"case": "p2", "image": str(tmp_path / "bad.nii.gz")}]
    first, second = CaseDataset(cases, PREPROCESSING)
    assert first["case"] == "p1" and first["stem"] == "good" and first["image"].shape == (1, 2, 2, 2)
    assert second.keys() == {"case", "error"} and second["case"] == "p2"
    assert "stem" not in cases[0]  # the caller's cases are left as they are


@pytest.mark.parametrize(("n_processes", "share"), [(2, [1, 3]), (3, [1]), (4, None)])
def test_processes_share_the_cases_and_are_not_more_than_these(monkeypatch, n_processes, share):
    monkeypatch.setattr(distributed, "get_world_size", lambda: n_processes)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "is_available", lambda: True)
    monkeypatch.setattr(cases_module.idist, "get_world_size", lambda: n_processes)
    data = CaseDataset([{"case": f"p{i}", "image": f"/p{i}.nii"} for i in range(4 if share else 3)], None)
    if share is None:
        with pytest.raises(ValueError, match="^3 cases for 4 processes: start at most .*, --nproc_per_node 3.$"):
            CaseSampler(data)
    else:
        assert list(CaseSampler(data)) == share


# ---- the evaluator


def darkest_fails(x_0: torch.Tensor, network: nn.Module, slices: list[int]) -> torch.Tensor:
    """Half of the slice as its map; a picture darker than -0.4 everywhere is too much for it."""
    if x_0.max() < -0.4:
        raise ArithmeticError("the slice is\ntoo dark")
    return x_0 / 2


def volume(inside: float) -> np.ndarray:
    """(12, 12, 3) float32: a square of `inside` in air of -1."""
    image = np.full((12, 12, 3), -1, np.float32)
    image[2:10, 2:10] = inside
    return image


@pytest.fixture
def cases(tmp_path) -> list[dict]:
    """unreadable, dark (the method raises), then two that are fine."""
    (tmp_path / "unreadable.nii.gz").write_bytes(b"no volume")
    for name, inside in (("dark", -0.5), ("fine", 0.5), ("last", 1.0)):
        save_nifti(volume(inside), tmp_path / f"{name}.nii.gz")
    names = ("unreadable", "dark", "fine", "last")
    return [{"case": f"case_{n}", "image": str(tmp_path / f"{n}.nii.gz"), "slice_labels": [1, 0, 1]} for n in names]


def evaluator(cases: list[dict], gate: str = "all", handlers=(), postprocessing=None, records=()) -> VolumeEvaluator:
    return VolumeEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CaseDataset(cases, PREPROCESSING, records), batch_size=1),
        network=nn.Identity(),
        inferer=SaliencyInferer(darkest_fails, gate=gate, amp=False),
        prepare_batch=VolumeBatch(),
        postprocessing=postprocessing,
        val_handlers=list(handlers),
    )


class Collect:
    """Handler that keeps what every iteration puts out."""

    def __init__(self) -> None:
        self.outputs: list[list[dict]] = []

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.outputs.append(e.state.output))


def test_failed_cases_are_named_and_the_others_finished(cases):
    collect = Collect()
    engine = evaluator(cases, handlers=[collect])
    with pytest.raises(RuntimeError) as caught:
        engine.run()
    assert engine.failures.keys() == {"case_unreadable", "case_dark"}
    message = str(caught.value)
    assert message.startswith("2 of 4 cases failed:\n")
    assert "  case_dark: ArithmeticError: the slice is too dark" in message.splitlines()
    assert f"  case_unreadable: {engine.failures['case_unreadable']}" in message.splitlines()
    assert "unreadable.nii.gz" in engine.failures["case_unreadable"]
    assert [[item["case"] for item in output] for output in collect.outputs] == [[], [], ["case_fine"], ["case_last"]]
    for (item,), inside in zip(collect.outputs[2:], (0.5, 1.0), strict=True):
        saliency, region = item["pred"]
        expected = torch.as_tensor(volume(inside)) / 2  # what the method does to it
        torch.testing.assert_close(saliency.as_tensor(), expected)
        assert region.shape == expected.shape
        np.testing.assert_allclose(item["pred"].affine, LPS)
        assert item["stem"] == item["case"].removeprefix("case_")
        assert item["n_slices"] == 3 and item["seconds_per_slice"] >= 0


def test_a_run_without_failures_ends_well_and_forgets_earlier_ones(cases):
    engine = evaluator(cases[2:])
    engine.failures = {"case_of_yesterday": "gone"}
    engine.run()
    assert engine.failures == {}


def test_a_failure_in_postprocessing_counts_too(cases):
    def refuse(item):
        if "fine" in item["stem"]:
            raise OSError("No space left on device")
        return item

    engine = evaluator(cases[2:], postprocessing=Compose([refuse]))
    with pytest.raises(RuntimeError, match="1 of 2 cases failed:\n  case_fine: OSError: No space left on device$"):
        engine.run()


def test_all_processes_report_the_failures_of_all(cases, monkeypatch):
    def gather(mine):  # as if a second process had done its share
        return [mine, ({"case_b": "ValueError: its own"}, ["case_a", "case_b", "case_c"], ["a", "c"])]

    monkeypatch.setattr(evaluator_module.idist, "all_gather", gather)
    engine = evaluator(cases)
    with pytest.raises(RuntimeError) as caught:
        engine.run()
    message = str(caught.value).splitlines()
    assert message[0] == "3 of 7 cases failed:" and [line.split(":")[0] for line in message[1:]] == [
        "  case_b", "  case_dark", "  case_unreadable"
    ]  # fmt: skip


def test_what_is_on_record_is_not_prepared(cases, caplog):
    class Record:
        def __init__(self, *done):
            self.done = done

        def is_done(self, case):
            return case["stem"] in self.done

    caplog.set_level("INFO")
    records = [Record("unreadable", "fine", "last"), Record("dark", "fine", "unreadable")]  # both have to say so
    collect = Collect()
    engine = evaluator(cases, handlers=[collect], records=records)
    with pytest.raises(RuntimeError, match="1 of 4 cases failed:\n  case_dark"):
        engine.run()
    assert engine.done == ["unreadable", "fine"] and [len(output) for output in collect.outputs] == [0, 0, 0, 1]
    assert "case case_fine (3 of 4): there already" in caplog.text and "2 of 4 cases were there already" in caplog.text
    assert "done" not in CaseDataset(cases, PREPROCESSING, records, overwrite=True)[2]


def test_tags_reach_the_inferer(cases):
    collect = Collect()
    evaluator(cases[3:], gate="tags", handlers=[collect]).run()
    ((item,),) = collect.outputs
    assert item["n_slices"] == 2
    assert item["pred"][0].any(dim=0).any(dim=0).tolist() == [True, False, True]


def test_cases_without_tags_fail_one_by_one_under_gate_tags(cases):
    del cases[2]["slice_labels"]
    engine = evaluator(cases[2:], gate="tags")
    with pytest.raises(RuntimeError, match="1 of 2 cases failed:\n  case_fine: ValueError: gate is 'tags' but"):
        engine.run()


# ---- provenance

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc": FIPS 180-2, appendix B.1


def test_a_series_is_hashed_by_its_files_in_the_order_of_their_names(tmp_path):
    for name, content in (("3.dcm", b"c"), ("1.dcm", b"a"), ("2.dcm", b"b")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    assert sha256(tmp_path) == ABC


def test_provenance_tells_how_a_result_came_to_be(cases, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"abc")
    settings = {"method": "cdm", "noise_level": [400, 300], "seed": 0, "threshold": "otsu"}
    provenance = Provenance(str(tmp_path / "out"), str(tmp_path / "model.pt"), settings)
    with pytest.raises(RuntimeError, match="case_dark"):
        evaluator(cases[1:3], gate="tags", handlers=[provenance]).run()
    written = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written == [Path("fine/fine_provenance.json")]  # nothing for the failed case
    text = (tmp_path / "out" / written[0]).read_text()
    assert '"slice_labels": [1, 0, 1]' in text, "lists of numbers stand in one line"
    facts = json.loads(text)
    assert facts.pop("seconds_per_slice") >= 0
    assert facts == {
        "case": "case_fine",
        "image": cases[2]["image"],
        "label": None,
        "slices_processed": 2,
        "settings": settings,
        "overrides": {},
        "config_sha256": None,
        "weights_sha256": ABC,
        "gate_weights_sha256": None,
        "image_sha256": hashlib.sha256(Path(cases[2]["image"]).read_bytes()).hexdigest(),
        "channel": None,
        "slice_labels": [1, 0, 1],
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
    for volume in ("mask", "saliency"):
        (tmp_path / "out" / "fine" / f"fine_{volume}.nii.gz").touch()
    assert provenance.is_done(case)
    assert not Provenance(str(tmp_path / "out"), None, {"blur": 2}).is_done(case)
    assert not Provenance(str(tmp_path / "out"), None, {"blur": 3}, cases[0]["image"]).is_done(case), "another gate"
    assert not provenance.is_done(case | {"channel": 1})


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


def test_overrides_and_the_first_config_count_and_overlays_do_not(cases, tmp_path, monkeypatch):
    program = "/somewhere/monai/bundle/__main__.py"
    inference, overlay = tmp_path / "inference.yaml", tmp_path / "overlay.yaml"
    inference.write_bytes(b"abc")

    def provenance(*words) -> Provenance:
        monkeypatch.setattr(sys, "argv", [program, "run", *words])
        return Provenance(str(tmp_path / "out"), None, {})

    first = ["--config_file", str(inference), "--methods#cdm#tau", "0.5", "--batch_size", "4"]
    evaluator(cases[2:3], handlers=[provenance(*first)]).run()
    facts = json.loads((tmp_path / "out" / "fine" / "fine_provenance.json").read_text())
    assert facts["overrides"] == {"methods#cdm#tau": "0.5"} and facts["config_sha256"] == ABC
    for volume in ("mask", "saliency"):
        (tmp_path / "out" / "fine" / f"fine_{volume}.nii.gz").touch()
    case = CaseDataset(cases, PREPROCESSING).data[2]
    files = f"['{inference}','{overlay}']"
    assert provenance(*first).is_done(case)
    assert provenance("--config_file", files, "--methods::cdm::tau=0.5").is_done(case)
    assert not provenance("--config_file", files).is_done(case)
    assert not provenance(*first[:3], "0.6").is_done(case)
    assert not provenance(*first, "--preprocessing#transforms#8#upper", "99").is_done(case)
    inference.write_text("edited")
    assert not provenance(*first).is_done(case)
