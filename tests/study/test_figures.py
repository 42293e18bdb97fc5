"""Figures: the right cases, slices and values, drawn upright, and what is not there is said."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import CDM, slice_noise
from study.denoising import denoising, one_step
from study.figures import ablation, comparison, default_of, draw_study, main, ranked, strips
from study.pictures import BYTES, NothingToDraw, draw_image, panels, tissue
from study.results import Case, read_case, read_results
from study.runner import read_knobs
from tests.helpers.bundles import BUNDLES, REPO, TINY, config, head, save_nifti
from tests.helpers.studies import LARGEST, LPS, truth, write_study

SWEEPS = {
    **{f"guidance_scale={s}": {"method": "cg_cdm", "guidance_scale": s, "shift": 2} for s in (0, 0.1, 10, 1000)},
    **{f"num_steps={r}": {"method": "cg_cdm", "num_steps": r, "shift": r} for r in (1, 2)},
    **{f"threshold={t}": {"method": "cg_cdm", "threshold": t} for t in ("otsu", 0.5)},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    runs = {"cam": {"method": "layercam", "shift": 3}, "cdm": {"method": "cdm", "repeats": 2}}
    return write_study(tmp_path_factory.mktemp("study"), runs | {"cg": {"method": "cg_cdm"}})


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("swept"), SWEEPS)


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


# ---- slices the way they are looked at


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLP", "AIR", "PSL"])
@pytest.mark.parametrize(
    ("through", "corner"),
    [("S", "AR"), ("A", "SR"), ("R", "SA")],  # the patient's right is on the left, the front at the top or on the left
)
def test_planes_are_radiological(codes, through, corner):
    names = ("LR", "PA", "IS")
    ras = np.zeros((7, 6, 5), np.uint8)
    ras[tuple(-1 if pair[1] in corner + through else 0 for pair in names)] = 1  # on the last plane of three sizes
    stored = nib.Nifti1Image(ras, np.diag([2.0, 3, 4, 1]))
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", codes)))
    stored = stored.as_reoriented(turn)
    array = np.asarray(stored.dataobj)
    axis = next(i for i, code in enumerate(codes) if any(code in pair and through in pair for pair in names))
    case = Case("x", array, stored.affine, axis, None, array, array)
    plane = case.plane(array, case.largest())
    size = {"S": (6, 7), "A": (5, 7), "R": (5, 6)}[through]
    assert plane.shape == size and plane[0, 0] == 1 and plane.sum() == 1
    assert case.pixel == {"S": (3, 2), "A": (4, 2), "R": (4, 3)}[through]


def test_frame_holds_the_tissue_in_mm():
    image = np.zeros((40, 30))
    image[10:20, 5:25] = 1
    figure, axes = panels(1, 1, 2)
    draw_image(axes[0, 0], image, (3.0, 1.0), tissue(image))
    x, y = axes[0, 0].get_xlim(), axes[0, 0].get_ylim()
    assert x[0] < -0.5 and x[1] > 30.5 and np.isclose(sum(x) / 2, 15), "as wide as the 30 mm of the tissue's height"
    assert y[0] > 60 > 30 > y[1] and np.isclose(sum(y) / 2, 45), "rows run down"


def test_the_truth_is_that_of_the_target_labels(study):
    place = study / "cells" / "cg" / "seed0" / "case0"
    assert read_case(place).truth is None, "unknown: another organ's outline would be worse than none"
    assert np.array_equal(read_case(place, []).truth, truth()) and np.array_equal(read_case(place, [1]).truth, truth())
    assert not read_case(place, [2]).truth.any()


# ---- figure 2


@pytest.mark.parametrize(
    ("dice", "picks"),
    [
        ({}, []),
        ({"a": 0.5}, [("best", "a")]),
        ({"a": 0.1, "b": 0.5}, [("best", "b"), ("worst", "a")]),
        ({"a": 0.1, "b": 0.5, "c": 0.3}, [("best", "b"), ("median", "c"), ("worst", "a")]),
        ({"d": 0.5, "c": 0.5, "b": 0.5, "a": 0.5}, [("best", "a"), ("median", "c"), ("worst", "d")]),
    ],
)
def test_best_median_and_worst(dice, picks):
    assert ranked(dice) == picks


def test_comparison_draws_the_masks(study):
    axes = np.reshape(comparison(read_results(study)).axes, (3, 5))
    assert [texts(axis)[-1] for axis in axes[0]] == ["image", "truth", "cam", "cdm", "cg"]
    heads = [texts(line[0])[0].split() for line in axes]
    ranks = (("best", "p2"), ("median", "p3"), ("worst", "p1"))
    assert heads == [[f"{rank},", "slice", str(LARGEST), case] for rank, case in ranks]
    # p1 moved by 2, and by 3 more for cam; the square is 8 wide
    assert [texts(axis)[0] for axis in axes[2][2:]] == [f"{1 - 5 / 8:.2f}", f"{1 - 2 / 8:.2f}", f"{1 - 2 / 8:.2f}"]
    drawn = axes[2][3].images[1].get_array()
    assert np.array_equal(~drawn.mask, np.roll(truth(), 2, axis=0)[..., LARGEST].T)


def test_comparison_of_named_cases(study):
    figure = comparison(read_results(study), cases=["p3"])
    assert len(figure.axes) == 5 and "p3" in texts(figure.axes[0])[0]


def test_a_run_without_volumes_is_said(study, tmp_path):
    results = read_results(study)
    moved = study / "cells" / "cam" / "seed0" / "case0" / "case0_mask.nii.gz"
    moved.rename(tmp_path / moved.name)
    try:
        axes = np.reshape(comparison(results).axes, (3, 5))
    finally:
        (tmp_path / moved.name).rename(moved)
    assert texts(axes[2][2]) == ["not kept"] and texts(axes[1][2]) != ["not kept"]


# ---- figures 3 to 5


def test_ablation_shows_the_results(swept):
    results = read_results(swept)
    figure = ablation(results)
    panel = dict(zip(("guidance_scale", "num_steps", "threshold"), figure.axes))
    dice = {row["run"]: row["dice"]["mean"] for row in results.table}
    for knob, axis in panel.items():
        line = next(line for line in axis.lines if line.get_marker() == "o")
        values = [value for value, _ in results.sweeps[knob]]
        assert line.get_ydata() == pytest.approx([dice[f"{knob}={value}"] for value in values])
        assert list(line.get_xdata()) == (values if knob != "threshold" else [0, 1])
    assert panel["guidance_scale"].get_xscale() == "symlog" and panel["num_steps"].get_xscale() == "linear"
    assert [tick.get_text() for tick in panel["guidance_scale"].get_xticklabels()] == ["0", "0.1", "10", "1000"]
    marks = [[line.get_xdata()[0] for line in axis.lines if line.get_marker() == "None"] for axis in panel.values()]
    assert marks == [[10], [10], []]
    assert default_of(results, "guidance_scale") == 10 and default_of(results, "threshold") is None


def test_strips(swept):
    axes = np.reshape(strips(read_results(swept)).axes, (4, 5))
    assert [texts(axis)[0] for axis in axes[0, 1:]] == ["0", "0.1", "10 (default)", "1000"]
    assert [texts(axis)[:1] for axis in axes[2, 1:]] == [["1"], ["2"], [], []]
    assert texts(axes[0, 0]) == ["guidance scale s"] and texts(axes[2, 0]) == ["steps R"]
    assert texts(axes[1, 0]) == [f"p1\nslice {LARGEST}"], "the first case that is kept"
    assert texts(axes[3, 2])[0] == f"{1 - 4 / 8:.2f}", "p1 moved by 2, and by 2 of R = 2"


# ---- files


def test_a_study_is_drawn(study, swept):
    assert [path.name for path in draw_study(study)] == ["comparison.png"]
    paths = draw_study(swept)
    assert [path.name for path in paths] == ["ablation.png", "strips.png"]
    for path in (study / "comparison.png", *paths):
        assert path.stat().st_size <= BYTES and imread(path)[..., :3].std() > 0.1, path


def test_command_line(study, swept, tmp_path, capsys):
    main(["strips", str(swept), "--knobs", "threshold", "--output", str(tmp_path / "new" / "strips.png")])
    assert (tmp_path / "new" / "strips.png").is_file() and "strips.png" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing was swept"):
        main(["ablation", str(study), "--output", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match="keeps no volumes"):
        main(["comparison", str(swept), "--output", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit):
        main(["comparison", str(swept), "--output", str(tmp_path / "x.png"), "--ckpt_path", "x"])
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(NothingToDraw):
        strips(read_results(study))


# ---- figure 1


@pytest.mark.parametrize("bundle", BUNDLES)
def test_denoising(bundle, tmp_path):
    """Image and truth lie over each other on the network's grid, upright, on the slice with the largest target."""
    image = np.full((48, 40, 5), 0, np.float32)
    image[4:-4, 4:-4] = 100
    target = np.zeros(image.shape, np.uint8)
    target[10:20, 8:16, 1], target[10:26, 8:20, 3] = 2, 2
    to_rsa = nib.orientations.ornt_transform(nib.io_orientation(LPS), nib.orientations.axcodes2ornt("RSA"))
    for array, name in ((image + 60 * target, "p_flair"), (target, "p_seg")):
        nib.save(nib.Nifti1Image(array, LPS).as_reoriented(to_rsa), tmp_path / f"{name}.nii.gz")
    knobs = [*(knob for knob in TINY if "logging" not in knob), "--ckpt_path=null", "--stride=100", "--num_draws=1"]
    given = read_knobs(knobs, {"config_file": [REPO / config(bundle, "inference")], "training": {}})
    figure = denoising(REPO / config(bundle, "inference"), tmp_path / "p_flair.nii.gz", knobs=given)
    names = ["image", "truth", "CG-Diff:", "CG-Diff:", "step", "step", "CDM:"]
    assert [texts(axis)[0].split()[0] for axis in figure.axes] == names
    shown, mask = figure.axes[0].images[0].get_array(), ~figure.axes[1].images[1].get_array().mask
    assert shown.shape == mask.shape == (32, 32)
    bright = shown > (shown.max() + shown[16, 28]) / 2
    assert (bright & mask).sum() > 0.8 * (bright | mask).sum()
    assert mask[:16].sum() > mask[16:].sum() and mask[:, :16].sum() > mask[:, 16:].sum()  # it lies right and in front


def test_one_step_is_that_of_each_condition():
    """With eps_hat = 1 for y1 and 0 for y0, the two differ by the factor of eps_hat in Eq. (5)."""

    def network(x_t, t, y):
        return y[:, 1, None, None, None].expand_as(x_t)

    method = CDM(Diffusion(), noise_level=[300, 400], seed=3)
    with_y1, with_y0 = one_step(torch.zeros(1, 1, 4, 4), network, method, index=7)
    now, then = (float(method.diffusion.alphas_cumprod[t]) for t in (300, 299))
    factor = (1 - then) ** 0.5 - (then / now) ** 0.5 * (1 - now) ** 0.5
    assert torch.allclose(with_y1 - with_y0, torch.full((1, 1, 4, 4), factor), atol=1e-6)
    eps = slice_noise(with_y0, 3, 0, [7])
    assert torch.allclose(with_y0, (then / now) ** 0.5 * (1 - now) ** 0.5 * eps, atol=1e-5)


def test_denoising_needs_a_slice_or_a_label(tmp_path):
    image, _ = head()
    path = save_nifti(image, tmp_path / "p_flair.nii.gz")
    with pytest.raises(ValueError, match="name the slice, --slice K"):
        denoising(REPO / config("brats_flair", "inference"), path)
