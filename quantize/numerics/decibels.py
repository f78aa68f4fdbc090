"""Ratios of energies, as reports state them."""

from __future__ import annotations

import math


def decibels(energy: float, loss: float) -> float | None:
    """10 log10(energy / loss): a signal-to-quantization-noise ratio; None where either is 0 or not finite."""
    if not (0 < energy < math.inf and 0 < loss < math.inf):
        return None
    return 10 * (math.log10(energy) - math.log10(loss))  # the ratio itself may be too large or too small
