"""The interface of an engine: a network opened for inference, run range by range.

Layers are numbered from 0 in the order of ``net.layer``. ``Engine.compile(start, stop, ...)`` prepares the
layers ``start <= i < stop``; the result maps the blobs that are live before ``start`` to named blobs as they
stand after ``stop - 1``. In-place layers overwrite their blob's name, so "blob at a place" is the value that
the last layer before that place wrote under the name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import (
    BlobId,
    LayerShapes,
    NetParameter,
    Shapes,
    Weights,
    check_weights,
    dependent_layers,
    in_shape,
    infer_shapes,
    loaded,
    sharers,
)
from quantize.numerics.moments import Moments


@dataclass(frozen=True)
class RangeResult:
    """What one run of a range gave: the blobs asked for and the moments asked for, by blob name."""

    blobs: dict[str, FloatArray]
    moments: dict[str, Moments]


class Range(ABC):
    """Layers ``start <= i < stop`` of an opened net, ready to run on any number of images."""

    inputs: tuple[str, ...]
    """Names of the blobs that the range reads from outside."""

    @abstractmethod
    def run(
        self, feeds: Mapping[str, FloatArray], into: Mapping[str, FloatArray] | None = None
    ) -> RangeResult:
        """Run on one micro-batch.

        Args:
            feeds: C-contiguous float32 arrays, batch first, for every name in ``inputs``.
            into: C-contiguous float32 arrays of the right shape into which outputs of these names are
                written without a copy; other outputs get fresh arrays.
        """

    def begin(
        self, feeds: Mapping[str, FloatArray], into: Mapping[str, FloatArray] | None = None
    ) -> Callable[[], RangeResult]:
        """Begin to run as `run` does; the result is what the returned function waits for.

        An engine that can work in the background begins the next micro-batch before one ends, so that its
        threads never wait for what is done between two.
        """
        result = self.run(feeds, into)
        return lambda: result


class Engine(ABC):
    """A network opened for inference (TEST phase).

    Args:
        net: the layers to run: no data layers, no layers that need labels, phase already filtered
            (see ``caffenet.inference_net``).
        weights: their blobs; checked against the shapes the layers imply. Blobs that layers share by name
            (``param``) are one, as in Caffe.
        inputs: shape of each input blob for one image, without the batch axis.
        told: shapes of layers whose types have no shape rule, where the engine knows them.

    Raises:
        InputError: a layer's type or a parameter is not supported, or a blob has the wrong shape.
    """

    def __init__(
        self,
        net: NetParameter,
        weights: Weights,
        inputs: Mapping[str, Shape],
        told: Mapping[str, LayerShapes] | None = None,
    ) -> None:
        self.net = net
        self.inputs = dict(inputs)
        self.shapes: Shapes = infer_shapes(net, {name: (1, *shape) for name, shape in inputs.items()}, told)
        weights = loaded(net, weights)
        check_weights(net, weights, self.shapes)
        self.weights = in_shape(weights, self.shapes).copy()
        self._sharers = sharers(net)
        computed = {top for layer in dependent_layers(net.layer, inputs) for top in layer.top}
        self.per_image = {blob: blob in inputs or blob in computed for blob in self.shapes.blobs}

    def blob_shape(self, name: str, images: int) -> Shape:
        """The shape of a blob for so many images; one that is not computed from them has one shape."""
        first, *rest = self.shapes.blobs[name]
        return (first * images if self.per_image[name] else first, *rest)

    def set_blobs(self, layer: str, blobs: Sequence[FloatArray]) -> None:
        """Replace a layer's blobs for the ranges compiled (onnx) or run (caffe) from now on.

        Layers that share some of them get those, too.
        """
        self.weights.replace(layer, blobs)
        for index, blob in enumerate(blobs):
            for other in self._sharers.get(BlobId(layer, index), ()):
                own = self.weights[other.layer]
                own[other.index] = blob.reshape(own[other.index].shape)
                self.weights.replace(other.layer, own)

    @abstractmethod
    def compile(
        self,
        start: int,
        stop: int,
        outputs: Sequence[str],
        moments: Sequence[str] = (),
    ) -> Range:
        """Prepare the layers ``start <= i < stop``.

        Args:
            outputs: blobs to return as they stand after layer ``stop - 1``.
            moments: blobs whose per-channel moments to return as they stand after layer ``stop - 1``.
        """

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Release what the engine holds (a child process, sessions)."""


OpenEngine = Callable[[NetParameter, Weights, Mapping[str, Shape]], Engine]
"""Opens a net for running: net, weights and shapes of the inputs as for `Engine`."""
