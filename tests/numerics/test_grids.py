"""Levels and projections of the grids."""

import numpy as np
import pytest

from quantize.errors import InputError
from quantize.numerics.grids import GRIDS, FixedPoint, Grid, PowerOfTwo, Uniform, make_grid

ALL_GRIDS = [grid(bits) for grid in GRIDS.values() for bits in grid.allowed_bits]


def grid_id(grid: Grid) -> str:
    return f"{grid.name}-{grid.bits}"


def test_power_of_two_of_4_bits_has_the_papers_15_levels():
    levels = PowerOfTwo(4).levels(2)
    np.testing.assert_array_equal(levels, [-256, -128, -64, -32, -16, -8, -4, 0, 4, 8, 16, 32, 64, 128, 256])


def test_power_of_two_of_2_bits_is_ternary():
    np.testing.assert_array_equal(PowerOfTwo(2).levels(0), [-1, 0, 1])


@pytest.mark.parametrize("integer_bits", FixedPoint.variants)
def test_fixed_point_of_8_bits(integer_bits):
    levels = FixedPoint(8).levels(integer_bits)
    step = 2.0 ** -(8 - integer_bits)
    assert len(levels) == 256
    assert levels[0] == -(2.0 ** (integer_bits - 1))
    assert levels[-1] == 2.0 ** (integer_bits - 1) - step
    np.testing.assert_array_equal(np.diff(levels), step)


def test_uniform_is_symmetric():
    np.testing.assert_array_equal(Uniform(3).levels(0), [-3, -2, -1, 0, 1, 2, 3])


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_id)
def test_bits_are_enough_for_the_levels(grid):
    for variant in grid.variants:
        levels = grid.levels(variant)
        assert levels.dtype == np.float64
        assert len(levels) <= 2**grid.bits
        assert np.all(np.diff(levels) > 0)
        assert 0.0 in levels
        np.testing.assert_array_equal(levels.astype(np.float32), levels)
        if grid.symmetric:
            np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_id)
def test_projection_takes_the_nearest_level(grid):
    rng = np.random.default_rng(0)
    for variant in grid.variants:
        levels = grid.levels(variant)
        x = rng.uniform(1.5 * levels[0], 1.5 * levels[-1] + 1, (7, 300))
        projected = grid.project(x, variant)
        distance = np.abs(x[..., None] - levels).min(axis=-1)
        assert projected.shape == x.shape
        assert np.isin(projected, levels).all()
        np.testing.assert_allclose(np.abs(x - projected), distance, rtol=0, atol=1e-12 * levels[-1])


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_id)
def test_projection_keeps_levels_and_clamps_infinities(grid):
    for variant in grid.variants:
        levels = grid.levels(variant)
        for project in (grid.project, grid.reference_project):
            np.testing.assert_array_equal(project(levels, variant), levels)
            np.testing.assert_array_equal(project(np.array([-np.inf, np.inf]), variant), levels[[0, -1]])


@pytest.mark.parametrize("m", PowerOfTwo.variants)
def test_reference_projection_on_powers_of_two(m):
    x = np.array([0.75, 0.7500001, 1.0, 1.5, 1.5000001, 3.0, 48.0, 48.0000001, 64, 1000]) * 2.0**m
    q = np.array([0, 1, 1, 1, 2, 2, 32, 64, 64, 64]) * 2.0**m
    np.testing.assert_array_equal(PowerOfTwo(4).reference_project(x, m), q)
    np.testing.assert_array_equal(PowerOfTwo(4).reference_project(-x, m), -q)


def test_reference_projection_on_powers_of_two_as_the_paper_words_it():
    rng = np.random.default_rng(1)
    x = np.exp2(rng.uniform(-6, 9, 1000)) * rng.choice([-1, 1], 1000)
    for m in PowerOfTwo.variants:
        low = np.exp2(np.floor(np.log2(np.abs(x))))
        rounded = np.where(np.abs(x) > 1.5 * low, 2 * low, low)
        rounded[rounded <= 2.0**m / 2] = 0
        expected = np.sign(x) * np.minimum(rounded, 2.0 ** (m + 6))
        np.testing.assert_array_equal(PowerOfTwo(4).reference_project(x, m), expected)


@pytest.mark.parametrize("i", FixedPoint.variants)
def test_fixed_point_ties_go_down(i):
    step = 2.0 ** (i - 8)
    x = np.array([-200.0, -128.5, -1.5, -0.5, 0.5, 0.50001, 1.5, 126.5, 126.6, 127.4, 500.0]) * step
    q = np.array([-128, -128, -2, -1, 0, 1, 1, 126, 127, 127, 127]) * step
    np.testing.assert_array_equal(FixedPoint(8).reference_project(x, i), q)


@pytest.mark.parametrize(
    ("name", "bits"), [("power_of_two", 6), ("power_of_two", 1), ("fixed_point", 9), ("uniform", 0)]
)
def test_impossible_bits_are_refused(name, bits):
    with pytest.raises(InputError, match=f"grid {name}: {bits} bits"):
        make_grid(name, bits)


def test_unknown_grids_are_refused():
    with pytest.raises(InputError, match=r"grid 'log' is unknown; choose one of power_of_two"):
        make_grid("log", 4)


def test_make_grid_makes_equal_grids():
    assert make_grid("power_of_two", 4) == PowerOfTwo(4) != PowerOfTwo(3)
