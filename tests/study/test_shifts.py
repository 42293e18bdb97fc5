"""The shift study: what each change does, and a study of tiny networks that continues where it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from study.__main__ import main
from study.shifts import run as shift_study
from study.shifts.changes import SHIFTS
from tests.helpers.bundles import head
from tests.helpers.studies import BUNDLE, FAST


@pytest.mark.parametrize("kind", SHIFTS)
def test_a_change_is_seeded_and_moves_the_label_with_the_image(kind):
    image, lesion = (torch.as_tensor(volume)[None].float() for volume in head())
    shift, copy = SHIFTS[kind], image.clone()
    for strength in shift.strengths:
        (changed, truth), again = (shift.apply(image, lesion, strength, "p0") for _ in range(2))
        assert torch.equal(changed, again[0]) and torch.equal(truth, again[1]) and torch.equal(image, copy)
        assert changed.dtype == torch.float32 and changed.isfinite().all()
        assert changed.shape == truth.shape and (changed.shape != image.shape or not torch.equal(changed, image))
        assert set(truth.unique().tolist()) == {0, 1}
        if shift.label is None:
            assert torch.equal(truth, lesion)


def test_the_lesion_stays_where_the_label_says():
    image, lesion = (torch.as_tensor(volume)[None].float() for volume in head())
    for kind in (kind for kind, shift in SHIFTS.items() if shift.label):
        changed, truth = SHIFTS[kind].apply(image, lesion, SHIFTS[kind].strengths[1], "p0")
        assert changed[truth > 0].mean() > 1.2 * changed[(truth == 0) & (changed > 50)].mean()


def test_a_study_continues_where_it_was(dataset, trained, tmp_path, monkeypatch, capsys):
    few = {kind: SHIFTS[kind] for kind in ("offset (of bright)", "every n-th slice")}
    monkeypatch.setattr(shift_study, "SHIFTS", few)
    given = ["--bundle", str(BUNDLE), "--dataset_dir", str(dataset), "--datalist", str(dataset / "datalist.json")]
    given += ["--output_dir", str(tmp_path), "--ckpt_path", str(trained.weights), "--method=intensity", "--gate=all"]
    main(["shifts", *given, *FAST])
    file = tmp_path / "cases" / "p2.json"
    found = json.loads(file.read_text())
    assert list(found) == [name for name, *_ in shift_study.changes()]
    assert all(isinstance(dice, float) for dice in found.values()) and found["unchanged"] > 0.3
    assert found["offset (of bright): 1"] == pytest.approx(found["unchanged"], abs=0.02)
    assert "| unchanged | 0 |" in (tmp_path / "shifts.md").read_text() and (tmp_path / "shifts.png").is_file()

    file.write_text(json.dumps(found | {"unchanged": 0.125, "offset (of bright): 100": "OSError: lost"}))
    main(["shifts", *given, *FAST])
    again = json.loads(file.read_text())
    assert again == found | {"unchanged": 0.125}  # the failure alone is tried again
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert rows[1]["difference"] == pytest.approx(found["offset (of bright): 1"] - 0.125)
    with pytest.raises(SystemExit, match="holds a study with other .*settings"):
        main(["shifts", *given, *FAST, "--seed=1"])
    assert np.isclose(rows[1]["volume_dice"], found["offset (of bright): 1"])
