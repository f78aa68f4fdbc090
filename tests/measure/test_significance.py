"""Intervals and tests of counts against sums over all that could have happened."""

import math
from fractions import Fraction

import pytest

from quantize.measure.significance import Z, mcnemar, wilson


def binomial(n: int, k: int, p: float) -> float:
    """The probability of k of n."""
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize(
    ("right", "images"), [(0, 1), (1, 1), (3, 7), (0, 50), (50, 50), (790, 800), (43_000, 50_000)]
)
def test_wilson_ends_where_the_share_is_z_deviations_off(right: int, images: int) -> None:
    """The definition: each end is found by bisection on (share - p)^2 n = z^2 p (1 - p)."""
    share = right / images

    def inside(p: float) -> bool:
        return (share - p) ** 2 * images <= Z**2 * p * (1 - p)

    for end, limit in zip(wilson(right, images), (0.0, 1.0), strict=True):
        near, far = share, limit
        for _ in range(100):
            middle = (near + far) / 2
            near, far = (middle, far) if inside(middle) else (near, middle)
        assert end == pytest.approx(100 * near, abs=1e-9)


@pytest.mark.parametrize("images", [20, 100, 400])
def test_wilson_holds_the_truth_as_often_as_it_says(images: int) -> None:
    """Over all counts that could have come out, with a fine grid of true shares; 95 % on average."""
    intervals = [wilson(right, images) for right in range(images + 1)]
    truths = [(i + 0.5) / 500 for i in range(500)]
    covered = [
        sum(binomial(images, k, p) for k, (low, high) in enumerate(intervals) if low <= 100 * p <= high)
        for p in truths
    ]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)
    assert min(covered) > 0.8


def test_mcnemar_is_the_sum_over_all_splits_as_uneven() -> None:
    for first in range(12):
        for second in range(12):
            n = first + second
            uneven = abs(first - second)
            splits = [k for k in range(n + 1) if abs(n - 2 * k) >= uneven]
            expected = sum((Fraction(math.comb(n, k), 2**n) for k in splits), Fraction())
            assert mcnemar(first, second) == pytest.approx(float(expected), rel=1e-12), (first, second)


def test_mcnemar_of_many_images_is_nearly_normal() -> None:
    """As its continuity-corrected chi-square."""
    first, second = 26_000, 25_000
    deviations = (first - second - 1) / math.sqrt(first + second)
    normal = math.erfc(deviations / math.sqrt(2))
    assert mcnemar(first, second) == pytest.approx(normal, rel=0.01)
