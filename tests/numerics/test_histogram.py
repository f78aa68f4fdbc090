"""Histograms against the raw values, and steps against brute force on the raw values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantize.errors import LabelfreeError
from quantize.numerics.histogram import (
    CHUNK,
    DEAD_STEP,
    Histogram,
    clipped_share,
    loss,
    optimal_step,
    reference_step,
)

LEVELS = [15, 127, 255]


def histogram_of(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for x in arrays:
        histogram.update(x)
    return histogram


def assert_same(one: Histogram, other: Histogram) -> None:
    for mine, others in zip(one.means(signed=True), other.means(signed=True), strict=True):
        np.testing.assert_array_equal(mine, others)
    assert (one.zeros, one.minimum, one.maximum) == (other.zeros, other.minimum, other.maximum)


def raw_loss(x: np.ndarray, step: float, levels: int, signed: bool = False) -> float:
    q = np.clip(np.floor(x / step + 0.5), -levels if signed else 0, levels)
    return float(np.sum((x - step * q) ** 2))


def least_raw_loss(x: np.ndarray, levels: int) -> float:
    """Brute force: sort all steps at which any value changes its level, and add up what changes."""
    x = x[x > 0]
    level = np.arange(1, levels + 1)
    places = (x[:, None] / (level - 0.5)).ravel()
    order = np.argsort(-places)
    xq = np.cumsum(np.repeat(x, levels)[order])
    qq = np.cumsum(np.tile(2.0 * level - 1, len(x))[order])
    return float(x @ x - np.max(xq**2 / qq))


def plain_reference(x: np.ndarray, levels: int, a: float) -> float:
    loss_of_a = raw_loss(x, a, levels)
    while True:
        q = np.clip(np.floor(x / a + 0.5), 0, levels)
        following = (x @ q) / (q @ q)
        loss_of_following = raw_loss(x, following, levels)
        if loss_of_following > loss_of_a:
            return a
        if abs(following - a) <= 1e-3 * a:
            return following
        a, loss_of_a = following, loss_of_following


def activations(kind: str, count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.standard_normal(count)
    values = {
        "relu": np.maximum(x, 0),
        "heavy tail": np.abs(rng.standard_t(1.5, count)) * (x > 0),
        "heavier tail": np.exp(3 * x),
        "uniform": rng.random(count),
        "two clusters": np.abs(0.01 * x) + 100 * (rng.random(count) < 0.01),
        "tiny": np.maximum(x, 0) * 1e-30,
        "huge": np.maximum(x, 0) * 1e37,
        "few": rng.exponential(size=50),
        "integers": rng.integers(0, 9, count),
        "single": np.array([0.37]),
        "constant": np.full(count, 3.0),
    }[kind]
    return np.asarray(values, np.float32)


KINDS = [
    "relu",
    "heavy tail",
    "heavier tail",
    "uniform",
    "two clusters",
    "tiny",
    "huge",
    "few",
    "integers",
    "single",
    "constant",
]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_sums_and_maximum_are_exact(kind):
    x = activations(kind)
    histogram = histogram_of(x)
    means, counts = histogram.means()
    assert histogram.count == x.size
    assert histogram.zeros == np.count_nonzero(x == 0)
    assert histogram.maximum == x.max()
    assert not histogram.dead
    assert np.all(np.diff(means) > 0)
    keys, key_counts = np.unique(x[x > 0].view(np.uint32) >> 12, return_counts=True)
    np.testing.assert_array_equal(counts, key_counts)
    np.testing.assert_array_equal(np.flatnonzero(histogram.positive.counts), keys)
    np.testing.assert_allclose(means @ counts, x.sum(dtype=np.float64), rtol=1e-12)
    places = np.searchsorted(keys, x[x > 0].view(np.uint32) >> 12)
    sums = np.bincount(places, x[x > 0].astype(np.float64))
    np.testing.assert_allclose(means * counts, sums, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_whole_whatever_the_order(kind):
    x = activations(kind)
    whole = histogram_of(x)
    halves = histogram_of(x[1::2].reshape(-1, 1), x[:0])
    halves.merge(histogram_of(x[::2][::-1]))
    assert_same(halves, whole)
    repeated = np.tile(x, 2 * CHUNK // x.size + 1)[: 2 * CHUNK + 3]
    assert_same(histogram_of(repeated), histogram_of(*np.array_split(repeated, 7)))


@settings(max_examples=100, deadline=None)
@given(
    arrays(
        np.float32, st.integers(0, 30), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_any_finite_values(x):
    histogram = histogram_of(x)
    assert histogram.zeros == np.count_nonzero(x == 0)
    assert histogram.negatives == np.count_nonzero(x < 0)
    assert histogram.count == x.size
    positive = x[x > 0].astype(np.float64)
    means, counts = histogram.means()
    assert counts.sum() == positive.size
    assert histogram.maximum == max(positive, default=0.0)
    assert histogram.minimum == min([*x[x < 0], 0])
    np.testing.assert_allclose(means @ counts, positive.sum(), rtol=1e-12)
    negative = x[x < 0].astype(np.float64)
    means, counts = histogram.means(signed=True)
    below = means < 0
    np.testing.assert_allclose(means[below] @ counts[below], negative.sum(), rtol=1e-12)
    assert counts[below].sum() == negative.size
    assert np.all(np.diff(means) > 0)
    assert np.float32(optimal_step(histogram, 127, signed=True)) > 0
    for solve in (optimal_step, reference_step):
        assert np.float32(solve(histogram, 127)) > 0


def test_denormals_and_zeros_are_told_apart():
    x = np.array([0, -0.0, 1e-45, 3e-45, 1e-40, 1, -1e-45], np.float32)
    histogram = histogram_of(x)
    assert (histogram.zeros, histogram.negatives) == (2, 1)
    means, counts = histogram.means()
    np.testing.assert_array_equal(counts, [2, 1, 1])
    np.testing.assert_allclose(means, [(float(x[2]) + float(x[3])) / 2, x[4], 1], rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(LabelfreeError, match="NaN or infinity"):
        histogram_of(np.array([0, 1, bad, 2], np.float32))


def test_nothing_but_zeros_is_dead():
    histogram = histogram_of(np.zeros((2, 3), np.float32), np.array([-1], np.float32))
    assert histogram.dead
    assert optimal_step(histogram, 127) == reference_step(histogram, 127) == DEAD_STEP
    assert loss(histogram, DEAD_STEP, 127) == 0
    assert clipped_share(histogram, DEAD_STEP, 127) == 0
    assert Histogram().dead


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimal_step_is_the_global_minimum(kind, levels):
    x = activations(kind)
    step = optimal_step(histogram_of(x), levels)
    exact = x.astype(np.float64)
    assert raw_loss(exact, step, levels) <= least_raw_loss(exact, levels) * (1 + 1e-4) + 1e-12 * (
        exact @ exact
    )


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimal_step_beats_every_other_on_the_histogram(kind, levels):
    histogram = histogram_of(activations(kind))
    step = optimal_step(histogram, levels)
    least = loss(histogram, step, levels)
    norm = loss(histogram, 1e38, levels)
    assert least <= loss(histogram, reference_step(histogram, levels), levels) * (1 + 1e-8) + 1e-12 * norm
    for other in np.geomspace(histogram.maximum / levels / 30, histogram.maximum * 2, 100):
        assert least <= loss(histogram, other, levels) * (1 + 1e-8) + 1e-12 * norm


SIGNED = [
    "linear",
    "skewed",
    "negative",
    "leaky",
    "heavy tail",
    "integers",
    "huge",
]


def signed_activations(kind: str, count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(6)
    x = rng.standard_normal(count)
    values = {
        "linear": x,
        "skewed": np.exp(x) - 1,
        "negative": -np.abs(x),
        "leaky": np.where(x > 0, x, 0.1 * x),
        "heavy tail": rng.standard_t(1.5, count),
        "integers": rng.integers(-9, 9, count),
        "huge": x * 1e37,
    }[kind]
    return np.asarray(values, np.float32)


@pytest.mark.parametrize("levels", [7, 127])
@pytest.mark.parametrize("kind", SIGNED)
def test_the_optimal_step_of_signed_codes_is_the_global_minimum(kind, levels):
    """Brute force: the nearest of -levels .. levels is that of the magnitude, with the sign of the value."""
    x = signed_activations(kind).astype(np.float64)
    step = optimal_step(histogram_of(x), levels, signed=True)
    least = least_raw_loss(np.abs(x), levels)
    assert raw_loss(x, step, levels, signed=True) <= least * (1 + 1e-4) + 1e-12 * (x @ x)
    # and no step of a fine comb is better
    largest = np.abs(x).max()
    comb = min(raw_loss(x, a, levels, signed=True) for a in np.geomspace(largest / levels / 30, largest, 300))
    assert raw_loss(x, step, levels, signed=True) <= comb * (1 + 1e-4) + 1e-12 * (x @ x)


@pytest.mark.parametrize("kind", SIGNED)
def test_signed_loss_and_clipped_share_are_those_of_the_values(kind):
    x = signed_activations(kind).astype(np.float64)
    histogram = histogram_of(x)
    for step in np.abs(x).max() / 127 / np.array([1, 5]):
        assert loss(histogram, step, 127, signed=True) == pytest.approx(
            raw_loss(x, step, 127, signed=True), rel=5e-3
        )
        share = np.mean(np.abs(x) >= 127.5 * step)
        assert clipped_share(histogram, step, 127, signed=True) == pytest.approx(share, abs=1e-3)


def test_signed_values_merged_equal_the_whole_whatever_the_order():
    x = np.tile(signed_activations("linear"), 2 * CHUNK // 4000 + 1)[: 2 * CHUNK + 3]
    parts = histogram_of(*np.array_split(x, 5))
    halves = histogram_of(x[::2][::-1])
    halves.merge(histogram_of(x[1::2]))
    for found in (parts, halves):
        assert_same(found, histogram_of(x))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_step_is_the_plain_iteration_on_the_buckets(kind, levels):
    histogram = histogram_of(activations(kind))
    means, counts = histogram.means()
    # Exactly the maximum, which the histogram knows, is where the iteration starts.
    expected = plain_reference(np.repeat(means, counts.astype(int)), levels, histogram.maximum / levels)
    assert reference_step(histogram, levels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", ["relu", "heavy tail", "tiny", "few", "two clusters", "single"])
def test_reference_step_is_the_plain_iteration_on_the_values(kind, levels):
    x = activations(kind, 100_000)
    expected = plain_reference(x.astype(np.float64), levels, x.max() / levels)
    assert reference_step(histogram_of(x), levels) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("levels", LEVELS)
def test_loss_and_clipped_share_are_those_of_the_values(levels):
    x = activations("relu")
    histogram = histogram_of(x)
    for step in (0.3 / levels, 2 / levels, 5 / levels):
        assert loss(histogram, step, levels) == pytest.approx(
            raw_loss(x.astype(np.float64), step, levels), rel=5e-3
        )
        share = np.mean(x >= (levels + 0.5) * step)
        assert clipped_share(histogram, step, levels) == pytest.approx(share, abs=1e-3)


def test_a_value_on_a_threshold_goes_up():
    histogram = histogram_of(np.array([1.5, 3], np.float32))
    assert loss(histogram, 1, 3) == 0.25
    # The iteration: a = 1, q = (2, 3), a = 12/13.
    assert reference_step(histogram, 3) == pytest.approx(12 / 13)


def test_steps_stay_above_zero_in_float32():
    histogram = histogram_of(np.array([1e-45, 3e-45], np.float32))
    assert np.float32(optimal_step(histogram, 127)) > 0
    assert np.float32(reference_step(histogram, 127)) > 0
