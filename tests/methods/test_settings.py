"""Settings out of their range are errors that name the setting, its rule and its value."""

from __future__ import annotations

import math

import pytest

from custom_modules.diffusion import Diffusion
from custom_modules.methods.cg_diff import CGDiff
from tests.helpers.gaussian import cdm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_level": 0}, r"noise_level \(Q\) must be an integer in 1\.\.999.*got 0"),
        ({"noise_level": 1000}, r"noise_level \(Q\).*1\.\.999.*got 1000"),
        ({"noise_level": 400.5}, r"noise_level \(Q\).*integer.*got 400\.5"),
        ({"noise_level": "high"}, r"noise_level \(Q\).*integer.*got high"),
        ({"noise_level": []}, r"noise_level \(Q\).*got \[\]"),
        ({"noise_level": [400, -1]}, r"noise_level \(Q\).*got \[400, -1\]"),
        ({"num_steps": 500}, r"num_steps \(R\) must be .*<= noise_level \(Q\); got R=500, Q=400"),
        ({"num_steps": 0}, r"num_steps \(R\) must be .*>= 1.*got R=0, Q=400"),
        ({"num_steps": 2.5}, r"num_steps \(R\) must be an integer.*got R=2\.5"),
        ({"noise_level": [400, 5]}, r"num_steps \(R\).*<= noise_level \(Q\); got R=10, Q=\[400, 5\]"),
        ({"num_draws": 0}, r"num_draws must be .*>= 1; got 0"),
        ({"num_draws": 1.5}, r"num_draws must be an integer.*got 1\.5"),
        ({"tau": 1}, r"tau must be in \[0, 1\).*got 1"),
        ({"tau": -0.1}, r"tau must be in \[0, 1\).*got -0\.1"),
        ({"guidance_scale": -1}, r"guidance_scale \(s\) must be >= 0; got -1"),
        ({"derivative": "exakt"}, r"derivative must be one of \[.*'finite_difference'.*\]; got 'exakt'"),
    ],
)
def test_wrong_settings_of_cdm_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        cdm(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_level": [400, 200]}, r"noise_level \(L\).*one integer in 1\.\.999, not a list; got \[400, 200\]"),
        ({"noise_level": 0}, r"noise_level \(L\).*1\.\.999.*got 0"),
        ({"noise_level": 1000}, r"noise_level \(L\).*1\.\.999.*got 1000"),
        ({"noise_level": 400.0}, r"noise_level \(L\).*one integer.*got 400\.0"),
        ({"stride": 0}, r"stride must be .*>= 1.*got stride=0, L=400"),
        ({"stride": 401}, r"stride must be .*<= noise_level \(L\); got stride=401, L=400"),
        ({"stride": 2.5}, r"stride must be an integer.*got stride=2\.5"),
        ({"guidance_scale": -1}, r"guidance_scale \(s\) must be >= 0; got -1"),
        ({"guidance_scale": math.nan}, r"guidance_scale \(s\) must be >= 0; got nan"),
    ],
)
def test_wrong_settings_of_cg_diff_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CGDiff(Diffusion(), **{"noise_level": 400, **settings})
