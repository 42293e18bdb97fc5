"""Figure 1: image, truth and maps lie over each other, and the two steps are those of Eq. (5)."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cdm import CDM, slice_noise
from study.figures.denoising import draw_denoising, one_step
from study.plan import read_knobs
from tests.helpers.bundles import BUNDLES, LPS, REPO, TINY, config, head, save_nifti
from tests.helpers.studies import texts


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
    given = read_knobs(knobs, [[REPO / config(bundle, "inference")]])
    figure = draw_denoising(REPO / config(bundle, "inference"), tmp_path / "p_flair.nii.gz", knobs=given)
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
        draw_denoising(REPO / config("brats_flair", "inference"), path)
