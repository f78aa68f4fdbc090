"""A graph in onnxruntime's own layout of images, where the processor has kernels for it.

onnxruntime's fast convolutions work on blocks of 8 or 16 channels: at one pixel, the values of one block lie
together (it calls this NCHWc). Left alone, it reorders what enters and leaves a graph, and BatchNorm, sum and
ReLU at the start of a graph are passes over the memory of their own. `BlockedGraph` writes the operators on
blocks down itself. So blobs between two graphs can stay in blocks, and what follows a convolution is fused
into it, at the start of a graph into a single pass.

The shape of a tensor in blocks is written as (N, C, H, W) as well; only the order in memory is another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Shape
from quantize.engines.onnx.graph import Graph, open_session

DOMAIN = "com.microsoft.nchwc"
"""Of onnxruntime's operators on blocks."""
# fmt: off
ELEMENTWISE = frozenset([
    "Abs", "Add", "Clip", "Div", "Elu", "Exp", "Floor", "Identity", "LeakyRelu", "Log", "Max", "Mul", "Pow",
    "Relu", "Sigmoid", "Softplus", "Sub", "Tanh",
])
# fmt: on
"""Operators to which it is all the same in which order the values lie."""
LONGEST_AVERAGE = 256
"""Over how many float32 an average may be taken in float32; it is not spread over the lanes of a register."""
LARGEST_BLOCK = 64
"""No processor has larger ones."""
POOLS = frozenset(["AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"])


class BlockedGraph(Graph):
    """A graph whose tensors are in blocks wherever that serves.

    Args:
        block: channels in a block (``block_size``).
    """

    opsets = (*Graph.opsets, (DOMAIN, 1))

    def __init__(self, block: int) -> None:
        super().__init__()
        self._block = block
        self._channels: dict[str, int] = {}
        """Of the tensors in blocks."""
        self._reordered: dict[str, str] = {}
        """Of a tensor, the same in the other layout."""
        self._convolutions: dict[str, _Convolution] = {}
        """What computes a tensor, if more can be fused into it."""

    def input(self, shape: Shape, grows: bool, own_layout: bool = False) -> str:
        """See ``Graph``."""
        name = super().input(shape, grows)
        if own_layout and self._fits(shape):
            self._channels[name] = shape[1]
        return name

    def output(self, x: str, own_layout: Shape | None = None) -> str:
        """See ``Graph``."""
        if own_layout is not None and self._fits(own_layout):
            return super().output(self._blocked(x, own_layout[1]))
        return super().output(self._plain(x))

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """See ``Graph``."""
        y = self._on_blocks(kind, inputs, attributes) if count == 1 else None
        return [y] if y else super().ops(kind, count, *(self._plain(x) for x in inputs), **attributes)

    def affine(self, x: str, shape: Shape, scale: npt.ArrayLike, shift: npt.ArrayLike) -> str:
        """See ``Graph``."""
        if x not in self._channels:
            return super().affine(x, shape, scale, shift)
        before = self._convolutions.get(x)
        if before is None or before.term:
            kernels = np.ones((shape[1], 1, 1, 1), np.float32)
            window = {"kernel_shape": (1, 1), "group": shape[1]}
            before = _Convolution(x, kernels, np.ones(shape[1]), np.zeros(shape[1]), window)
        return self._convolve(before.scaled(np.asarray(scale, np.float64), np.asarray(shift, np.float64)))

    def moments(self, x: str, shape: Shape) -> list[tuple[str, Shape]]:
        """See ``Graph``. The value near the mean is one for all images that are run together."""
        if x not in self._channels:
            return super().moments(x, shape)
        _, channels, height, width = shape
        means = self.op("GlobalAveragePool", x)
        near = self.op("ReduceMean", means, self.integers([0]))
        unit = self.floats(np.ones((channels, 1, 1, 1)))
        away = self.reshape(self.op("Neg", near), (channels,))
        one = {"kernel_shape": (1, 1), "group": channels}
        rest = self._in_blocks("Conv", channels, x, unit, away, domain=DOMAIN, **one)
        rows = max(
            r for r in range(1, height + 1) if height % r == 0 and (r == 1 or r * width <= LONGEST_AVERAGE)
        )
        window = {"kernel_shape": (rows, width), "strides": (rows, width)}
        parts = (channels // self._block, height // rows, self._block)
        averages = [self.op("AveragePool", y, **window) for y in (rest, self.op("Mul", rest, rest))]
        of_each = self.reshape(self.op("Expand", near, self.op("Shape", means)), (-1, channels, 1))
        return [(of_each, (channels, 1)), *((self._as_it_lies(y, parts), parts) for y in averages)]

    def _as_it_lies(self, x: str, dims: Shape) -> str:
        """A tensor in blocks in another shape, its values in the order in which they lie."""
        return super().ops("Reshape", 1, x, self.integers((-1, *dims)))[0]

    def shared(self, x: str) -> None:
        """See ``Graph``."""
        self._convolutions.pop(x, None)

    def _fits(self, shape: Shape) -> bool:
        return len(shape) == 4 and shape[1] % self._block == 0

    def _plain(self, x: str) -> str:
        if x not in self._channels:
            return x
        if x not in self._reordered:
            channels = self._channels[x]
            (self._reordered[x],) = super().ops("ReorderOutput", 1, x, channels=channels, domain=DOMAIN)
        return self._reordered[x]

    def _blocked(self, x: str, channels: int) -> str:
        if x in self._channels:
            return x
        if x not in self._reordered:
            self._reordered[x] = self._in_blocks("ReorderInput", channels, x, domain=DOMAIN)
        return self._reordered[x]

    def _in_blocks(self, kind: str, channels: int, *inputs: str, **attributes: Any) -> str:
        (y,) = super().ops(kind, 1, *inputs, **attributes)
        self._channels[y] = channels
        return y

    def _on_blocks(self, kind: str, inputs: tuple[str, ...], attributes: dict[str, Any]) -> str | None:
        """The operator on tensors in blocks, if it can be; else None."""
        if kind == "Conv":
            return self._convolution(inputs, attributes)
        if kind in POOLS and inputs[0] in self._channels:
            return self._in_blocks(kind, self._channels[inputs[0]], inputs[0], domain=DOMAIN, **attributes)
        blocked = [x for x in inputs if x in self._channels]
        if not blocked:
            return None
        if kind == "Concat" and attributes["axis"] == 1 and len(blocked) == len(inputs):
            return self._in_blocks(kind, sum(self._channels[x] for x in inputs), *inputs, axis=1)
        if kind not in ELEMENTWISE or not all(x in blocked or self._is_one_number(x) for x in inputs):
            return None
        return self._fused(kind, inputs) or self._in_blocks(
            kind, self._channels[blocked[0]], *inputs, **attributes
        )

    def _is_one_number(self, x: str) -> bool:
        return x in self._constants and self._constants[x].size == 1

    def _fused(self, kind: str, inputs: tuple[str, ...]) -> str | None:
        """ReLU and sums of two, done by the convolution before."""
        if kind == "Relu" and inputs[0] in self._convolutions:
            return self._convolve(replace(self._convolutions[inputs[0]], relu=True))
        if kind == "Add" and all(x in self._channels for x in inputs):
            for x, other in (inputs, inputs[::-1]):
                if x in self._convolutions and not self._convolutions[x].term and x != other:
                    return self._convolve(replace(self._convolutions[x], term=other))
        return None

    def _convolution(self, inputs: tuple[str, ...], attributes: dict[str, Any]) -> str | None:
        x, *parameters = inputs
        kernels, *bias = (self._constants[name] for name in parameters)
        if kernels.ndim != 4:
            return None
        count, channels = kernels.shape[:2]
        groups = attributes["group"]
        few = groups == 1 and channels < self._block
        depthwise = groups == count and channels == 1
        if count % self._block or not (few or depthwise or self._is_whole(channels, count // groups)):
            return None
        x = self._plain(x) if few else self._blocked(x, groups * channels)
        shift = bias[0].astype(np.float64) if bias else np.zeros(count)
        return self._convolve(_Convolution(x, kernels, np.ones(count), shift, attributes))

    def _is_whole(self, *channels: int) -> bool:
        return all(count % self._block == 0 for count in channels)

    def _convolve(self, found: _Convolution) -> str:
        parameters = [self.later(lambda: found.filters(self._block)), self.floats(found.shift)]
        if found.term:
            parameters.append(found.term)
        attributes = {**found.window, "activation": "Relu"} if found.relu else found.window
        y = self._in_blocks("Conv", len(found.kernels), found.x, *parameters, domain=DOMAIN, **attributes)
        if not found.relu:
            self._convolutions[y] = found
        return y


@dataclass(frozen=True)
class _Convolution:
    """max(0, (kernels * x) * scale + shift + term), where ``relu`` and ``term`` say so.

    Attributes:
        x: in blocks; as it is if it has fewer channels than a block.
        kernels: (count, channels / group, h, w).
        scale, shift: float64, (count,).
        window: the attributes of the operator.
    """

    x: str
    kernels: FloatArray
    scale: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]
    window: dict[str, Any]
    term: str = ""
    relu: bool = False

    def scaled(self, scale: npt.NDArray[np.float64], shift: npt.NDArray[np.float64]) -> _Convolution:
        return replace(self, scale=self.scale * scale, shift=self.shift * scale + shift)

    def filters(self, block: int) -> FloatArray:
        """The kernels times their scale, in the order that onnxruntime's operator wants.

        By blocks of outputs, blocks of inputs (single ones if they are fewer), pixels, inputs and outputs.
        """
        count, channels, *size = self.kernels.shape
        inputs = block if channels % block == 0 else 1
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = self.kernels * self.scale.astype(np.float32)[:, None, None, None]
        blocks = scaled.reshape(count // block, block, channels // inputs, inputs, *size)
        return np.ascontiguousarray(blocks.transpose(0, 2, 4, 5, 3, 1)).reshape(self.kernels.shape)


@cache
def block_size() -> int:
    """Channels in a block on this processor; 0 if it has none, or onnxruntime does other than we think.

    How a tensor is reordered shows the size. A small net of all kinds of convolutions, run with and without
    blocks, shows whether the operators do what `BlockedGraph` takes them to do.
    """
    try:
        block = _reordered_by()
        if block < 2:
            return 0
        image = np.random.default_rng(0).normal(size=(2, 3, 6, 5)).astype(np.float32)
        blocked, plain = (_run(_trial(graph, block), image) for graph in (BlockedGraph(block), Graph()))
    except Exception:  # onnxruntime's exceptions have no common base but this
        return 0
    return block if np.allclose(blocked, plain, rtol=1e-4, atol=1e-4) else 0


def _reordered_by() -> int:
    """The place to which the second pixel of the first channel goes."""
    shape = (1, LARGEST_BLOCK, 1, 2)
    graph = BlockedGraph(LARGEST_BLOCK)
    graph.output(graph.input(shape, False), own_layout=shape)
    values = np.arange(2 * LARGEST_BLOCK, dtype=np.float32).reshape(shape)
    return int(np.flatnonzero(_run(graph, values) == values[0, 0, 0, 1])[0])


def _trial(graph: Graph, block: int) -> Graph:
    rng = np.random.default_rng(1)
    shape = (1, 2 * block, 6, 5)

    def convolved(x: str, *kernels: int, group: int = 1) -> str:
        weights = graph.floats(rng.normal(0, 0.3, kernels)), graph.floats(rng.normal(size=kernels[0]))
        pads = [size // 2 for size in kernels[2:]] * 2
        return graph.op("Conv", x, *weights, kernel_shape=kernels[2:], pads=pads, group=group)

    def relu(x: str) -> str:
        scale, shift = rng.normal(size=(2, shape[1]))
        return graph.op("Relu", graph.affine(x, shape, scale, shift))

    first = relu(convolved(graph.input((1, 3, 6, 5), True), 2 * block, 3, 3, 3))
    grouped = convolved(first, 2 * block, block, 3, 1, group=2)
    depthwise = relu(convolved(grouped, 2 * block, 1, 1, 3, group=2 * block))
    total = graph.op("Relu", graph.op("Add", convolved(depthwise, 2 * block, 2 * block, 3, 3), first))
    pooled = graph.op("MaxPool", relu(total), kernel_shape=(2, 2), strides=(2, 2), pads=(0, 0, 0, 1))
    graph.output(graph.op("AveragePool", pooled, kernel_shape=(3, 1), count_include_pad=1, pads=(1, 0, 1, 0)))
    return graph


def _run(graph: Graph, x: FloatArray) -> FloatArray:
    model, (name,), constants = graph.model()
    (y,) = open_session(model, constants).run(None, {name: x})
    return np.asarray(y)
