"""Accuracy and agreement of a quantized net and its full-precision net on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantize.caffenet import NetParameter, Weights
from quantize.data.loader import Images
from quantize.engines.base import Engine, FloatArray, OpenEngine
from quantize.errors import InputError
from quantize.progress import SILENT, Progress
from quantize.sweep import Costs, micro_batch_size

TOP_K = (1, 5)


@dataclass(frozen=True)
class Candidate:
    """One of the nets to compare.

    Attributes:
        net: the inference net.
        weights: its blobs.
        blob: its input blob.
        scores: the blob with one score per class.
    """

    net: NetParameter
    weights: Weights
    blob: str
    scores: str


@dataclass(frozen=True)
class Evaluation:
    """Percent over ``images`` images.

    Attributes:
        images: how many.
        accuracy: top-1 and top-5 by candidate, ``{"top1": .., "top5": ..}``; None without labels.
        agreement: share of images on which both candidates put the same class first.
    """

    images: int
    accuracy: dict[str, dict[str, float | None]]
    agreement: float


def evaluate(
    candidates: Mapping[str, Candidate],
    images: Images,
    open_engine: OpenEngine,
    progress: Progress = SILENT,
) -> Evaluation:
    """Run two nets over the same images.

    Args:
        candidates: full precision first, quantized second.
        images: transformed for the TEST phase.
        open_engine: opens a net for running.

    Raises:
        InputError: a label does not fit the number of classes, or the nets' scores do not fit each other.
    """
    with ExitStack() as stack:
        engines = [
            stack.enter_context(closing(open_engine(c.net, c.weights, {c.blob: images.shape})))
            for c in candidates.values()
        ]
        return _compare(list(candidates.items()), engines, images, progress)


def _compare(
    candidates: Sequence[tuple[str, Candidate]], engines: Sequence[Engine], images: Images, progress: Progress
) -> Evaluation:
    runners = [
        engine.compile(0, len(candidate.net.layer), [candidate.scores])
        for engine, (_, candidate) in zip(engines, candidates, strict=True)
    ]
    widest = max(Costs.of(e.net, e.shapes, list(e.inputs), ()).widest for e in engines)
    batch = micro_batch_size(widest, len(images), None)
    hits: dict[str, dict[int, int]] = {name: dict.fromkeys(TOP_K, 0) for name, _ in candidates}
    agreed, labeled = 0, 0
    progress.start("evaluate", len(images))
    for pixels, labels in images.batches(batch):
        first: list[npt.NDArray[np.intp]] = []
        for (name, candidate), runner in zip(candidates, runners, strict=True):
            scores = runner.run({candidate.blob: pixels}).blobs[candidate.scores]
            scores = scores.reshape(len(pixels), -1)
            first.append(scores.argmax(axis=1))
            if labels is not None:
                for k in TOP_K:
                    hits[name][k] += count_top_k(scores, labels, k)
        agreed += int((first[0] == first[1]).sum())
        labeled += len(pixels) if labels is not None else 0
        progress.advance(len(pixels))
    count = len(images)
    accuracy = {
        name: {f"top{k}": 100 * hits[name][k] / count if labeled == count else None for k in TOP_K}
        for name, _ in candidates
    }
    return Evaluation(count, accuracy, 100 * agreed / count)


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
