"""Whether accuracies can be what they seem: a wrong transform makes quantization look like an improvement.

Renorm with measured statistics absorbs a wrong mean or scale. Full precision does not: it is right by chance
only, and the quantized net far above it. With paired statistics both are right by chance.
"""

from __future__ import annotations

import math

CHANCE_KAPPA = 0.1
"""Cohen's kappa of full precision with the labels: below, it is right little more often than by chance."""
LEAST_GAIN = 1.0
"""Points of top-1 that a quantized net may be better without a word, however many images say so."""
DEVIATIONS = 3.0

CAUSE = (
    "data.transform is probably not the transform of training, or the labels are not this net's; `labelfree "
    "doctor` tells which transform fits"
)


def doubt(
    full: float | None, final: float | None, agreement: float | None, images: int, classes: int
) -> str | None:
    """Why the accuracies of full precision and of its quantized net cannot be trusted; None where they can.

    Args:
        full: top-1 of full precision in percent; None without labels.
        final: top-1 of the quantized net.
        agreement: percent of the images that both put into the same class.
        images: how many images have a label.
        classes: number of classes; 0: not known.
    """
    if full is None or final is None or agreement is None:
        return None
    chance = 100 / classes if classes > 1 else 0.0
    # Only images on which the nets disagree move the difference, by one each: McNemar's deviation.
    noise = 100 * math.sqrt((100 - agreement) / 100 / images)
    reasons = []
    if classes > 1 and full - chance < CHANCE_KAPPA * (100 - chance):
        reasons.append(
            f"full precision is right on only {full:.2f} % of the images, chance on {chance:.3g} %"
        )
    if final - full > max(LEAST_GAIN, DEVIATIONS * noise):
        reasons.append(f"the quantized network is {final - full:.2f} points of top-1 above full precision")
    return f"{' and '.join(reasons)}: {CAUSE}" if reasons else None
