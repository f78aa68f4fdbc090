"""The solvers against brute force and against the plain iteration."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantize.numerics.grids import GRIDS, FixedPoint, Grid, PowerOfTwo, Uniform
from quantize.numerics.solvers import MAX_ITERATIONS, fit

ALL_GRIDS = [grid(bits) for grid in GRIDS.values() for bits in grid.allowed_bits]
GRIDS_TO_FIT = [
    PowerOfTwo(2),
    PowerOfTwo(4),
    PowerOfTwo(5),
    FixedPoint(2),
    FixedPoint(4),
    FixedPoint(8),
    Uniform(3),
    Uniform(8),
]


def grid_id(grid: Grid) -> str:
    return f"{grid.name}-{grid.bits}"


def brute_force(w: np.ndarray, grid: Grid) -> float:
    """The least loss of one kernel: Q only changes where a weight crosses a midpoint of two levels."""
    levels = grid.levels(grid.canonical)
    midpoints = (levels[1:] + levels[:-1]) / 2
    places = (w[:, None] / midpoints).ravel()
    least = float(w @ w)
    for side in (places[places > 0], places[places < 0]):
        ordered = np.sort(side)
        between = np.concatenate([ordered[:1] / 2, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] * 2])
        for alpha in between:
            Q = levels[np.searchsorted(midpoints, w / alpha)]
            if Q.any():
                least = min(least, float(np.sum((w - w @ Q / (Q @ Q) * Q) ** 2)))
    return least


def plain_reference(w: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """DESIGN's Quasi-Lloyd-Max, straightforwardly."""
    best = None
    for variant in grid.variants:
        alpha = np.mean(w**2, axis=1)
        for _ in range(MAX_ITERATIONS):
            previous = alpha
            with np.errstate(divide="ignore", invalid="ignore"):
                x = w / previous[:, None]
            x[np.isnan(x)] = 0
            Q = grid.reference_project(x, variant)
            alpha = (w * Q).sum(axis=1) / ((Q * Q).sum(axis=1) + 1e-7)
            if np.linalg.norm(alpha - previous) <= 1e-7 * np.linalg.norm(alpha):
                break
        loss = np.sum((w - alpha[:, None] * Q) ** 2)
        if best is None or loss < best[0]:
            best = (loss, alpha, Q)
    return best[1], best[2]


def kernels(seed: int, n: int, k: int) -> np.ndarray:
    """Kernels of many shapes of distribution and scale."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)) * np.exp2(rng.integers(-12, 4, (n, 1)))
    w[::3] *= np.abs(rng.standard_normal((len(w[::3]), k))) ** 3
    w[1::4] = np.round(w[1::4] / np.abs(w[1::4]).max() * 20)
    w[2::5] *= rng.random((len(w[2::5]), k)) < 0.3
    w[3::7] = np.abs(w[3::7])
    return w.astype(np.float32)


ADVERSARIAL = {
    "zeros": np.zeros((3, 5)),
    "one weight": np.eye(4, 9) * [[1], [-1], [1e-30], [3e30]],
    "one kernel of one weight": np.array([[0.37]]),
    "k = 1": np.array([[0.37], [-2.0], [0.0], [1e-20]]),
    "equal": np.full((2, 7), 0.25),
    "equal magnitudes": np.array([[0.3, -0.3, 0.3, -0.3], [-5, -5, -5, 5]]),
    "negative": -np.arange(1.0, 17).reshape(2, 8),
    "huge and tiny": np.array([[1e30, 1, 1e-30, 0, -1e15], [3e38, -3e38, 1e-38, 1, 2]]),
    "denormal": np.array([[1e-45, 3e-45, -7e-45, 2e-42], [1e-40, 0, 0, -1e-45]]),
    "a zero kernel among others": np.array([[0.0, 0, 0], [1, 2, -4], [0.1, 0.1, -0.3]]),
    "levels": np.array([[0, 1, 2, 4, 8, 16, 32, 64], [-128, 127, 3, 1, 5, 0, -2, 1]]) * 0.01,
    "ties": np.array([[1.5, 3, 6, 12, 0.5, 0.75], [0.5, 1.5, 2.5, 3.5, 4.5, 127.5]]),
    "one outlier": np.concatenate([np.full((1, 50), 1e-3), [[1e3]]], axis=1),
}


def check_fit(w: np.ndarray, grid: Grid) -> None:
    """What holds for every fit."""
    exact = w.astype(np.float64)
    norm = np.sum(exact**2, axis=1)
    losses = []
    for solver in ("reference", "optimal"):
        result = fit(w, grid, solver)
        assert result.alpha.dtype == result.loss.dtype == np.float64
        assert result.Q.dtype == np.float32
        assert result.Q.shape == w.shape
        tried = grid.variants if solver == "reference" else [grid.canonical]
        assert any(np.isin(result.Q, grid.levels(variant)).all() for variant in tried)
        assert np.isfinite(result.alpha).all()
        zero = ~w.any(axis=1)
        assert not result.alpha[zero].any()
        assert not result.Q[zero].any()
        again = np.sum((exact - result.alpha[:, None] * result.Q) ** 2, axis=1)
        assert np.all(np.abs(result.loss - again) <= 1e-9 * again + 1e-14 * norm)
        losses.append(result.loss)
    assert np.all(losses[1] <= losses[0] * (1 + 1e-8) + 1e-12 * norm)
    assert np.all(losses[1] <= norm * (1 + 1e-12))


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_id)
def test_adversarial_kernels(grid, name):
    check_fit(ADVERSARIAL[name].astype(np.float32), grid)


@pytest.mark.parametrize("k", [1, 2, 9, 150])
@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_id)
def test_kernels_of_many_kinds(grid, k):
    check_fit(kernels(k, 40, k), grid)


@settings(max_examples=60, deadline=None)
@given(
    w=arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        elements=st.floats(-(2.0**50), 2.0**50, width=32),
    ),
    grid=st.sampled_from(GRIDS_TO_FIT),
)
def test_any_kernels(w, grid):
    check_fit(w, grid)


@pytest.mark.parametrize("k", [1, 2, 3, 12])
@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_id)
def test_optimal_is_the_global_minimum(grid, k):
    w = kernels(100 + k, 14, k)
    result = fit(w, grid)
    for kernel, loss in zip(w.astype(np.float64), result.loss, strict=True):
        assert loss <= brute_force(kernel, grid) * (1 + 1e-8) + 1e-12 * (kernel @ kernel)


@pytest.mark.parametrize("grid", [PowerOfTwo(4), Uniform(4), FixedPoint(4)], ids=grid_id)
def test_optimal_is_the_global_minimum_of_long_kernels(grid):
    w = kernels(7, 6, 300)
    for kernel, loss in zip(w.astype(np.float64), fit(w, grid).loss, strict=True):
        assert loss <= brute_force(kernel, grid) * (1 + 1e-8) + 1e-12 * (kernel @ kernel)


def test_asymmetric_grids_need_negative_alphas():
    w = np.array([[128, -127, 3, 1]], np.float32)
    result = fit(w, FixedPoint(8))
    assert result.alpha[0] < 0
    assert result.loss[0] < 1e-20


@pytest.mark.parametrize("grid", GRIDS_TO_FIT, ids=grid_id)
def test_optimal_is_equivariant_to_scale(grid):
    w = kernels(3, 20, 30)
    result = fit(w, grid)
    scaled = fit(w * np.float32(2.0**40), grid)
    np.testing.assert_array_equal(scaled.Q, result.Q)
    np.testing.assert_array_equal(scaled.alpha, result.alpha * 2.0**40)
    third = fit(w.astype(np.float64) / 3, grid)
    np.testing.assert_allclose(third.loss, result.loss / 9, rtol=1e-7, atol=1e-12 * np.max(w**2))


@pytest.mark.parametrize("grid", GRIDS_TO_FIT, ids=grid_id)
def test_kernels_are_fitted_one_by_one(grid):
    w = kernels(4, 12, 30)
    whole = fit(w, grid)
    for i in range(len(w)):
        np.testing.assert_array_equal(fit(w[i : i + 1], grid).alpha, whole.alpha[i : i + 1])


@pytest.mark.parametrize("grid", GRIDS_TO_FIT, ids=grid_id)
@pytest.mark.parametrize("k", [1, 9, 200])
def test_reference_equals_the_plain_iteration(grid, k):
    w = np.random.default_rng(k).standard_normal((30, k)).astype(np.float32) * 0.1
    w[::7] = 0
    alpha, Q = plain_reference(w.astype(np.float64), grid)
    result = fit(w, grid, "reference")
    expected = alpha[:, None] * Q
    error = np.linalg.norm(result.alpha[:, None] * result.Q - expected)
    assert error <= 1e-6 * np.linalg.norm(expected)


def test_reference_goes_on_after_an_alpha_of_zero():
    # mean(w^2) is so large that every w / alpha rounds to 0: alpha becomes 0, w / 0 saturates, and so on.
    w = np.array([[100.0, -300, 0, 50], [0.1, -0.2, 0.4, 0]], np.float32)
    alpha, Q = plain_reference(w.astype(np.float64), PowerOfTwo(4))
    result = fit(w, PowerOfTwo(4), "reference")
    assert result.alpha[0] > 0
    np.testing.assert_allclose(result.alpha[:, None] * result.Q, alpha[:, None] * Q, rtol=1e-6)


def test_float64_kernels_beyond_the_range_of_float32():
    w = np.array([[1e-200, -3e-200, 2e-200], [1e200, 5e200, -1e200]])
    to_one = np.array([[1e200], [1e-200]])
    result = fit(w, PowerOfTwo(4))
    loss = np.sum(((w - result.alpha[:, None] * result.Q) * to_one) ** 2, axis=1)
    np.testing.assert_allclose(loss, fit(w * to_one, PowerOfTwo(4)).loss, rtol=1e-6)


@pytest.mark.parametrize("solver", ["optimal", "reference"])
@pytest.mark.parametrize("grid", [PowerOfTwo(4), FixedPoint(8), Uniform(4)], ids=grid_id)
def test_weights_that_are_not_finite_do_not_hang(grid, solver):
    w = np.array([[1, np.nan, 2], [np.inf, 1, -1], [1, 2, 3], [-np.inf, np.inf, np.nan]], np.float32)
    assert fit(w, grid, solver).Q.shape == w.shape


@pytest.mark.parametrize("solver", ["optimal", "reference"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_layers(shape, solver):
    result = fit(np.zeros(shape, np.float32), PowerOfTwo(4), solver)
    assert result.Q.shape == shape
    np.testing.assert_array_equal(result.alpha, np.zeros(shape[0]))


def test_the_weights_are_left_alone():
    w = kernels(5, 3, 8)
    before = w.copy()
    fit(w, FixedPoint(8))
    fit(w, FixedPoint(8), "reference")
    np.testing.assert_array_equal(w, before)
