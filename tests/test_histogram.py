"""Activation histograms and the steps found on them, against the raw values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import histogram
from quantize.errors import LabelfreeError
from quantize.histogram import Histogram

LEVELS = (15, 127, 255)


def of(x: np.ndarray) -> Histogram:
    seen = Histogram()
    seen.update(np.ascontiguousarray(x, np.float32))
    return seen


def raw_loss(x: np.ndarray, step: float, levels: int) -> float:
    """The formula, on the values themselves."""
    x = np.maximum(x.astype(np.float64), 0)
    return float(np.square(x - step * np.clip(np.floor(x / step + 0.5), 0, levels)).sum())


def samples(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        np.maximum(rng.normal(0, 1, 4000), 0),
        rng.exponential(1e-6, 3000),
        rng.lognormal(0, 2, 3000) * 1e6,
        np.maximum(rng.standard_t(2, 3000), 0),
        rng.uniform(0, 1, 50),
        np.full(7, 3.25),
        np.array([1e-30, 2e-30, 0.0]),
    ]


@pytest.mark.parametrize("levels", LEVELS)
def test_the_optimal_step_is_as_good_as_any(levels: int) -> None:
    for x in samples(levels):
        x = x.astype(np.float32)
        found = raw_loss(x, histogram.optimal_step(of(x), levels), levels)
        candidates = float(x.max()) / levels * np.geomspace(1 / 64, 2 * levels, 20_000)
        best = min(raw_loss(x, step, levels) for step in candidates[:: max(1, len(x) // 300)])
        energy = float(np.square(x, dtype=np.float64).sum())
        assert found <= best * (1 + 1e-3) + 1e-7 * energy


@pytest.mark.parametrize("levels", LEVELS)
def test_the_reference_step_is_the_iteration_on_raw_values(levels: int) -> None:
    for x in samples(levels)[:5]:
        x = x.astype(np.float32).astype(np.float64)
        step = x.max() / levels
        while True:
            q = np.clip(np.floor(x / step + 0.5), 0, levels)
            following = (x @ q) / (q @ q)
            if raw_loss(x, following, levels) > raw_loss(x, step, levels):
                break
            change, step = abs(following - step) / following, following
            if change <= 1e-3:
                break
        assert histogram.reference_step(of(x), levels) == pytest.approx(step, rel=2e-3)


@given(st.integers(0, 2**32), st.sampled_from(LEVELS), st.floats(1e-3, 2))
@settings(max_examples=30)
def test_loss_and_clipped_share_are_those_of_the_values(seed: int, levels: int, factor: float) -> None:
    x = np.maximum(np.random.default_rng(seed).normal(0, 1, 500), 0).astype(np.float32)
    if not x.any():
        return
    step = factor * float(x.max()) / levels
    energy = float(np.square(x, dtype=np.float64).sum())
    found = histogram.loss(of(x), step, levels)
    assert found == pytest.approx(raw_loss(x, step, levels), rel=2e-2, abs=1e-6 * energy)
    share = (x > levels * step).sum() / (x > 0).sum()
    assert histogram.clipped_share(of(x), step, levels) == pytest.approx(share, abs=0.01)


@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1), st.integers(0, 100))
def test_merged_is_the_whole(values: list[float], cut: int) -> None:
    x = np.array(values, np.float32)
    merged = of(x[:cut]).merged(of(x[cut:]))
    for a, b in zip(merged.positive(), of(x).positive(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert merged.count == len(x)
    assert merged.maximum == pytest.approx(float(x.max()), rel=2**-12, abs=2e-42)


def test_zeros_and_negatives_are_zeros() -> None:
    seen = of(np.array([-1, -0.0, 0.0, -3e38], np.float32))
    assert (seen.count, seen.maximum, seen.energy) == (4, 0.0, 0.0)
    assert histogram.optimal_step(seen, 127) > 0
    assert histogram.reference_step(seen, 127) > 0
    assert histogram.clipped_share(seen, 1.0, 127) == 0


def test_denormals_have_a_step_too() -> None:
    seen = of(np.array([1e-40, 2e-40], np.float32))
    assert 0 < histogram.optimal_step(seen, 127) < 1e-38


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_values_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(LabelfreeError, match="not finite"):
        of(np.array([1, bad], np.float32))
