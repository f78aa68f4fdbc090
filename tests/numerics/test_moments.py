"""Moments against sums in float64."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.numerics.moments import Moments, moments_of


def exact(blob: np.ndarray) -> Moments:
    """Mean and squared deviations from it, per channel over all images, in float64 or more."""
    channels = blob.shape[1] if blob.ndim > 1 else 1
    values = np.moveaxis(blob.reshape(len(blob), channels, -1), 1, 0).reshape(channels, -1)
    values = values.astype(np.longdouble)
    mean = values.mean(axis=1)
    m2 = np.square(values - mean[:, None]).sum(axis=1)
    return Moments(values.shape[1], mean.astype(np.float64), m2.astype(np.float64))


def assert_close(found: Moments, wanted: Moments, tolerance: float = 1e-6) -> None:
    """The mean is right to a share of the deviation (and to float64 of itself), the variance of itself."""
    assert found.count == wanted.count
    assert found.mean.dtype == found.m2.dtype == np.float64
    deviation = np.sqrt(wanted.m2 / wanted.count)
    off = np.abs(found.mean - wanted.mean)
    assert (off <= tolerance * deviation + 1e-12 * np.abs(wanted.mean)).all()
    np.testing.assert_allclose(found.m2, wanted.m2, rtol=tolerance, atol=1e-14)


SHAPES = [(3, 5, 4), (3,), (2, 1, 1), (4, 7), (1, 31, 33), (2, 2, 3, 2), (64, 1), (1, 1, 2)]


@given(
    batch=st.integers(1, 6),
    shape=st.sampled_from([(), *SHAPES]),
    offset=st.sampled_from([0.0, 1.0, 3.0, 3.5, -30.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200)
def test_moments_are_those_of_float64(batch: int, shape: tuple[int, ...], offset: float, seed: int) -> None:
    x = (np.random.default_rng(seed).normal(size=(batch, *shape)) + offset).astype(np.float32)
    assert_close(moments_of(x), exact(x), 5e-6)


@pytest.mark.parametrize("offset", [0, 1e2, 1e4, -1e4])
@pytest.mark.parametrize("deviation", [1e-2, 1, 1e3])
def test_a_large_mean_takes_no_digits_of_the_variance(offset: float, deviation: float) -> None:
    x = np.random.default_rng(0).normal(offset, deviation, (5, 3, 112, 112)).astype(np.float32)
    assert_close(moments_of(x), exact(x))


@pytest.mark.parametrize("shape", [(1, 224, 224), (1, 50177), (2, 1021, 3), (1, 1031, 2)])
def test_many_values_of_one_sign(shape: tuple[int, ...]) -> None:
    x = np.maximum(np.random.default_rng(0).normal(size=(2, *shape)), 0).astype(np.float32)
    assert_close(moments_of(x), exact(x))


def test_channels_of_all_kinds_side_by_side() -> None:
    """Some around zero, some far from it, some constant, one zero: each is summed in the way it needs."""
    x = np.random.default_rng(0).normal(size=(4, 6, 9, 9)).astype(np.float32)
    x[:, 1] += 1e4
    x[:, 2] = 7.25
    x[:, 3] = 0
    x[:, 4] *= 1e-6
    x[:, 5] += np.array([0, 50, -20, 1000], np.float32).reshape(4, 1, 1)
    found, wanted = moments_of(x), exact(x)
    assert_close(found, wanted, 1e-6)
    np.testing.assert_allclose(found.m2[4], wanted.m2[4], rtol=1e-5)
    assert found.m2[2] == found.m2[3] == 0


def test_one_value_of_another_size() -> None:
    """A single large value among small ones is all of the variance; its square must not be lost."""
    x = np.zeros((1, 1, 100, 100), np.float32)
    x[0, 0, 50, 50] = 1e6
    assert_close(moments_of(x), exact(x), 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    x[1, 1, 2, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = moments_of(x)
    wanted = moments_of(x[:, [0, 2]].copy())
    assert not np.isfinite(found.m2[1])
    np.testing.assert_array_equal(found.m2[[0, 2]], wanted.m2)
    np.testing.assert_array_equal(found.mean[[0, 2]], wanted.mean)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from([0.0, 100.0]))
def test_merged_moments_are_those_of_all(sizes: list[int], offset: float) -> None:
    x = (np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 3, 4)) + offset).astype(np.float32)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    merged = moments_of(parts[0])
    for part in parts[1:]:
        merged = merged.merged(moments_of(part))
    assert_close(merged, exact(x), 1e-6)
