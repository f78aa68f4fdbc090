"""Runs a net in ONNX Runtime: each range of layers becomes a graph of its own.

``layers`` has one translator per layer type, ``graph`` writes the graph down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    Shapes,
    Weights,
    check_weights,
    infer_shapes,
    needed_layers,
)
from quantize.engines.base import Engine, Range, RangeResult
from quantize.engines.onnx.blocked import BlockedGraph, block_size
from quantize.engines.onnx.graph import Graph, open_session
from quantize.engines.onnx.layers import TRANSLATORS, Layer, UnsupportedError
from quantize.errors import InputError, LabelfreeError
from quantize.host import available_threads, pool
from quantize.numerics.moments import Moments

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
    ) -> None:
        super().__init__(net, weights, inputs)
        check_weights(net, self.weights, self.shapes)
        self.threads = threads or available_threads()
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
        own_layout: bool = False,
    ) -> Range:
        """Prepare the layers ``start <= i < stop``; see ``Engine``.

        Raises:
            InputError: a layer that the outputs or moments need cannot be translated.
            LabelfreeError: onnxruntime refuses the graph.
        """
        return _OnnxRange(self, range(start, stop), outputs, moments, own_layout)

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
        own_layout: bool,
    ) -> None:
        needed = needed_layers(engine.net.layer[places.start : places.stop], [*outputs, *moments])
        layers = [layer for layer in needed if layer.bottom or not engine.inputs.keys() & set(layer.top)]
        first, last = (layers[0].name, layers[-1].name) if layers else ("", "")
        self._doing = f"running layers {first!r} to {last!r} in onnxruntime"
        graph = BlockedGraph(block_size()) if block_size() else Graph()
        translation = Translation(engine, graph, own_layout)
        translation.add(layers, [*outputs, *moments])
        at_end = {name: translation.blob(name) for name in dict.fromkeys([*outputs, *moments])}
        ends = [at_end[name] for name in dict.fromkeys(outputs)]
        self._passed = [blob for blob in ends if blob == translation.inputs.get(blob.name)]
        self._outputs = [
            replace(blob, tensor=graph.output(blob.tensor, blob.shape if own_layout else None))
            for blob in ends
            if blob not in self._passed
        ]
        self._moments = {name: _ImageMoments.of(graph, at_end[name]) for name in moments}
        self._session = None
        used: list[str] = []
        if self._outputs or self._moments:
            model, used, self._constants = graph.model()
            try:
                self._session = open_session(model, self._constants)
            except Exception as error:  # onnxruntime's exceptions have no common base but this
                raise LabelfreeError(f"{self._doing}: {' '.join(str(error).split())}") from error
        self._feeds = [blob for blob in translation.inputs.values() if blob.tensor in used]
        self.inputs = tuple(dict.fromkeys(blob.name for blob in (*self._feeds, *self._passed)))
        self._part = max(1, CACHE_BYTES // max(1, _widest(engine, layers)))
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

        Feeds are read and outputs written where they lie in memory. The moments are taken per image and
        channel in the graph, around the mean of those values, and merged in float64, so they do not depend on
        the micro-batch but for the rounding of that.

        Raises:
            ValueError: an array has the wrong shape, type or layout.
            LabelfreeError: onnxruntime fails.
        """
        into = into or {}
        batch = self._check(feeds)
        blobs = {}
        for blob in (*self._outputs, *self._passed):
            array = into.get(blob.name)
            blobs[blob.name] = np.empty(blob.shape_of(batch), np.float32) if array is None else array
            blob.check(blobs[blob.name], batch)
        for blob in self._passed:
            np.copyto(blobs[blob.name], feeds[blob.name])
        taken = {name: found.arrays(batch) for name, found in self._moments.items()}
        reads = [(blob, feeds[blob.name]) for blob in self._feeds]
        writes = [(blob, blobs[blob.name]) for blob in self._outputs]
        for name, found in self._moments.items():
            writes += zip(found.blobs, taken[name], strict=True)
        parts = split(batch, self._part, self._threads)
        running = [self._pool.submit(self._run_part, part, reads, writes) for part in parts]

        def finish() -> RangeResult:
            for part in running:
                part.result()
            moments = {name: found.merged(taken[name]) for name, found in self._moments.items()}
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
        self,
        images: slice,
        reads: Sequence[tuple[_Blob, FloatArray]],
        writes: Sequence[tuple[_Blob, FloatArray]],
    ) -> None:
        if self._session is None:
            return
        binding = self._session.io_binding()
        for blob, array in reads:
            part = blob.part(array, images)
            binding.bind_input(blob.tensor, "cpu", 0, np.float32, part.shape, part.ctypes.data)
        for blob, array in writes:
            part = blob.part(array, images)
            binding.bind_output(blob.tensor, "cpu", 0, np.float32, part.shape, part.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise LabelfreeError(f"{self._doing}: {' '.join(str(error).split())}") from error


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

    def __init__(self, engine: OnnxEngine, graph: Graph, own_layout: bool = False) -> None:
        self.graph = graph
        self._own_layout = own_layout
        self.inputs: dict[str, _Blob] = {}
        self._engine = engine
        self._tensors: dict[str, str] = {}

    def blob(self, name: str) -> _Blob:
        """A blob at this place; one that no layer has written yet is an input."""
        shape, grows = self._engine.shapes.blobs[name], self._engine.per_image[name]
        if name not in self._tensors:
            own_layout = self._own_layout and name not in self._engine.inputs
            self._tensors[name] = self.graph.input(shape, grows, own_layout)
            self.inputs[name] = _Blob(name, self._tensors[name], shape, grows)
        return _Blob(name, self._tensors[name], shape, grows)

    def add(self, layers: Sequence[LayerParameter], wanted: Sequence[str]) -> None:
        """Translate layers, for the blobs ``wanted``.

        Raises:
            InputError: one of them cannot be translated.
        """
        shared = _shared(layers, wanted)
        for place, layer in enumerate(layers):
            self._add(layer)
            for top in layer.top:
                if (place, top) in shared:
                    self.graph.shared(self._tensors[top])

    def _add(self, layer: LayerParameter) -> None:
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


def _shared(layers: Sequence[LayerParameter], wanted: Sequence[str]) -> set[tuple[int, str]]:
    """The place and the name of every top that is read more than once; being wanted is being read."""
    written: dict[str, int] = {}
    reads: Counter[tuple[int, str]] = Counter()
    for place, layer in enumerate(layers):
        reads.update((written[bottom], bottom) for bottom in layer.bottom if bottom in written)
        written.update(dict.fromkeys(layer.top, place))
    reads.update((written[name], name) for name in wanted if name in written)
    return {top for top, count in reads.items() if count > 1}


@dataclass(frozen=True)
class _ImageMoments:
    """Outputs of a graph that make the moments of a blob; see ``Graph.moments``.

    Attributes:
        blobs: the outputs.
        values: values per image and channel.
    """

    blobs: tuple[_Blob, ...]
    values: int

    @classmethod
    def of(cls, graph: Graph, blob: _Blob) -> _ImageMoments:
        """Have a graph compute them for a blob.

        Not in numpy: the graph does it with all threads while the blob is in the cache.
        """
        outputs = [
            _Blob(blob.name, graph.output(tensor), (blob.shape[0], *dims), blob.grows)
            for tensor, dims in graph.moments(blob.tensor, blob.shape)
        ]
        return cls(tuple(outputs), math.prod(blob.shape[2:]))

    def arrays(self, batch: int) -> list[FloatArray]:
        """Room for the blobs."""
        return [np.empty(blob.shape_of(batch), np.float32) for blob in self.blobs]

    def merged(self, arrays: Sequence[FloatArray]) -> Moments:
        """The moments over all images (``Moments.merged``, of all at once)."""
        near, rest, squares = (a.mean(axis=2, dtype=np.float64).reshape(len(a), -1) for a in arrays)
        means = near + rest
        mean = means.mean(axis=0)
        m2 = np.maximum(squares - rest * rest, 0) + np.square(means - mean)
        return Moments(len(means) * self.values, mean, self.values * m2.sum(axis=0))
