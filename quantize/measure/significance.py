"""What a count of right images is worth: how far it may be off, and whether two of them differ by chance."""

from __future__ import annotations

import math

Z = 1.959963984540054
"""Of the normal distribution, 95 % lie within so many deviations of the mean."""


def wilson(right: int, images: int) -> tuple[float, float]:
    """The score interval of a share, 95 % (Wilson 1927): all p with |right / n - p| <= z sqrt(p (1 - p) / n).

    Returns:
        Its ends, in percent.
    """
    share, z2 = right / images, Z * Z / images
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / images + z2 / (4 * images))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def mcnemar(first_only: int, second_only: int) -> float:
    """Whether two nets are right on as many images, from those on which only one of them is (McNemar 1947).

    If they were equally good, each of these n images would fall to either with probability 1/2. This is the
    exact two-sided test.

    Returns:
        The probability of a split of n at least as uneven: 2 sum_{i <= least} C(n, i) / 2^n, at most 1.
    """
    images, least = first_only + second_only, min(first_only, second_only)
    ways = term = 1
    for i in range(least):
        term = term * (images - i) // (i + 1)
        ways += term
    return min(1.0, 2 * ways / (1 << images))
