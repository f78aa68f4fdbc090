"""Agreement, divergence and SQNR of blobs against loops over their places."""

import math

import numpy as np
import pytest

from quantize.measure.closeness import Sums, divergences

SHAPES = [((6, 5), 1), ((6, 5, 1, 1), 1), ((3, 4, 2, 5), 1), ((3, 2, 5, 4), 3), ((2, 7, 3), 2)]


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = [math.exp(float(score)) for score in scores]
    return np.array([power / sum(powers) for power in powers])


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_every_place_counts(shape: tuple[int, ...], axis: int, at_once: int) -> None:
    rng = np.random.default_rng(0)
    full, own = (rng.normal(0, 2, shape).astype(np.float32) for _ in range(2))
    own += full
    sums = Sums(axis, at_once)
    for part in (slice(0, 1), slice(1, None)):  # micro-batches
        sums.update(full[part], own[part])
    agreed, divergence, count = 0, 0.0, 0
    for place in np.ndindex(*(size for i, size in enumerate(shape) if i != axis)):
        at = (*place[:axis], slice(None), *place[axis:])
        p, q = softmax(full[at]), softmax(own[at])
        agreed += int(p.argmax() == q.argmax())
        divergence += float(np.sum(p * np.log(p / q)))
        count += 1
    found = sums.closeness
    assert found.agreement == pytest.approx(100 * agreed / count)
    assert found.divergence == pytest.approx(divergence / count, rel=1e-9)
    energy, loss = (float(np.sum(x.astype(np.float64) ** 2)) for x in (full, full.astype(float) - own))
    assert found.sqnr_db == pytest.approx(10 * math.log10(energy / loss), abs=1e-9)


def test_a_blob_without_classes_has_an_sqnr_only() -> None:
    full = np.array([[3.0, 4.0]], np.float32)
    sums = Sums(None)
    sums.update(full, full + np.float32(0.5))
    found = sums.closeness
    assert found.agreement is None
    assert found.divergence is None
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 0.5))


def test_the_same_scores_agree_fully() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    sums = Sums(1)
    sums.update(scores, scores)
    assert (sums.closeness.agreement, sums.closeness.divergence, sums.closeness.sqnr_db) == (100, 0, None)


def test_divergence_of_scores_that_no_exponential_can_hold() -> None:
    full = np.array([[1e30, -1e30], [3e38, 0]], np.float32)
    np.testing.assert_array_equal(divergences(full, full), [0, 0])
