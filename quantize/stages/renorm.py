"""Stage 2: re-estimated BatchNorm statistics (He & Cheng 2018, section 3.2).

Quantized weights shift the distribution of every layer's output, so the mean and variance that BatchNorm
stored in training no longer fit. They are measured again over the calibration images, each layer seeing
inputs normalised with the *batch* statistics of the layers before it, as in one forward pass of a batch of
all images in training mode. Every other layer behaves as in the TEST phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    Weights,
    check_weights,
    infer_shapes,
    known_part,
    single_assignment,
)
from quantize.data.feed import Feed
from quantize.engines.base import OpenEngine
from quantize.errors import LabelfreeError
from quantize.numerics.moments import Moments
from quantize.progress import SILENT, Progress
from quantize.record import BatchNormShift
from quantize.sweep.early_pooling import with_early_pooling
from quantize.sweep.pair import of_layers
from quantize.sweep.plan import Step, depth_order
from quantize.sweep.run import Shard


def renorm(
    net: NetParameter,
    weights: Weights,
    feed: Feed,
    open_engine: OpenEngine,
    memory: int | None,
    progress: Progress = SILENT,
) -> tuple[Weights, list[BatchNormShift]]:
    """Re-estimate mean and variance of every BatchNorm.

    Args:
        net: the inference net (TEST phase, no data layers).
        weights: its blobs.
        feed: the calibration images.
        open_engine: opens a net for running.
        memory: bytes that the sweep may keep; None: no bound.

    Returns:
        The blobs with new statistics: mean, unbiased variance (m / (m - 1), m values per channel), scale
        factor 1, as Caffe's batch_norm_layer stores them; and the shifts in network order. A net without
        BatchNorm is returned as it came.

    Raises:
        InputError: a blob is missing or has the wrong shape.
        LabelfreeError: a statistic is not finite.
    """
    if not any(layer.type == "BatchNorm" for layer in net.layer):
        return weights, []
    known = known_part(net, feed.shapes)
    check_weights(
        known, weights, infer_shapes(known, {name: (1, *shape) for name, shape in feed.shapes.items()})
    )
    tour = Tour.of(net, weights)
    found: dict[str, Statistics] = {}
    with closing(open_engine(tour.net, tour.weights, feed.shapes)) as engine:
        shard = Shard(engine, feed, tour.steps, memory)
        if advice := shard.advice():
            progress.note(f"renorm: {advice}")
        progress.start("renorm", shard.plan.work)
        blobs: dict[str, list[FloatArray]] = {}
        for norms in tour.norms:
            new = update(norms, shard.advance(blobs, progress=progress))
            blobs = {name: statistics.blobs for name, statistics in new.items()}
            found |= new
    shifts = [_shift(layer.name, weights, found[layer.name]) for layer in net.layer if layer.name in found]
    weights = weights.copy()
    for name, statistics in found.items():
        weights.replace(name, statistics.stored)
    return weights, shifts


@dataclass(frozen=True)
class Norm:
    """A BatchNorm layer of a sweep.

    Attributes:
        name: the layer.
        bottom: the blob that it takes its statistics from.
    """

    name: str
    bottom: str


@dataclass(frozen=True)
class Statistics:
    """What is found for one BatchNorm.

    Attributes:
        mean: float64 (channels,).
        variance: float64 (channels,): of the values seen.
        unbiased: float64 (channels,): the variance that is stored.
        count: values per channel.
    """

    mean: Floats
    variance: Floats
    unbiased: Floats
    count: int

    @property
    def blobs(self) -> list[FloatArray]:
        """What the layers behind are run with: the statistics of the batch."""
        return _blobs(self.mean, self.variance)

    @property
    def stored(self) -> list[FloatArray]:
        """What is written."""
        return _blobs(self.mean, self.unbiased)


def norms_of(layers: Iterable[LayerParameter]) -> list[Norm]:
    """The BatchNorms among layers."""
    return [Norm(layer.name, layer.bottom[0]) for layer in layers if layer.type == "BatchNorm"]


def measured(norms: Iterable[Norm]) -> tuple[str, ...]:
    """The blobs whose moments `update` needs."""
    return tuple(dict.fromkeys(norm.bottom for norm in norms))


def update(norms: Iterable[Norm], moments: Mapping[str, Moments]) -> dict[str, Statistics]:
    """The new statistics of some BatchNorms.

    Args:
        moments: over all images, of the blobs that `measured` names.

    Raises:
        LabelfreeError: a statistic is not finite.
    """
    found = {}
    for norm in norms:
        seen = moments[norm.bottom]
        with np.errstate(over="ignore"):
            finite = np.isfinite(seen.mean) & np.isfinite((seen.m2 / seen.count).astype(np.float32))
        if not finite.all():
            raise LabelfreeError(
                f"layer {norm.name}: its input has statistics that are not finite; layers before it overflow"
            )
        unbiased = seen.m2 / max(seen.count - 1, 1)
        found[norm.name] = Statistics(seen.mean, seen.m2 / seen.count, unbiased, seen.count)
    return found


@dataclass(frozen=True)
class Tour:
    """What the sweep of `renorm` runs: the net up to its last BatchNorm, in depth order.

    Attributes:
        net: the layers.
        weights: their blobs.
        steps: of the sweep.
        norms: by step those whose statistics it measures.
    """

    net: NetParameter
    weights: Weights
    steps: list[Step]
    norms: list[list[Norm]]

    @classmethod
    def of(cls, net: NetParameter, weights: Weights) -> Tour:
        """For an inference net with at least one BatchNorm."""
        flat = single_assignment(net)
        by_name = {norm.name: norm for norm in norms_of(flat.layer)}
        pooled, weights = with_early_pooling(flat, weights)
        ordered, cuts = depth_order(pooled, lambda layer: layer.type == "BatchNorm")
        steps, norms = [], []
        for cut, following in pairwise(cuts):
            # Where pooling has moved, the layer reads something else than what it takes its statistics from.
            here = [by_name[layer.name] for layer in ordered.layer[cut:following] if layer.name in by_name]
            steps.append(Step(cut, measured(here)))
            norms.append(here)
        return cls(of_layers(ordered, ordered.layer[: steps[-1].stop]), weights, steps, norms)


def _blobs(mean: Floats, variance: Floats) -> list[FloatArray]:
    return [mean.astype(np.float32), variance.astype(np.float32), np.ones(1, np.float32)]


def _shift(name: str, weights: Weights, found: Statistics) -> BatchNormShift:
    mean, variance, factor = (np.asarray(blob, np.float64).reshape(-1) for blob in weights[name])
    scale = 1 / factor[0] if factor[0] else 0.0
    mean, variance = mean * scale, variance * scale
    alive = (variance > 0) & (found.unbiased > 0)
    deviations = (found.mean - mean)[alive] / np.sqrt(variance[alive])
    logs = np.log(found.unbiased[alive] / variance[alive])
    return BatchNormShift(
        name=name,
        channels=len(mean),
        values=found.count,
        mean_shift=float(np.sqrt(np.mean(deviations**2))) if alive.any() else 0.0,
        variance_ratio=math.exp(float(np.mean(logs))) if alive.any() else 1.0,
    )
