"""How far the output of every layer is from full precision, measured on a few images.

Unlike the error of the weights alone, this is what has accumulated up to a layer: its own weights and those
of all layers before it, quantized activations included. It is measured behind the layer's BatchNorm and
Scale, before its ReLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

import numpy as np

from quantize.arrays import FLOAT_BYTES, FloatArray, Shape
from quantize.caffenet import NetGraph
from quantize.caffenet.model import Model
from quantize.caffenet.traits import Trait
from quantize.data.feed import Feed
from quantize.engines.base import OpenEngine, Range
from quantize.numerics.decibels import decibels
from quantize.progress import SILENT, Progress
from quantize.record import LayerSqnr

MOST_IMAGES = 32
"""Enough for a tenth of a decibel: every image adds thousands of values per layer."""
FEWEST_IMAGES = 16
SHARE = 1 / 32
"""Of the images that the stages pass through the net. Three nets see each: a tenth of the run's time."""
MICRO_BATCH_BYTES = 32 << 20
"""What the measured outputs of one net may take in one micro-batch."""


def images_to_measure(passed: int) -> int:
    """How many images are enough, where the stages pass ``passed`` through the net."""
    return min(MOST_IMAGES, max(FEWEST_IMAGES, int(passed * SHARE)))


def output_sqnr(
    full: Model,
    others: Mapping[str, Model],
    layers: Sequence[str],
    feed: Feed,
    open_engine: OpenEngine,
    progress: Progress = SILENT,
) -> list[LayerSqnr]:
    """Compare the outputs of ``layers`` in other versions of a model with those in full precision.

    Args:
        full: the model before compression.
        others: versions that have layers of the same names.
        layers: names of layers with weights.
        feed: the images to measure on.
    """
    energy = dict.fromkeys(layers, 0.0)
    loss = {name: dict.fromkeys(layers, 0.0) for name in others}
    with ExitStack() as stack:
        progress.start("report", len(feed))
        versions = [full, *others.values()]
        taps = [_Taps(version, layers, feed.shapes, open_engine, stack) for version in versions]
        batch = max(1, min(len(feed), MICRO_BATCH_BYTES // max(t.bytes_per_image for t in taps)))
        for images in feed.batches(batch):
            reference = taps[0].run(images.feeds)
            for layer in layers:
                energy[layer] += squared(reference[layer])
            for name, own in zip(others, taps[1:], strict=True):
                for layer, output in own.run(images.feeds).items():
                    with np.errstate(over="ignore", invalid="ignore"):  # an infinite output has no decibels
                        loss[name][layer] += squared(reference[layer] - output)
            progress.advance(len(images))
    return [
        LayerSqnr(layer, {name: decibels(energy[layer], loss[name][layer]) for name in others})
        for layer in layers
    ]


class _Taps:
    """An opened net that gives the outputs of some layers."""

    def __init__(
        self,
        version: Model,
        layers: Sequence[str],
        inputs: Mapping[str, Shape],
        open_engine: OpenEngine,
        stack: ExitStack,
    ) -> None:
        graph = NetGraph(version.inference.net)
        flat = graph.net
        ends = {name: [graph.layers[name], *graph.followers(name, Trait.AFFINE)][-1] for name in layers}
        self.tops = {name: end.top[0] for name, end in ends.items()}
        last = max(i for i, layer in enumerate(flat.layer) if layer.name in {e.name for e in ends.values()})
        del flat.layer[last + 1 :]
        engine = stack.enter_context(closing(open_engine(flat, version.weights, inputs)))
        outputs = list(dict.fromkeys(self.tops.values()))
        shapes = [engine.shapes.blobs[top] for top in outputs]
        self.bytes_per_image = FLOAT_BYTES * sum(int(np.prod(shape)) for shape in shapes)
        self.range: Range = engine.compile(0, len(flat.layer), outputs)

    def run(self, feeds: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """The output by layer."""
        blobs = self.range.run(feeds).blobs
        return {name: blobs[top] for name, top in self.tops.items()}


def squared(values: FloatArray) -> float:
    """The sum of squares, in float64."""
    flat = values.astype(np.float64).reshape(-1)
    return float(flat @ flat)
