"""Checks of what the methods are given, before any work; each error names the setting, its rule and its value."""

from __future__ import annotations

from collections.abc import Sequence

from custom_modules.diffusion import NUM_TRAIN_TIMESTEPS

LAST = NUM_TRAIN_TIMESTEPS - 1  # noisiest timestep


def check_cdm(
    noise_level: int | Sequence[int], num_steps: int, num_draws: int, tau: float, guidance_scale: float
) -> list[int]:
    """Checks the settings of `CDM` and returns the noise levels as a list.

    Raises:
        ValueError: if a setting is out of its range.
    """
    levels = list(noise_level) if isinstance(noise_level, Sequence) else [noise_level]
    if not levels or not all(_is_integer(q, 1, LAST) for q in levels):
        raise ValueError(f"noise_level (Q) must be an integer in 1..{LAST}, or a list of them; got {noise_level}.")
    if not _is_integer(num_steps, 1, min(levels)):
        raise ValueError(
            f"num_steps (R) must be an integer >= 1 and <= noise_level (Q); got R={num_steps}, Q={noise_level}."
        )
    if not isinstance(num_draws, int) or num_draws < 1:
        raise ValueError(f"num_draws must be an integer >= 1; got {num_draws}.")
    if not 0 <= tau < 1:
        raise ValueError(f"tau must be in [0, 1): at 1 the two conditions are the same; got {tau}.")
    _check_scale(guidance_scale)
    return levels


def check_cg_diff(noise_level: int, guidance_scale: float, stride: int) -> None:
    """Checks the settings of `CGDiff`.

    Raises:
        ValueError: if a setting is out of its range.
    """
    if not _is_integer(noise_level, 1, LAST):
        raise ValueError(f"noise_level (L) of CG-Diff must be one integer in 1..{LAST}, not a list; got {noise_level}.")
    if not _is_integer(stride, 1, noise_level):
        raise ValueError(
            f"stride must be an integer >= 1 and <= noise_level (L); got stride={stride}, L={noise_level}."
        )
    _check_scale(guidance_scale)


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and low <= value <= high


def _check_scale(guidance_scale: float) -> None:
    if not guidance_scale >= 0:  # nan too
        raise ValueError(f"guidance_scale (s) must be >= 0; got {guidance_scale}.")
