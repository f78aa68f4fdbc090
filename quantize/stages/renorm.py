"""Stage 2: re-estimated BatchNorm statistics (He & Cheng 2018, section 3.2).

Quantized weights shift the distribution of every layer's output, so the mean and variance that BatchNorm
stored in training no longer fit. They are measured again over the calibration images, each layer seeing
inputs normalised with the *batch* statistics of the layers before it, as in one forward pass of a batch of
all images in training mode. Every other layer behaves as in the TEST phase.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Floats
from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    Weights,
    check_weights,
    foreign_field_text,
    foreign_fields,
    infer_shapes,
    known_part,
    needed_layers,
    single_assignment,
    stored_statistics,
    users,
)
from quantize.data.feed import Feed
from quantize.engines.base import OpenEngine
from quantize.errors import InputError, LabelfreeError
from quantize.numerics.moments import Moments
from quantize.progress import SILENT, Progress
from quantize.sweep.early_pooling import with_early_pooling
from quantize.sweep.pair import beside, both_weights, full_layers, names_of_one_net, of_layers
from quantize.sweep.plan import Step, depth_order
from quantize.sweep.run import Shard

RESOLUTION = 2.0**-22
"""What float32 resolves of a value, and a little more."""


@dataclass(frozen=True)
class BatchNormShift:
    """How far the statistics of one BatchNorm layer had moved.

    Attributes:
        name: the layer.
        channels: number of channels.
        values: values per channel that were measured.
        mean_shift: root mean square over channels of (new mean - old mean) / old standard deviation.
        variance_ratio: geometric mean over channels of new variance / old variance.
        dead: number of channels that have one value for all images.
    """

    name: str
    channels: int
    values: int
    mean_shift: float
    variance_ratio: float
    dead: int = 0


@dataclass(frozen=True)
class FullPrecision:
    """The net before anything of it was quantized.

    Attributes:
        net: the inference net.
        weights: its blobs.
    """

    net: NetParameter
    weights: Weights


def renorm(
    net: NetParameter,
    weights: Weights,
    feed: Feed,
    open_engine: OpenEngine,
    memory: int | None,
    progress: Progress = SILENT,
    full: FullPrecision | None = None,
) -> tuple[Weights, list[BatchNormShift]]:
    """Re-estimate mean and variance of every BatchNorm.

    Args:
        net: the inference net (TEST phase, no data layers).
        weights: its blobs.
        feed: the calibration images.
        open_engine: opens a net for running.
        memory: bytes that the sweep may keep; None: no bound.
        full: the net before anything of it was quantized, for statistics paired with its own; None: the
            statistics are those of the images alone.

    Returns:
        The blobs with new statistics, scale factor 1, as Caffe's batch_norm_layer stores them; the variance
        of the images alone is unbiased (m / (m - 1), m values per channel). And the shifts in network
        order. A net without BatchNorm is returned as it came.

    Raises:
        InputError: a blob is missing or has the wrong shape, or a BatchNorm has a field of a fork.
        LabelfreeError: a statistic is not finite.
    """
    if not any(layer.type == "BatchNorm" for layer in net.layer):
        return weights, []
    for layer, foreign in zip(net.layer, foreign_fields(net), strict=True):
        if layer.type == "BatchNorm" and foreign is not None:
            raise InputError(f"layer {layer.name!r} ({layer.type}): {foreign_field_text(foreign)}")
    known = known_part(net, feed.shapes)
    check_weights(
        known, weights, infer_shapes(known, {name: (1, *shape) for name, shape in feed.shapes.items()})
    )
    tour = Tour.of(net, weights, full, list(feed.shapes))
    found: dict[str, Statistics] = {}
    with names_of_one_net(), closing(open_engine(tour.net, tour.weights, feed.shapes)) as engine:
        shard = Shard(engine, feed, tour.steps, memory)
        if advice := shard.advice():
            progress.note(f"renorm: {advice}")
        progress.start("renorm", shard.plan.work)
        blobs: dict[str, list[FloatArray]] = {}
        moments: dict[str, Moments] = {}
        for norms in tour.norms:
            moments |= shard.advance(blobs, progress=progress)
            new = update(norms, moments)
            blobs = {name: statistics.blobs for name, statistics in new.items()}
            found |= new
    found |= _shared(net, [norm for norms in tour.norms for norm in norms], moments)
    shifts = [_shift(layer.name, weights, found[layer.name]) for layer in net.layer if layer.name in found]
    weights = weights.copy()
    for name, statistics in found.items():
        weights.replace(name, statistics.stored)
    return weights, shifts


@dataclass(frozen=True)
class Reference:
    """Full precision at a BatchNorm.

    Attributes:
        bottom: the blob that the layer reads there, in the net of both.
        mean, variance: float64 (channels,): what the layer stores, divided by its third blob.
        epsilon: what is added to the variance.
    """

    bottom: str
    mean: Floats
    variance: Floats
    epsilon: float

    @classmethod
    def of(cls, layer: LayerParameter, bottom: str, weights: Weights) -> Reference:
        """For a layer, what it reads in full precision, and the blobs of full precision."""
        mean, variance = stored_statistics(weights[layer.name])
        return cls(bottom, mean, variance, layer.batch_norm_param.eps)

    def paired(self, full: Moments, seen: Moments) -> tuple[Floats, Floats]:
        """Mean and variance with which the channels normalise to what they do in full precision.

        With (mu, s^2) the statistics stored, (m, v) the moments in full precision and (m', v') those seen,
        both over the same images, e the epsilon and S = v' (s^2 + e) / v: the mean is
        m' - (m - mu) sqrt(S / (s^2 + e)), the variance S - e. Then (x' - mean) / sqrt(S) has the mean and
        the deviation of (x - mu) / sqrt(s^2 + e). A negative variance becomes 0 and only the mean is right.

        Args:
            full: of the layer's input in full precision.
            seen: of its input in the net being quantized.
        """
        wanted = self.variance + self.epsilon
        ratio = variance_ratio(full, seen)
        total = np.maximum(ratio * wanted, self.epsilon)
        ratio = np.divide(total, wanted, out=ratio, where=wanted > 0)
        return seen.mean - (full.mean - self.mean) * np.sqrt(ratio), total - self.epsilon


@dataclass(frozen=True)
class Norm:
    """A BatchNorm layer of a sweep.

    Attributes:
        name: the layer.
        bottom: the blob that it takes its statistics from.
        reference: full precision there; None: the statistics are those of the batch.
    """

    name: str
    bottom: str
    reference: Reference | None = None


def variance_ratio(full: Moments, seen: Moments) -> Floats:
    """Per channel the variance seen over that in full precision, of equally many values.

    A channel that is constant in one of the two says nothing about the ratio: it counts as 1.
    """
    alive = ~(constant(full) | constant(seen))
    return np.divide(seen.m2 * full.count, full.m2 * seen.count, out=np.ones_like(full.m2), where=alive)


def constant(moments: Moments) -> npt.NDArray[np.bool_]:
    """Per channel whether its values vary less than float32 resolves."""
    found: npt.NDArray[np.bool_] = moments.m2 <= moments.count * np.square(RESOLUTION * moments.mean)
    return found


@dataclass(frozen=True)
class Statistics:
    """What is found for one BatchNorm.

    Attributes:
        mean: float64 (channels,).
        variance: float64 (channels,): of the values seen.
        unbiased: float64 (channels,): the variance that is stored.
        count: values per channel.
        dead: number of channels that have one value for all images.
    """

    mean: Floats
    variance: Floats
    unbiased: Floats
    count: int
    dead: int

    @property
    def blobs(self) -> list[FloatArray]:
        """What the layers behind are run with: the statistics of the batch."""
        return _blobs(self.mean, self.variance)

    @property
    def stored(self) -> list[FloatArray]:
        """What is written."""
        return _blobs(self.mean, self.unbiased)


def measured(norms: Iterable[Norm]) -> tuple[str, ...]:
    """The blobs of the net being quantized whose moments `update` needs."""
    return tuple(dict.fromkeys(norm.bottom for norm in norms))


def references(norms: Iterable[Norm]) -> tuple[str, ...]:
    """The blobs of the full-precision net whose moments `update` needs."""
    return tuple(dict.fromkeys(norm.reference.bottom for norm in norms if norm.reference))


def update(norms: Iterable[Norm], moments: Mapping[str, Moments]) -> dict[str, Statistics]:
    """The new statistics of some BatchNorms.

    Args:
        moments: over all images, of the blobs that `measured` and `references` name.

    Raises:
        LabelfreeError: a statistic is not finite.
    """
    found = {}
    for norm in norms:
        seen = moments[norm.bottom]
        with np.errstate(over="ignore", invalid="ignore"):
            if norm.reference is None:
                mean, variance = seen.mean, seen.m2 / seen.count
                unbiased = seen.m2 / max(seen.count - 1, 1)
            else:
                mean, variance = norm.reference.paired(moments[norm.reference.bottom], seen)
                unbiased = variance
            new = Statistics(mean, variance, unbiased, seen.count, int(constant(seen).sum()))
            if not all(np.isfinite(blob).all() for blob in (*new.blobs, *new.stored)):
                raise LabelfreeError(
                    f"layer {norm.name}: its input has statistics that are not finite; "
                    "layers before it overflow"
                )
        found[norm.name] = new
    return found


def _shared(
    net: NetParameter, norms: Iterable[Norm], moments: Mapping[str, Moments]
) -> dict[str, Statistics]:
    """The statistics of BatchNorms that share their blobs, over all that they read.

    In the sweep each has its own. What is stored must serve them all.
    """
    by_name = {norm.name: norm for norm in norms}
    found: dict[str, Statistics] = {}
    for names in users(net).values():
        uses = [by_name[name] for name in names if name in by_name]
        if len(uses) < 2:
            continue
        first = uses[0]
        joined = {first.bottom: reduce(Moments.merged, (moments[use.bottom] for use in uses))}
        if first.reference is not None:
            bottoms = [use.reference.bottom for use in uses if use.reference is not None]
            joined[first.reference.bottom] = reduce(Moments.merged, (moments[bottom] for bottom in bottoms))
        found |= dict.fromkeys((use.name for use in uses), update([first], joined)[first.name])
    return found


@dataclass(frozen=True)
class Tour:
    """What the sweep of `renorm` runs: the net up to its last BatchNorm, in depth order.

    With a full-precision net beside it that one is passed as a whole in the first step: none of its
    statistics change, so nothing of it need be kept.

    Attributes:
        net: the layers.
        weights: their blobs.
        steps: of the sweep.
        norms: by step those whose statistics are found there.
    """

    net: NetParameter
    weights: Weights
    steps: list[Step]
    norms: list[list[Norm]]

    @classmethod
    def of(
        cls,
        net: NetParameter,
        weights: Weights,
        full: FullPrecision | None = None,
        inputs: Collection[str] = (),
    ) -> Tour:
        """For an inference net with at least one BatchNorm.

        Args:
            full: for paired statistics.
            inputs: the blobs that feed both nets then.
        """
        flat = single_assignment(net)
        front, by_name = _front(flat, full)
        pooled, weights = with_early_pooling(flat, weights)
        ordered, cuts = depth_order(pooled, lambda layer: layer.type == "BatchNorm")
        steps: list[Step] = []
        norms: list[list[Norm]] = []
        for cut, following in pairwise(cuts):
            # Where pooling has moved, the layer reads something else than what it takes its statistics from.
            here = [by_name[layer.name] for layer in ordered.layer[cut:following] if layer.name in by_name]
            first = () if steps else references(by_name.values())
            steps.append(Step(len(front) + cut, (*first, *measured(here))))
            norms.append(here)
        layers = list(ordered.layer[: cuts[-2]])
        if full is not None:
            weights = both_weights(weights, full.weights, front)
            front = full_layers(front, inputs)
        return cls(of_layers(ordered, [*front, *layers]), weights, steps, norms)


def _front(flat: NetParameter, full: FullPrecision | None) -> tuple[list[LayerParameter], dict[str, Norm]]:
    """The layers of the full-precision net that are needed, and the BatchNorms by name.

    Args:
        flat: the net being quantized.
    """
    norms = {layer.name: layer for layer in flat.layer if layer.type == "BatchNorm"}
    if full is None:
        return [], {name: Norm(name, layer.bottom[0]) for name, layer in norms.items()}
    layers = single_assignment(full.net).layer
    bottoms = {layer.name: layer.bottom[0] for layer in layers if layer.name in norms}
    return needed_layers(layers, bottoms.values()), {
        name: Norm(name, layer.bottom[0], Reference.of(layer, beside(bottoms[name]), full.weights))
        for name, layer in norms.items()
    }


def _blobs(mean: Floats, variance: Floats) -> list[FloatArray]:
    return [mean.astype(np.float32), variance.astype(np.float32), np.ones(1, np.float32)]


def _shift(name: str, weights: Weights, found: Statistics) -> BatchNormShift:
    mean, variance = stored_statistics(weights[name])
    alive = (variance > 0) & (found.unbiased > 0)
    deviations = (found.mean - mean)[alive] / np.sqrt(variance[alive])
    logs = np.log(found.unbiased[alive] / variance[alive])
    return BatchNormShift(
        name=name,
        channels=len(mean),
        values=found.count,
        mean_shift=float(np.sqrt(np.mean(deviations**2))) if alive.any() else 0.0,
        variance_ratio=math.exp(float(np.mean(logs))) if alive.any() else 1.0,
        dead=found.dead,
    )
