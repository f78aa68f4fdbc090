"""Runs a net in ONNX Runtime: each range of layers becomes a graph of its own.

``layers`` has one translator per layer type, ``graph`` writes the graph down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    Shapes,
    Weights,
    infer_shapes,
    needed_layers,
)
from quantize.engines.base import Engine, Range, RangeResult
from quantize.engines.onnx import fork_layers as fork_layers  # registers the translators
from quantize.engines.onnx.graph import Graph, open_session
from quantize.engines.onnx.layers import TRANSLATORS, Layer, UnsupportedError
from quantize.errors import InputError, LabelfreeError
from quantize.host import available_threads, pool
from quantize.numerics.moments import Moments, moments_of

CACHE_BYTES = 16 << 20
"""What the bottoms and tops of a range's widest layer may take: larger micro-batches are run in parts of this
size, for blobs that leave the cache between two operators cost more than the operators' overhead.

Every thread runs parts of its own. Operators that onnxruntime does not spread over threads, such as the
reordering at the ends of a range, are spread so as well, and no thread waits for another within a part."""


class OnnxEngine(Engine):
    """A net opened in ONNX Runtime.

    Args:
        net, weights, inputs: see ``Engine``.
        threads: that run parts of a micro-batch at the same time; default: as `available_threads` says. An
            image's results do not depend on them.
        part_bytes: what the bottoms and tops of the widest layer may take; see ``CACHE_BYTES``.

    Raises:
        InputError: a layer's parameters are impossible, a blob is missing or has the wrong shape, or a layer
            mixes the images of a batch. Types without a translator are refused when a range needs them.
    """

    def __init__(
        self,
        net: NetParameter,
        weights: Weights,
        inputs: Mapping[str, Shape],
        threads: int | None = None,
        part_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(net, weights, inputs)
        self.threads = threads or available_threads()
        self.part_bytes = part_bytes
        self.per_image = _values_per_image(net, inputs, self.shapes)
        self.pool = pool(self.threads, "labelfree-onnx")

    def set_blobs(self, layer: str, blobs: Sequence[FloatArray]) -> None:
        """Replace a layer's blobs for the ranges compiled from now on; the net may lack the layer.

        Raises:
            ValueError: they have other shapes than the layer's.
        """
        wanted = self.shapes.params.get(layer)
        if wanted is not None and [blob.shape for blob in blobs] != wanted:
            raise ValueError(f"layer {layer!r} needs blobs of the shapes {wanted}")
        super().set_blobs(layer, blobs)

    def compile(
        self,
        start: int,
        stop: int,
        outputs: Sequence[str],
        moments: Sequence[str] = (),
    ) -> Range:
        """Prepare the layers ``start <= i < stop``; see ``Engine``.

        Raises:
            InputError: a layer that the outputs or moments need cannot be translated.
            LabelfreeError: onnxruntime refuses the graph.
        """
        return _OnnxRange(self, range(start, stop), outputs, moments)

    def close(self) -> None:
        """End the threads; parts that have not begun are dropped."""
        self.pool.shutdown(cancel_futures=True)


def _values_per_image(net: NetParameter, inputs: Mapping[str, Shape], one: Shapes) -> dict[str, bool]:
    """Of each blob whether its first axis grows with the batch (otherwise it is the same for all batches).

    Found by inferring the shapes of a batch of 2 as well; ``one`` are those of a batch of 1.

    Raises:
        InputError: a layer's blobs or another axis depend on the batch, so it cannot serve any batch.
    """
    two = infer_shapes(net, {name: (2, *shape) for name, shape in inputs.items()})
    grows = {}
    for layer in net.layer:
        same = two.params[layer.name] == one.params[layer.name]
        for top in layer.top:
            small, large = one.blobs[top], two.blobs[top]
            grows[top] = small != large
            same &= small == large or (2 * small[0], *small[1:]) == large
        if not same:
            raise InputError(
                f"layer {layer.name!r} ({layer.type}) needs a fixed batch or mixes its images; labelfree "
                "runs images in batches of any size: make it work from axis 1 on"
            )
    return {**grows, **dict.fromkeys(inputs, True)}


@dataclass(frozen=True)
class _Blob:
    """A blob at the border of a range.

    Attributes:
        name: in the net.
        tensor: in the graph.
        shape: for a batch of 1.
        grows: whether the first axis grows with the batch.
    """

    name: str
    tensor: str
    shape: Shape
    grows: bool

    def shape_of(self, batch: int) -> Shape:
        return (self.shape[0] * batch, *self.shape[1:]) if self.grows else self.shape

    def part(self, array: FloatArray, images: slice) -> FloatArray:
        """The part of the array that belongs to some images of the batch."""
        if not self.grows:
            return array
        return array[self.shape[0] * images.start : self.shape[0] * images.stop]

    def check(self, array: FloatArray, batch: int) -> None:
        wanted = self.shape_of(batch)
        if array.shape != wanted or array.dtype != np.float32 or not array.flags.c_contiguous:
            raise ValueError(
                f"blob {self.name!r} must be C-contiguous float32 of the shape {wanted}; "
                f"got {array.dtype} of the shape {array.shape}"
            )


class _OnnxRange(Range):
    """Layers ``start <= i < stop`` of an ``OnnxEngine``'s net."""

    def __init__(
        self,
        engine: OnnxEngine,
        places: range,
        outputs: Sequence[str],
        moments: Sequence[str],
    ) -> None:
        needed = needed_layers(engine.net.layer[places.start : places.stop], [*outputs, *moments])
        layers = [layer for layer in needed if layer.bottom or not engine.inputs.keys() & set(layer.top)]
        first, last = (layers[0].name, layers[-1].name) if layers else ("", "")
        self._doing = f"running layers {first!r} to {last!r} in onnxruntime"
        translation = Translation(engine, Graph())
        for layer in layers:
            translation.add(layer)
        ends = [translation.blob(name) for name in dict.fromkeys([*outputs, *moments])]
        self._passed = [blob for blob in ends if blob == translation.inputs.get(blob.name)]
        self._computed = [translation.output(blob) for blob in ends if blob not in self._passed]
        self._outputs, self._moments = frozenset(outputs), tuple(dict.fromkeys(moments))
        self._session = None
        used: list[str] = []
        if self._computed:
            model, used, self._constants = translation.graph.model()
            try:
                self._session = open_session(model, self._constants)
            except Exception as error:  # onnxruntime's exceptions have no common base but this
                raise LabelfreeError(f"{self._doing}: {' '.join(str(error).split())}") from error
        self._feeds = [blob for blob in translation.inputs.values() if blob.tensor in used]
        self.inputs = tuple(dict.fromkeys(blob.name for blob in (*self._feeds, *self._passed)))
        self._part = max(1, engine.part_bytes // max(1, _widest(engine, layers)))
        self._threads, self._pool = engine.threads, engine.pool

    def run(
        self, feeds: Mapping[str, FloatArray], into: Mapping[str, FloatArray] | None = None
    ) -> RangeResult:
        """Run on one micro-batch; see ``begin``."""
        return self.begin(feeds, into)()

    def begin(
        self, feeds: Mapping[str, FloatArray], into: Mapping[str, FloatArray] | None = None
    ) -> Callable[[], RangeResult]:
        """Have the engine's threads run one micro-batch; see ``Range``.

        Feeds are read and outputs written where they lie in memory. Moments are taken of each part while it
        is in the cache and merged in float64, so they do not depend on the micro-batch but for the rounding
        of that.

        Raises:
            ValueError: an array has the wrong shape, type or layout.
            LabelfreeError: onnxruntime fails.
        """
        into = into or {}
        batch = self._check(feeds)
        blobs = {}
        for blob in (*self._computed, *self._passed):
            if blob.name in self._outputs:
                array = into.get(blob.name)
                blobs[blob.name] = np.empty(blob.shape_of(batch), np.float32) if array is None else array
                blob.check(blobs[blob.name], batch)
        for blob in self._passed:
            if blob.name in self._outputs:
                np.copyto(blobs[blob.name], feeds[blob.name])
        parts = split(batch, self._part, self._threads)
        running = [self._pool.submit(self._run_part, part, feeds, blobs) for part in parts]

        def finish() -> RangeResult:
            parts = [part.result() for part in running]
            moments = {
                name: reduce(Moments.merged, (part[name] for part in parts if name in part))
                for name in self._moments
            }
            return RangeResult(blobs, moments)

        return finish

    def _check(self, feeds: Mapping[str, FloatArray]) -> int:
        """Check the feeds and return the batch."""
        growing = [blob for blob in (*self._feeds, *self._passed) if blob.grows]
        batch = len(feeds[growing[0].name]) // growing[0].shape[0] if growing else 1
        for blob in (*self._feeds, *self._passed):
            blob.check(feeds[blob.name], batch)
        return batch

    def _run_part(
        self, images: slice, feeds: Mapping[str, FloatArray], blobs: Mapping[str, FloatArray]
    ) -> dict[str, Moments]:
        """Run some images of a micro-batch and return the moments of their blobs."""
        read = {blob: blob.part(feeds[blob.name], images) for blob in self._feeds}
        ends = {blob: blob.part(feeds[blob.name], images) for blob in self._passed}
        for blob in self._computed:
            if blob.name in blobs:
                ends[blob] = blob.part(blobs[blob.name], images)
            else:
                ends[blob] = np.empty(blob.shape_of(images.stop - images.start), np.float32)
        if self._session is not None:
            binding = self._session.io_binding()
            for blob, array in read.items():
                binding.bind_input(blob.tensor, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            for blob in self._computed:
                array = ends[blob]
                binding.bind_output(blob.tensor, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:  # onnxruntime's exceptions have no common base but this
                raise LabelfreeError(f"{self._doing}: {' '.join(str(error).split())}") from error
        return {
            blob.name: moments_of(array)
            for blob, array in ends.items()
            if blob.name in self._moments and (blob.grows or images.start == 0)
        }


def split(batch: int, most: int, threads: int) -> list[slice]:
    """A batch in parts of at most ``most`` images, as even as can be and the same number for every thread."""
    rounds = -(-batch // (most * threads))
    count = min(batch, rounds * threads)
    return [slice(batch * i // count, batch * (i + 1) // count) for i in range(count)]


def _widest(engine: OnnxEngine, layers: Sequence[LayerParameter]) -> int:
    """Bytes per image of the bottoms and tops of the widest layer."""
    shapes, grows = engine.shapes.blobs, engine.per_image
    return max(
        (
            sum(4 * math.prod(shapes[name]) for name in (*layer.bottom, *layer.top) if grows[name])
            for layer in layers
        ),
        default=0,
    )


class Translation:
    """Layers being written into a graph; knows which tensor a blob's name stands for at this place."""

    def __init__(self, engine: OnnxEngine, graph: Graph) -> None:
        self.graph = graph
        self.inputs: dict[str, _Blob] = {}
        self._engine = engine
        self._tensors: dict[str, str] = {}

    def blob(self, name: str) -> _Blob:
        """A blob at this place; one that no layer has written yet is an input."""
        shape, grows = self._engine.shapes.blobs[name], self._engine.per_image[name]
        if name not in self._tensors:
            self._tensors[name] = self.graph.input(shape, grows)
            self.inputs[name] = _Blob(name, self._tensors[name], shape, grows)
        return _Blob(name, self._tensors[name], shape, grows)

    def define(self, name: str, tensor: str) -> None:
        """Have a blob's name stand for a tensor from here on."""
        self._tensors[name] = tensor

    def output(self, blob: _Blob) -> _Blob:
        """Make a blob an output of the graph."""
        return replace(blob, tensor=self.graph.output(blob.tensor))

    def add(self, layer: LayerParameter) -> None:
        """Translate a layer.

        Raises:
            InputError: it cannot be translated.
        """
        translate = TRANSLATORS.get(layer.type)
        where = f"layer {layer.name!r} ({layer.type})"
        if translate is None:
            raise InputError(
                f"{where}: the onnx engine does not know this type; use engine: caffe, or a type that it "
                f"knows: {', '.join(sorted(TRANSLATORS))}"
            )
        shapes = self._engine.shapes
        bottoms = [self.blob(bottom) for bottom in layer.bottom]
        blobs = self._engine.weights[layer.name] if shapes.params[layer.name] else []
        one_image = Layer(
            layer,
            [blob.tensor for blob in bottoms],
            [blob.shape for blob in bottoms],
            [blob.grows for blob in bottoms],
            [shapes.blobs[top] for top in layer.top],
            blobs,
        )
        try:
            tensors = translate(self.graph, one_image)
        except UnsupportedError as error:
            raise InputError(f"{where}: {error}") from None
        tops = [tensors] if isinstance(tensors, str) else tensors
        self._tensors.update(zip(layer.top, tops, strict=True))
