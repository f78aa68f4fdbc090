"""Data-aware rounding: every step against brute force."""

from itertools import product

import numpy as np
import pytest

from quantize.numerics.grids import Grid, make_grid
from quantize.numerics.rounding import (
    BLOCK,
    DAMPINGS,
    Nearest,
    Problem,
    Rounding,
    Statistics,
    chosen_damping,
    coordinate_descent,
    recursion,
    refitted,
    round_kernels,
    start_alphas,
)
from quantize.numerics.solvers import fit

GRIDS = [
    *(("power_of_two", bits) for bits in range(2, 6)),
    *(("uniform", bits) for bits in (2, 3, 8)),
    *(("fixed_point", bits) for bits in (2, 4, 8)),
]


def statistics(groups: int, n: int, k: int, patches: int, seed: int = 0) -> tuple[np.ndarray, Statistics]:
    """Weights and the moments of correlated patches, whose outputs are those of slightly other patches."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 0.3, (groups, n, k))
    full = np.abs(rng.normal(size=(groups, patches, k)) @ rng.normal(size=(groups, k, k)) / np.sqrt(k))
    x = full + rng.normal(0, 0.1, full.shape)
    y = full @ weights.swapaxes(1, 2)
    moments = Statistics(
        x.swapaxes(1, 2) @ x / patches, y.swapaxes(1, 2) @ x / patches, np.square(y).mean(axis=1)
    )
    return weights, moments


def problem_of(groups: int, n: int, k: int, patches: int = 500, seed: int = 0) -> Problem:
    return Problem.of(*statistics(groups, n, k, patches, seed))


def factor_of(problem: Problem) -> np.ndarray:
    return np.linalg.cholesky(problem.H).swapaxes(1, 2)


# ---- The objective ----


def test_the_target_and_the_error_are_what_they_are_defined_to_be() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 6)), rng.normal(size=(300, 4))
    moments = Statistics((x.T @ x / 300)[None], (y.T @ x / 300)[None], np.square(y).mean(axis=0)[None])
    q = rng.normal(size=(1, 4, 6))
    np.testing.assert_allclose(moments.error(q)[0], np.square(y - x @ q[0].T).mean(axis=0))
    weights = rng.normal(size=(1, 4, 6))
    problem = Problem.of(weights, moments, damping=1e-12)
    np.testing.assert_allclose(problem.target[0], np.linalg.lstsq(x, y, rcond=None)[0].T, rtol=1e-6)
    # The objective differs from the error by a constant.
    other = rng.normal(size=(1, 4, 6))
    gain = moments.error(q) - moments.error(other)
    np.testing.assert_allclose(problem.loss(q) - problem.loss(other), gain, rtol=1e-6)


def test_damping_pulls_towards_the_weights() -> None:
    weights, moments = statistics(1, 3, 8, patches=40)
    problem = Problem.of(weights, moments, damping=0.05)
    d = 0.05 * np.trace(moments.H[0]) / 8
    q = np.random.default_rng(0).normal(size=(1, 3, 8))
    damped = moments.error(q) + d * np.square(q - weights).sum(axis=2)
    least = moments.error(problem.target) + d * np.square(problem.target - weights).sum(axis=2)
    np.testing.assert_allclose(problem.loss(q), damped - least)
    strongly = Problem.of(weights, moments, damping=1e9)
    np.testing.assert_allclose(strongly.target, weights, rtol=1e-6)


def disturbed(patches: int, noise: float, seed: int, k: int = 60) -> Statistics:
    """The moments of patches that are seen with noise, and of what they give undisturbed with `TRUE`."""
    rng = np.random.default_rng(seed)
    full = rng.normal(size=(1, patches, k)) * np.linspace(0.1, 2, k)
    x, y = full + noise * rng.normal(size=full.shape), full @ TRUE.swapaxes(1, 2)
    y += 0.5 * rng.normal(size=y.shape)
    moments = x.swapaxes(1, 2) @ x / patches, y.swapaxes(1, 2) @ x / patches, np.square(y).mean(axis=1)
    return Statistics(*moments)


TRUE = np.random.default_rng(1).normal(size=(1, 8, 60))


def test_few_images_are_not_believed() -> None:
    """The damping is about the best of all on images never seen: the more, the less there is to fit to."""
    unseen = disturbed(100_000, 0.3, seed=9)
    chosen = {}
    for patches in (40, 100, 20_000):
        whole = disturbed(patches, 0.3, seed=2)
        halves = (disturbed(patches // 2, 0.3, seed=seed) for seed in (2, 3))
        chosen[patches] = chosen_damping(TRUE, *halves)
        errors = {d: unseen.error(Problem.of(TRUE, whole, d).target).sum() for d in DAMPINGS}
        assert errors[chosen[patches]] < 1.1 * min(errors.values())
        assert errors[chosen[patches]] < 1.01 * unseen.error(TRUE).sum()
        if patches == 40:
            assert errors[DAMPINGS[0]] > 2 * unseen.error(TRUE).sum()
    assert chosen[40] > chosen[20_000]


# ---- The steps ----


@pytest.mark.parametrize("k", [5, BLOCK, 2 * BLOCK + 7])
def test_the_recursion_is_babais_and_optimal_brain_quantization(k: int) -> None:
    """Blocked, over groups: the same as rounding one weight and solving for the others again, each time."""
    problem, nearest = problem_of(2, 3, k), Nearest(make_grid("power_of_two", 3))
    alpha = np.full((2, 3), 0.1)
    found = recursion(problem.target, factor_of(problem), alpha, nearest)
    for group, n in product(range(2), range(3)):
        H, w = problem.H[group], problem.target[group, n].copy()
        for i in reversed(range(k)):
            level = nearest(w[i], alpha[group, n])
            assert found[group, n, i] == level
            # What the free weights before i must become to minimise the objective (Hassibi & Stork 1993).
            error = w[i] - alpha[group, n] * level
            w[:i] += np.linalg.solve(H[:i, :i], H[:i, i]) * error
            w[i] -= error


@pytest.mark.parametrize("k", [8, 2 * BLOCK + 7])
def test_a_sweep_is_one_descent_over_the_coordinates(k: int) -> None:
    problem, nearest = problem_of(2, 2, k), Nearest(make_grid("uniform", 3))
    alpha = np.full((2, 2), 0.15)
    start = nearest(problem.target, alpha[:, :, None])
    loss = problem.loss(alpha[:, :, None] * start)
    found = coordinate_descent(problem, Rounding(alpha, start, start @ problem.H, loss), nearest)
    for group, n in product(range(2), range(2)):
        H, w, q = problem.H[group], problem.target[group, n], start[group, n].copy()
        for i in reversed(range(k)):
            tried = []
            for level in nearest.levels:
                q[i] = level
                error = w - alpha[group, n] * q
                tried.append(error @ H @ error)
            q[i] = nearest.levels[np.argmin(tried)]
        np.testing.assert_array_equal(found.Q[group, n], q)
    np.testing.assert_allclose(found.QH, found.Q @ problem.H)


def test_the_refit_is_the_best_alpha() -> None:
    problem = problem_of(2, 3, 9)
    Q = np.round(problem.target * 3)
    Q[0, 0] = 0
    found = refitted(problem, Q, Q @ problem.H, np.full((2, 3), 7.0))
    assert found.alpha[0, 0] == 7
    for change in (-1e-3, 1e-3):
        worse = problem.loss((found.alpha + change)[:, :, None] * Q)
        assert (worse >= found.loss).all()
    np.testing.assert_allclose(found.loss, problem.loss(found.alpha[:, :, None] * Q))


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_no_step_raises_the_objective(name: str, bits: int) -> None:
    grid = make_grid(name, bits)
    problem, nearest = problem_of(3, 5, 20), Nearest(grid)
    alpha, _ = start_alphas(problem, grid, nearest)
    Q = nearest(problem.target, alpha[:, :, None])
    loss = problem.loss(alpha[:, :, None] * Q)
    first = Rounding(alpha, Q, Q @ problem.H, loss)
    for _ in range(4):
        found = coordinate_descent(problem, first, nearest)
        swept = problem.loss(first.alpha[:, :, None] * found.Q)
        assert (swept <= loss * (1 + 1e-12)).all()
        assert (found.loss <= swept * (1 + 1e-12)).all()
        first, loss = found, found.loss


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_the_rounding_is_on_the_grid_and_better_than_the_nearest_levels(name: str, bits: int) -> None:
    grid = make_grid(name, bits)
    problem = problem_of(2, 6, 30)
    found = round_kernels(problem, grid)
    assert np.isin(found.Q, grid.levels(grid.canonical)).all()
    np.testing.assert_allclose(found.loss, problem.loss(found.alpha[:, :, None] * found.Q))
    plain = fit(problem.target.reshape(-1, 30), grid)
    nearest = problem.loss((plain.alpha[:, None] * plain.Q).reshape(2, 6, 30))
    assert found.loss.sum() < nearest.sum() * 0.8
    assert (found.loss < nearest).mean() > 0.7


def test_the_rounding_is_near_the_best_there_is() -> None:
    """Tiny kernels, all of {-1, 0, 1}^6, each with its best alpha."""
    grid = make_grid("power_of_two", 2)
    problem = problem_of(1, 40, 6)
    found = round_kernels(problem, grid)
    candidates = np.array([q for q in product((-1.0, 0.0, 1.0), repeat=6) if any(q)])
    QH = candidates @ problem.H[0]
    gain = (QH @ problem.target[0].T) ** 2 / np.einsum("qk,qk->q", QH, candidates)[:, None]
    least = problem.loss(np.zeros((1, 40, 6)))[0] - gain.max(axis=0)
    assert (found.loss[0] >= least * (1 - 1e-9)).all()
    assert found.loss.sum() <= 1.25 * least.sum()
    assert (found.loss[0] <= least * (1 + 1e-9)).mean() > 0.5


# ---- Bad input ----


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_dead_inputs_few_patches_and_nothing_at_all(name: str, bits: int) -> None:
    grid: Grid = make_grid(name, bits)
    weights, moments = statistics(2, 3, 12, patches=5)  # singular
    moments.H[1], moments.B[1], moments.energy[1] = 0, 0, 0  # this group never sees an input
    moments.H[0, 4] = moments.H[0, :, 4] = moments.B[0, :, 4] = 0  # a dead channel
    problem = Problem.of(weights, moments)
    np.testing.assert_allclose(problem.target[1], weights[1])
    np.testing.assert_allclose(problem.target[0, :, 4], weights[0, :, 4])
    found = round_kernels(problem, grid)
    assert np.isfinite(found.alpha).all()
    assert np.isin(found.Q, grid.levels(grid.canonical)).all()
    plain = fit(weights[1], grid)
    assert (found.loss[1] <= plain.loss * 1.05 + 1e-12).all()
    zeros = round_kernels(Problem(np.zeros((1, 2, 5)), np.eye(5)[None]), grid)
    assert not (zeros.alpha[:, :, None] * zeros.Q).any()
