"""Stage 2: re-estimated BatchNorm statistics (He & Cheng 2018, section 3.2).

Quantized weights shift the distribution of every layer's output, so the mean and variance that BatchNorm
stored in training no longer fit. They are measured again over the calibration images, each layer seeing
inputs normalised with the *batch* statistics of the layers before it, as in one forward pass of a batch of
all images in training mode. Every other layer behaves as in the TEST phase.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Floats
from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    Weights,
    foreign_field_text,
    foreign_fields,
    needed_layers,
    single_assignment,
    stored_statistics,
    users,
)
from quantize.caffenet.model import Model
from quantize.caffenet.norms import NormPlaces, epsilon, norm_places, places_of, with_statistics
from quantize.caffenet.quantized import alpha_terms, correctable
from quantize.data.feed import Feed
from quantize.engines.base import OpenEngine
from quantize.errors import InputError, LabelfreeError
from quantize.numerics.moments import Moments
from quantize.progress import SILENT, Progress
from quantize.record import BatchNormShift
from quantize.settings import RenormSettings
from quantize.sweep.early_pooling import with_early_pooling
from quantize.sweep.pair import beside, both_weights, full_layers, names_of_one_net, of_layers
from quantize.sweep.plan import Step, depth_order
from quantize.sweep.run import Shard

MOST_NAMED = 5
"""Layers that one line names."""
NO_BIASES: Mapping[str, str] = MappingProxyType({})
RESOLUTION = 2.0**-22
"""What float32 resolves of a value, and a little more."""


def renorm(
    model: Model,
    feed: Feed,
    settings: RenormSettings,
    open_engine: OpenEngine,
    memory: int | None,
    progress: Progress = SILENT,
    full: Model | None = None,
) -> tuple[Model, list[BatchNormShift]]:
    """Re-estimate mean and variance of every BatchNorm, and correct biases.

    Args:
        model: with quantized weights.
        feed: the calibration images.
        settings: which statistics, and whether layers that no BatchNorm follows keep the mean of their output
            by their bias.
        open_engine: opens a net for running.
        memory: bytes that the sweep may keep; None: no bound.
        full: the model in full precision, for paired statistics; None: what ``model`` was made from.

    Returns:
        The model with new statistics, scale factor 1, as Caffe's batch_norm_layer stores them; the variance
        of the images alone is unbiased (m / (m - 1), m values per channel). And the shifts in network
        order. Where there is neither a BatchNorm nor a bias to correct, the blobs are those that came.

    Raises:
        InputError: a blob is missing or has the wrong shape, a BatchNorm has a field of a fork, or full
            precision is needed and not known.
        LabelfreeError: a statistic is not finite.
    """
    full = full or model.full or (None if model.is_quantized else model)
    done = replace(model, full=full)
    if settings.statistics == "measured":
        full = None
    elif full is None:
        raise InputError(
            "renorm: paired statistics need the model in full precision, which the files of a quantized one "
            "do not hold: give full=Model.load(...), or settings={'statistics': 'measured'}"
        )
    net = model.inference.net
    corrected = full is not None and settings.bias_correction and model.solver != "data_aware"
    biases = correctable(net) if corrected else NO_BIASES
    if full is not None and settings.bias_correction and (moved := uncorrectable(net)):
        shown = ", ".join(moved[:MOST_NAMED]) + (", ..." if len(moved) > MOST_NAMED else "")
        progress.note(
            f"renorm: the mean of what {shown} puts out is not kept: no BatchNorm follows, and there is no "
            "bias of its own to correct"
        )
    if not biases and not any(map(norm_places, net.layer)):
        return done, []
    for layer, foreign in zip(net.layer, foreign_fields(net), strict=True):
        if norm_places(layer) is not None and foreign is not None:
            raise InputError(f"layer {layer.name!r} ({layer.type}): {foreign_field_text(foreign)}")
    model = model.checked(feed.shapes)
    weights = model.weights
    tour = Tour.of(model, full, list(feed.shapes), biases)
    found: dict[str, Statistics | Correction] = {}
    with names_of_one_net(), closing(open_engine(tour.net, tour.weights, feed.shapes)) as engine:
        shard = Shard(engine, feed, tour.steps, memory)
        if advice := shard.advice():
            progress.note(f"renorm: {advice}")
        progress.start("renorm", shard.plan.work)
        blobs: dict[str, list[FloatArray]] = {}
        moments: dict[str, Moments] = {}
        for repairs in tour.repairs:
            moments |= shard.advance(blobs, progress=progress)
            new = update(repairs, moments)
            blobs = {name: repaired.blobs for name, repaired in new.items()}
            found |= new
    norms = [norm for repairs in tour.repairs for norm in repairs if isinstance(norm, Norm)]
    found |= _shared(net, norms, moments)
    shifts, changed = [], weights.copy()
    for layer in net.layer:
        repaired = found.get(layer.name)
        if isinstance(repaired, Statistics):
            shifts.append(_shift(weights, repaired))
            changed.replace(layer.name, repaired.stored)
        elif repaired is not None:
            repaired.write(changed)
    return replace(done, weights=changed), shifts


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
        mean, variance = stored_statistics(weights[layer.name], places_of(layer))
        return cls(bottom, mean, variance, epsilon(layer))

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
        places: where its blobs keep the statistics.
        blobs: those.
        bottom: the blob that it takes its statistics from.
        reference: full precision there; None: the statistics are those of the batch.
    """

    name: str
    places: NormPlaces
    blobs: Sequence[FloatArray]
    bottom: str
    reference: Reference | None = None

    @classmethod
    def of(cls, layer: LayerParameter, weights: Weights, reference: Reference | None = None) -> Norm:
        """For a layer, and its blobs as far as they are known (before anything is measured)."""
        blobs = list(weights[layer.name]) if layer.name in weights else []
        return cls(layer.name, places_of(layer), blobs, layer.bottom[0], reference)

    @property
    def full(self) -> str | None:
        """The blob of the full-precision net whose moments are needed."""
        return None if self.reference is None else self.reference.bottom

    def update(self, moments: Mapping[str, Moments]) -> Statistics:
        """The new statistics.

        Raises:
            LabelfreeError: a statistic is not finite.
        """
        seen = moments[self.bottom]
        with np.errstate(over="ignore", invalid="ignore"):
            if self.reference is None:
                mean, variance = seen.mean, seen.m2 / seen.count
                unbiased = seen.m2 / max(seen.count - 1, 1)
            else:
                mean, variance = self.reference.paired(moments[self.reference.bottom], seen)
                unbiased = variance
            new = Statistics(self, mean, variance, unbiased, seen.count, int(constant(seen).sum()))
            if not all(np.isfinite(blob).all() for blob in (*new.blobs, *new.stored)):
                raise LabelfreeError(
                    f"layer {self.name}: its input has statistics that are not finite; "
                    "layers before it overflow"
                )
        return new


@dataclass(frozen=True)
class Bias:
    """The bias of a quantized layer of a sweep: the mean of its output is kept as in full precision.

    Attributes:
        layer: the layer.
        name: the Scale layer behind it, with its alpha.
        bottom: the blob between the two.
        full: what the layer puts out in full precision, in the net of both.
        alpha, shift: float32 (channels,): the blobs of the Scale layer.
    """

    layer: str
    name: str
    bottom: str
    full: str
    alpha: FloatArray
    shift: FloatArray

    def update(self, moments: Mapping[str, Moments]) -> Correction:
        """What is to be added to the output.

        Raises:
            LabelfreeError: a mean is not finite.
        """
        seen = self.alpha * moments[self.bottom].mean + self.shift
        change = moments[self.full].mean - seen
        if not np.isfinite(change.astype(np.float32)).all():
            raise LabelfreeError(f"layer {self.layer}: its output has means that are not finite")
        return Correction(self, change)


@dataclass(frozen=True)
class Correction:
    """What is found for the bias of one layer.

    Attributes:
        bias: which.
        change: float64 (channels,): to be added.
    """

    bias: Bias
    change: Floats

    @property
    def blobs(self) -> list[FloatArray]:
        """What the layers behind are run with: the layer itself has run."""
        return [self.bias.alpha, (self.bias.shift + self.change).astype(np.float32)]

    def write(self, weights: Weights) -> None:
        """Put it into the layer's bias b, and so 1 - alpha of it into the Scale layer, with b (1 - alpha)."""
        Q, b = weights[self.bias.layer]
        weights.replace(self.bias.layer, [Q, (b + self.change.reshape(b.shape)).astype(np.float32)])
        shift = self.bias.shift + self.change * (1 - self.bias.alpha)
        weights.replace(self.bias.name, [self.bias.alpha, shift.astype(np.float32)])


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
        norm: the layer.
        mean: float64 (channels,).
        variance: float64 (channels,): of the values seen.
        unbiased: float64 (channels,): the variance that is stored.
        count: values per channel.
        dead: number of channels that have one value for all images.
    """

    norm: Norm
    mean: Floats
    variance: Floats
    unbiased: Floats
    count: int
    dead: int

    @property
    def blobs(self) -> list[FloatArray]:
        """What the layers behind are run with: the statistics of the batch."""
        return with_statistics(self.norm.blobs, self.norm.places, self.mean, self.variance)

    @property
    def stored(self) -> list[FloatArray]:
        """What is written."""
        return with_statistics(self.norm.blobs, self.norm.places, self.mean, self.unbiased)


def measured(repairs: Iterable[Norm | Bias]) -> tuple[str, ...]:
    """The blobs of the net being quantized whose moments `update` needs."""
    return tuple(dict.fromkeys(repair.bottom for repair in repairs))


def references(repairs: Iterable[Norm | Bias]) -> tuple[str, ...]:
    """The blobs of the full-precision net whose moments `update` needs."""
    return tuple(dict.fromkeys(repair.full for repair in repairs if repair.full is not None))


def update(
    repairs: Iterable[Norm | Bias], moments: Mapping[str, Moments]
) -> dict[str, Statistics | Correction]:
    """What some layers are to have from now on, by their names.

    Args:
        moments: over all images, of the blobs that `measured` and `references` name.

    Raises:
        LabelfreeError: a statistic is not finite.
    """
    return {repair.name: repair.update(moments) for repair in repairs}


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
        found |= dict.fromkeys((use.name for use in uses), first.update(joined))
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
        repairs: by step what is found there.
    """

    net: NetParameter
    weights: Weights
    steps: list[Step]
    repairs: list[list[Norm | Bias]]

    @classmethod
    def of(
        cls,
        model: Model,
        full: Model | None = None,
        inputs: Collection[str] = (),
        biases: Mapping[str, str] = NO_BIASES,
    ) -> Tour:
        """For a model with something to repair.

        Args:
            full: for paired statistics.
            inputs: the blobs that feed both nets then.
            biases: layers whose bias is to be corrected, and the Scale layers with their alphas
                (`correctable`).
        """
        flat = single_assignment(model.inference.net)
        front, by_name = _front(flat, model.weights, full, biases)
        pooled, weights = with_early_pooling(flat, model.weights)
        ordered, cuts = depth_order(pooled, lambda layer: layer.name in by_name)
        steps: list[Step] = []
        repairs: list[list[Norm | Bias]] = []
        for cut, following in pairwise(cuts):
            # Where pooling has moved, the layer reads something else than what it takes its statistics from.
            here = [by_name[layer.name] for layer in ordered.layer[cut:following] if layer.name in by_name]
            first = () if steps else references(by_name.values())
            steps.append(Step(len(front) + cut, (*first, *measured(here))))
            repairs.append(here)
        layers = list(ordered.layer[: cuts[-2]])
        if full is not None:
            weights = both_weights(weights, full.weights, front)
            front = full_layers(front, inputs)
        return cls(of_layers(ordered, [*front, *layers]), weights, steps, repairs)


def _front(
    flat: NetParameter, weights: Weights, full: Model | None, biases: Mapping[str, str]
) -> tuple[list[LayerParameter], dict[str, Norm | Bias]]:
    """The layers of the full-precision net that are needed, and what is to be repaired, by layer.

    Args:
        flat: the net being quantized.
        weights: its blobs.
    """
    norms = {layer.name: layer for layer in flat.layer if norm_places(layer) is not None}
    if full is None:
        return [], {name: Norm.of(layer, weights) for name, layer in norms.items()}
    layers = single_assignment(full.inference.net).layer
    bottoms = {layer.name: layer.bottom[0] for layer in layers if layer.name in norms}
    tops = {layer.name: layer.top[0] for layer in layers if layer.name in biases}
    repairs: dict[str, Norm | Bias] = {
        name: Norm.of(layer, weights, Reference.of(layer, beside(bottoms[name]), full.weights))
        for name, layer in norms.items()
    }
    scales = {layer.name: layer for layer in flat.layer}
    for name, scale in biases.items():
        bottom, top = scales[scale].bottom[0], scales[scale].top[0]
        if not only_normalized(flat, top):
            repairs[scale] = Bias(name, scale, bottom, beside(tops[name]), *weights[scale])
    return needed_layers(layers, [*bottoms.values(), *tops.values()]), repairs


def uncorrectable(net: NetParameter) -> list[str]:
    """The quantized layers whose output may get another mean that nothing takes away.

    Args:
        net: the inference net with its ``*_alpha_term`` layers.
    """
    flat = single_assignment(net)
    tops = {layer.name: layer.top[0] for layer in flat.layer if layer.top}
    left = {name: terms for name, terms in alpha_terms(net).items() if name not in correctable(net)}
    return [name for name in left if not all(only_normalized(flat, tops[term]) for term in left[name])]


def only_normalized(net: NetParameter, blob: str) -> bool:
    """Whether BatchNorms read a blob and nothing else does.

    Args:
        net: with every blob name assigned once.
    """
    readers = [layer for layer in net.layer if blob in layer.bottom]
    return bool(readers) and all(norm_places(reader) is not None for reader in readers)


def _shift(weights: Weights, found: Statistics) -> BatchNormShift:
    name = found.norm.name
    mean, variance = stored_statistics(weights[name], found.norm.places)
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
