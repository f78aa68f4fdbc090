"""Accuracy and agreement of a quantized net and its full-precision net on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray
from quantize.caffenet import NetParameter, Weights
from quantize.data.feed import Feed
from quantize.engines.base import Engine, OpenEngine
from quantize.errors import InputError, LabelfreeError
from quantize.numerics.decibels import decibels
from quantize.progress import SILENT, Progress
from quantize.record import Accuracy, Closeness, Evaluation
from quantize.sweep.plan import Costs, micro_batch_size

TOP_K = (1, 5)


@dataclass(frozen=True)
class Candidate:
    """One of the nets to compare.

    Attributes:
        net: the inference net.
        weights: its blobs.
        scores: the blob with one score per class.
    """

    net: NetParameter
    weights: Weights
    scores: str


def evaluate(
    candidates: Mapping[str, Candidate],
    feed: Feed,
    open_engine: OpenEngine,
    progress: Progress = SILENT,
) -> Evaluation:
    """Run nets over the same images.

    Args:
        candidates: full precision first, then those to compare with it; the final one last.
        feed: images transformed for the TEST phase.
        open_engine: opens a net for running.

    Raises:
        InputError: a label does not fit the number of classes, or the nets' scores do not fit each other.
        LabelfreeError: scores are not finite.
    """
    with ExitStack() as stack:
        engines = [
            stack.enter_context(closing(open_engine(c.net, c.weights, feed.shapes)))
            for c in candidates.values()
        ]
        return _compare(list(candidates.items()), engines, feed, progress)


def _compare(
    candidates: Sequence[tuple[str, Candidate]], engines: Sequence[Engine], feed: Feed, progress: Progress
) -> Evaluation:
    for _, candidate in candidates:
        check_scores(candidate.net, candidate.scores)
    runners = [
        engine.compile(0, len(candidate.net.layer), [candidate.scores])
        for engine, (_, candidate) in zip(engines, candidates, strict=True)
    ]
    widest = max(Costs.of(e.net, e.shapes, list(e.inputs), ()).widest for e in engines)
    batch = micro_batch_size(widest, len(feed), None)
    hits: dict[str, dict[int, int]] = {name: dict.fromkeys(TOP_K, 0) for name, _ in candidates}
    sums = {name: _Sums() for name, _ in candidates[1:]}
    labeled = 0
    progress.start("evaluate", len(feed))
    for images in feed.batches(batch):
        labels = images.labels
        full: FloatArray | None = None
        for (name, candidate), runner in zip(candidates, runners, strict=True):
            scores = runner.run(images.feeds).blobs[candidate.scores]
            scores = scores.reshape(len(images), -1)
            if not np.isfinite(scores).all():
                raise LabelfreeError(
                    f"{name}: blob {candidate.scores} is not finite; layers before it overflow"
                )
            if labels is not None:
                for k in TOP_K:
                    hits[name][k] += count_top_k(scores, labels, k)
            if full is None:
                full = scores
            elif full.shape == scores.shape:
                sums[name].update(full, scores)
            else:
                raise InputError(
                    f"the nets give {full.shape[1]} and {scores.shape[1]} scores per image; quantize again"
                )
        labeled += len(images) if labels is not None else 0
        progress.advance(len(images))
    count = len(feed)
    accuracy = {
        name: Accuracy(*(100 * hits[name][k] / count if labeled == count else None for k in TOP_K))
        for name, _ in candidates
    }
    closeness = {name: found.closeness(count) for name, found in sums.items()}
    classes = math.prod(engines[0].shapes.blobs[candidates[0][1].scores][1:])
    return Evaluation(count, accuracy, closeness, classes)


def check_scores(net: NetParameter, scores: str) -> None:
    """Check that an inference net makes its scores.

    Raises:
        InputError: it does not.
    """
    if not any(scores in layer.top for layer in net.layer):
        raise InputError(
            f"the net's scores, blob {scores!r}, cannot be computed from the images alone; "
            "check the bottoms of its Accuracy or loss layer"
        )


class _Sums:
    """What `Closeness` is made of, added up over micro-batches."""

    def __init__(self) -> None:
        self.agreed = 0
        self.divergence = 0.0
        self.energy = 0.0
        self.loss = 0.0

    def update(self, full: FloatArray, own: FloatArray) -> None:
        """Add the scores (images, classes) of one micro-batch."""
        wide, narrow = full.astype(np.float64), own.astype(np.float64)
        self.agreed += int((full.argmax(axis=1) == own.argmax(axis=1)).sum())
        self.divergence += float(divergences(full, own).sum())
        self.energy += float(np.square(wide).sum())
        self.loss += float(np.square(wide - narrow).sum())

    def closeness(self, images: int) -> Closeness:
        """The figures over ``images`` images."""
        return Closeness(
            agreement=100 * self.agreed / images,
            divergence=max(0.0, self.divergence / images),
            sqnr_db=decibels(self.energy, self.loss),
        )


def divergences(full: FloatArray, own: FloatArray) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of the softmax of a net's scores from that of full precision, in nats.

    Args:
        full: scores of full precision, (images, classes).
        own: those of the other net.

    Returns:
        For each image sum p log(p / p') over the classes; shape (images,).
    """
    p, q = log_softmax(full.astype(np.float64)), log_softmax(own.astype(np.float64))
    found: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return found


def log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Logarithms of the softmax over the classes; shape (images, classes)."""
    below = scores - scores.max(axis=1, keepdims=True)
    shifted: npt.NDArray[np.float64] = below - np.log(np.exp(below).sum(axis=1, keepdims=True))
    return shifted


def count_top_k(scores: FloatArray, labels: npt.NDArray[np.int64], k: int) -> int:
    """Images whose label is among the k best, counted as Caffe's accuracy_layer does.

    The label is right when fewer than k other classes have a score at least as large: ties count against it.

    Args:
        scores: (images, classes).
        labels: (images,).

    Raises:
        InputError: a label outside 0 .. classes - 1.
    """
    classes = scores.shape[1]
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        bad = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise InputError(
            f"data.validation: label {bad} does not fit the net's {classes} classes; check the labels"
        )
    own = np.take_along_axis(scores, labels[:, None].astype(np.intp), axis=1)
    better = (scores >= own).sum(axis=1) - 1
    return int((better < k).sum())
