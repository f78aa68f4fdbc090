"""Whether images reach a net as they did in training, judged by the statistics that its BatchNorms stored.

Full precision has a BatchNorm see nearly the mean and variance that it stored, if images like those of
training come through the transform of training. Quantization has no part in it: the weights are those given.
Only BatchNorms that have no other one in front of them are looked at, for behind a BatchNorm the statistics
are steadier than what they are to tell about. How far this carries is measured in docs/transform-check.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from quantize.arrays import FLOAT_BYTES, FloatArray, Floats
from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    Weights,
    dependent_layers,
    needed_layers,
    single_assignment,
    stored_statistics,
)
from quantize.caffenet.model import Model
from quantize.caffenet.norms import epsilon, norm_places
from quantize.data.feed import Feed, thinned
from quantize.data.loader import Images
from quantize.engines.base import Engine, OpenEngine
from quantize.numerics.moments import Moments
from quantize.record import TransformFit, TransformRecord
from quantize.sweep.plan import Costs, micro_batch_size

COLOR_CHANNELS = 3
IMAGES = 64
FEWEST_IMAGES = 8
WORK = 16e9
"""Multiply-accumulates for one transform: with a BatchNorm deep in a large net fewer images are looked at."""
PIXEL_BYTES = 128 << 20
"""What the images that are kept for trying other transforms may take."""
DOUBTFUL = 0.02
"""Misfit in nats: 0.2 deviations of the mean or 1.3 times the variance in every channel."""
FITTING = 0.05
"""Misfit up to which another transform fits and not only fits better: some always does for unlike images."""
CLEARLY = 2.0
"""So many times the misfit of another transform, with 64 images, is not chance; with fewer it takes more."""
HOPELESS = 1.0
"""Misfit in nats that no images explain: 1.4 deviations, or 4.5 times or a twentieth of the variance."""


SWAPPED = (
    "Caffe's transform cannot swap channels: reverse the input channels of the first layer's weights, or "
    "make an LMDB of swapped images"
)


@dataclass(frozen=True)
class Scaling:
    """What a transform makes of the values of pixels: (pixel - mean) * scale.

    Attributes:
        mean: one for all channels, or one for each; none: 0.
        scale: the factor.
        swapped: whether the channels come in the opposite order, which Caffe's transform cannot do.
        about: where it comes from, may be empty.
    """

    mean: tuple[float, ...] = ()
    scale: float = 1.0
    swapped: bool = False
    about: str = ""

    def __str__(self) -> str:
        """Return it as in messages: ``mean 104/117/123, scale 0.017``."""
        means = dict.fromkeys(self.mean) if len(set(self.mean)) == 1 else self.mean
        mean = f"mean {'/'.join(f'{value:g}' for value in means)}" if any(self.mean) else "no mean"
        order = ", channels in the opposite order (RGB)" if self.swapped else ""
        about = f" ({self.about})" if self.about else ""
        return f"{mean}, {_scale_text(self.scale)}{order}{about}"


def _scale_text(scale: float) -> str:
    """A scale, as a fraction where it is one of a round number."""
    if scale == 1:
        return "no scale"
    halves = 2 / scale if scale else 0.0
    is_fraction = halves > 2 and math.isclose(halves, round(halves), rel_tol=1e-6)
    return f"scale 1/{round(halves) / 2:g}" if is_fraction else f"scale {scale:.4g}"


IMAGENET = "ImageNet's; one scale for its three deviations"
"""They are 57.4, 57.1 and 58.4 in blue, green and red; Caffe's transform has one scale, here 1 / 57.6."""
COLOR = (
    Scaling((104, 117, 123)),
    Scaling(),
    Scaling((127.5,), 1 / 127.5),
    Scaling((), 1 / 255),
    Scaling((103.53, 116.28, 123.675), 0.01735, about=IMAGENET),
    Scaling((103.94, 116.78, 123.68), 0.017),
    Scaling((128,), 1 / 128),
    Scaling((127.5,)),
    Scaling((103.53, 116.28, 123.675), 1 / 255),
    Scaling((123, 117, 104)),
    Scaling((123.675, 116.28, 103.53), 0.01735, about=IMAGENET),
    Scaling((123.675, 116.28, 103.53), 1 / 255),
)
OTHER = (
    Scaling(),
    Scaling((), 1 / 255),
    Scaling((127.5,), 1 / 127.5),
    Scaling((128,), 1 / 128),
    Scaling((127.5,)),
    Scaling((33.32,), 1 / 78.5, about="MNIST's"),
)
"""What published nets do with images of three channels and with others, the most usual first: of two that fit
equally well the first is taken."""


@dataclass(frozen=True)
class Match:
    """How what BatchNorms see with one transform compares with what they stored in training.

    Attributes:
        transform: in words.
        values: the same as numbers; None where it has a mean image.
        mean_shift: root mean square over channels of (mean - stored mean) / stored deviation.
        variance_ratio: geometric mean over channels of variance / stored variance.
        misfit: mean over channels of the Kullback-Leibler divergence of the stored normal distribution from
            the one seen, in nats; 0: the same.
    """

    transform: str
    values: Scaling | None
    mean_shift: float
    variance_ratio: float
    misfit: float

    @property
    def record(self) -> TransformFit:
        """What was seen, for programs."""
        return TransformFit(self.transform, self.mean_shift, self.variance_ratio, self.misfit)

    @property
    def figures(self) -> str:
        """What was seen, for people."""
        mean, variance = _digits(self.mean_shift, 2), _digits(self.variance_ratio, 3)
        return f"means {mean} deviations off, variances {variance} times"


def _digits(value: float, count: int) -> str:
    """So many significant digits without an exponent."""
    return np.format_float_positional(value, precision=count, fractional=False, trim="-")


@dataclass(frozen=True)
class TransformCheck:
    """What is known about a transform.

    Attributes:
        layers: the BatchNorms looked at.
        images: how many images were looked at; 0 where nothing could be checked.
        given: the transform that was asked about; None where nothing could be checked.
        tried: other transforms, the most usual first; empty where that was not needed.
        unchecked: why nothing could be checked; empty where it could.
    """

    layers: list[str]
    images: int
    given: Match | None
    tried: list[Match]
    unchecked: str = ""

    @property
    def best(self) -> list[Match]:
        """Those of the transforms tried that fit best, equally well but for chance, the most usual first.

        One with swapped channels is among them only where no other fits as well.
        """
        least = min((fit.misfit for fit in self.tried), default=0.0)
        near = [fit for fit in self.tried if fit.misfit <= max(CLEARLY * self._noise * least, DOUBTFUL / 2)]
        return [fit for fit in near if not (fit.values and fit.values.swapped)] or near

    @property
    def better(self) -> list[Match]:
        """Those of `best` that fit, and clearly better than the given transform, if that does not."""
        if self.given is None or self.given.misfit <= DOUBTFUL:
            return []
        enough = min(FITTING * self._noise, self.given.misfit / (CLEARLY * self._noise))
        return [fit for fit in self.best if fit.misfit < enough]

    @property
    def _noise(self) -> float:
        """How much noisier the statistics are than those of 64 images."""
        return math.sqrt(max(1.0, IMAGES / max(self.images, 1)))

    @property
    def doubtful(self) -> bool:
        """Whether the given transform is probably not the one of training."""
        return self.given is not None and (self.given.misfit > HOPELESS or bool(self.better))

    @property
    def finding(self) -> str:
        """What was found, in one sentence."""
        if self.given is None:
            return f"data.transform cannot be checked: {self.unchecked}"
        seen = f"{self.given.transform}: {self.given.figures} those stored in {self.where}"
        if self.better:
            first, *others = self.better
            equally = f"; equally well: {' or '.join(fit.transform for fit in others)}" if others else ""
            return f"{seen}; {first.transform} fits better ({first.figures}){equally}"
        return f"{seen}{'' if self.given.misfit <= DOUBTFUL else '; no usual transform fits better'}"

    @property
    def remedy(self) -> str:
        """What to do where the transform is doubtful; empty where it is not."""
        if not self.doubtful:
            return ""
        best = self.better[0].values if self.better else None
        if best is None:
            return (
                "check data.transform (mean, scale, crop, order of channels), whether the images are like "
                "those of training, and whether the BatchNorm statistics belong to these weights"
            )
        if best.swapped:
            return f"{SWAPPED}; then {replace(best, swapped=False)}"
        mean = ", ".join(f"{value:g}" for value in best.mean)
        return f"--set 'data.transform={{mean_value: [{mean}], scale: {best.scale:.6g}}}'"

    def record(self, chosen: str | None) -> TransformRecord:
        """It for report.json.

        Args:
            chosen: which transform was chosen, and why.
        """
        given = self.given.record if self.given is not None else None
        tried = [fit.record for fit in self.tried]
        doubts = (self.doubtful, self.finding, self.remedy)
        return TransformRecord(chosen, self.layers, self.images, given, tried, *doubts)

    @property
    def where(self) -> str:
        """The BatchNorms and the number of images, as in messages."""
        shown = ", ".join(self.layers[:2]) + (", ..." if len(self.layers) > 2 else "")
        return f"{shown} ({self.images} image{'s' if self.images != 1 else ''})"


def check_transform(
    model: Model,
    feed: Feed,
    open_engine: OpenEngine,
    others: Sequence[Scaling] = (),
    choose: bool = False,
) -> TransformCheck:
    """Compare what the first BatchNorms see with what they stored.

    Args:
        model: in full precision.
        feed: the images with the transform in question.
        open_engine: opens a net for running.
        others: transforms to try before the usual ones.
        choose: try them even where the given one fits.

    Raises:
        LabelfreeError: an image cannot be read, or a layer in front of the BatchNorms cannot be run.
    """
    weights = model.weights
    flat = single_assignment(model.inference.net)
    first = first_norms(flat)
    norms = [norm for layer in first if (norm := _Norm.of(layer, weights))]
    if not any(isinstance(given, Images) for given in feed.inputs.values()):
        return TransformCheck([], 0, None, [], "no input of the net takes images")
    if not norms:
        why = "its first BatchNorm holds no statistics of training" if first else "the net has no BatchNorm"
        return TransformCheck([], 0, None, [], why)
    stem = NetParameter()
    stem.CopyFrom(flat)
    del stem.layer[:]
    stem.layer.extend(needed_layers(list(flat.layer), [norm.bottom for norm in norms]))
    with closing(open_engine(stem, weights, feed.shapes)) as engine:
        probe = _Probe(engine, norms, feed)
        given = probe.given()
        tried = probe.others(others) if choose or given.misfit > DOUBTFUL else []
        return TransformCheck([norm.name for norm in norms], len(probe.feed), given, tried)


def first_norms(net: NetParameter) -> list[LayerParameter]:
    """The BatchNorms that have no BatchNorm in front of them.

    Args:
        net: with every blob name assigned once.
    """
    norms = [layer for layer in net.layer if norm_places(layer) is not None]
    normed = {layer.name for layer in dependent_layers(net.layer, [norm.top[0] for norm in norms])}
    return [norm for norm in norms if norm.name not in normed]


@dataclass(frozen=True)
class _Norm:
    """A BatchNorm with the statistics of training: mean and variance, float64 (channels,)."""

    name: str
    bottom: str
    mean: Floats
    variance: Floats
    eps: float

    @classmethod
    def of(cls, layer: LayerParameter, weights: Weights) -> _Norm | None:
        """None where the layer holds no statistics of training.

        That is where its third blob is 0, and where all means are 0 and all variances equal: as it was made.
        """
        places = norm_places(layer)
        if places is None or layer.name not in weights or len(weights[layer.name]) != places.blobs:
            return None
        mean, variance = stored_statistics(weights[layer.name], places)
        if not variance.any() or (not mean.any() and np.ptp(variance) == 0):
            return None
        return cls(layer.name, layer.bottom[0], mean, np.maximum(variance, 0), epsilon(layer))


class _Probe:
    """The net up to its first BatchNorms, and a few of the images."""

    def __init__(self, engine: Engine, norms: Sequence[_Norm], feed: Feed) -> None:
        self._norms = norms
        costs = Costs.of(engine.net, engine.shapes, list(engine.inputs), ())
        pixels = FLOAT_BYTES * sum(map(math.prod, feed.shapes.values()))
        enough = min(int(WORK / max(costs.work[-1], 1)), PIXEL_BYTES // pixels)
        self.feed = thinned(feed, min(IMAGES, max(FEWEST_IMAGES, enough)))
        self._blob, self._images = next(
            (blob, given) for blob, given in self.feed.inputs.items() if isinstance(given, Images)
        )
        self._batch = micro_batch_size(costs.widest, len(self.feed), None)
        bottoms = list(dict.fromkeys(norm.bottom for norm in norms))
        self._range = engine.compile(0, len(engine.net.layer), [], bottoms)

    def given(self) -> Match:
        """The fit of the images as they come."""
        transform = self._images.transform
        values = Scaling(transform.mean_value, transform.scale)
        feeds = (batch.feeds for batch in self.feed.batches(self._batch))
        if transform.mean_file is None:
            return self._fit(str(values), values, feeds)
        return self._fit(f"mean file {transform.mean_file.name}, {_scale_text(transform.scale)}", None, feeds)

    def others(self, first: Sequence[Scaling]) -> list[Match]:
        """The fits of some transforms and of the usual ones; with swapped channels if none of them fits."""
        few = self._images
        plain = replace(few.transform, mean_value=(), mean_file=None, scale=1.0)
        raw = Images(few.source, plain, few.phase, None, few.seed, few.threads)
        feed = replace(self.feed, inputs={**self.feed.inputs, self._blob: raw})
        pixels = [batch.feeds for batch in feed.batches(self._batch)]
        color = few.shape[0] == COLOR_CHANNELS
        transforms = list(dict.fromkeys([*first, *(COLOR if color else OTHER)]))
        fits = [self._transformed(values, pixels) for values in transforms]
        if color and min(fit.misfit for fit in fits) > DOUBTFUL:
            fits += [self._transformed(replace(values, swapped=True), pixels) for values in transforms]
        return fits

    def _transformed(self, values: Scaling, pixels: Iterable[Mapping[str, FloatArray]]) -> Match:
        mean = np.array(values.mean or (0.0,), np.float32).reshape(-1, 1, 1)
        order = slice(None, None, -1) if values.swapped else slice(None)
        scale = np.float32(values.scale)
        made = (
            {**feeds, self._blob: np.ascontiguousarray((feeds[self._blob][:, order] - mean) * scale)}
            for feeds in pixels
        )
        return self._fit(str(values), values, made)

    def _fit(self, text: str, values: Scaling | None, fed: Iterable[Mapping[str, FloatArray]]) -> Match:
        """Run batches and compare the statistics of all channels with the stored ones."""
        batches = [
            self._range.run({name: feeds[name] for name in self._range.inputs}).moments for feeds in fed
        ]
        shifts, ratios = [], []
        for norm in self._norms:
            moments = reduce(Moments.merged, (each[norm.bottom] for each in batches))
            stored = norm.variance + norm.eps
            shifts.append((moments.mean - norm.mean) / np.sqrt(stored))
            ratios.append((moments.m2 / max(moments.count - 1, 1) + norm.eps) / stored)
        shift, ratio = np.concatenate(shifts), np.concatenate(ratios)
        with np.errstate(all="ignore"):  # a senseless transform may overflow
            divergence = (ratio + shift**2 - 1 - np.log(ratio)) / 2
            figures = [np.sqrt(np.mean(shift**2)), np.exp(np.mean(np.log(ratio))), np.mean(divergence)]
        return Match(text, values, *(float(np.nan_to_num(f, nan=1e30, posinf=1e30)) for f in figures))
