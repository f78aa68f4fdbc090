"""The layers of forks as plain numpy in float64, and cases of them, as `layer_formulas` has Caffe's.

Written from what the forks' documentation and layer headers say they compute, value by value.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from quantize.caffenet import LayerParameter
from tests.caffe.test_parity import Case, block
from tests.engines.layer_formulas import Array, elementwise, formula


def normalized(x: Array, scale: Array, shift: Array, mean: Array, variance: Array, eps: float) -> Array:
    found = np.empty_like(x)
    for c in range(x.shape[1]):
        found[:, c] = scale[c] * (x[:, c] - mean[c]) / math.sqrt(variance[c] + eps) + shift[c]
    return found


@formula("BN")
def bn(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    (x,), flat = bottoms, [blob.ravel() for blob in blobs]
    if len(flat) == 2:
        return [np.stack([flat[0][c] * x[:, c] + flat[1][c] for c in range(x.shape[1])], axis=1)]
    return [normalized(x, *flat, layer.bn_param.eps)]


@formula("CuDNNBatchNorm")
def cudnn_batch_norm(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    own = layer.HasField("cudnn_batch_norm_param")
    eps = layer.cudnn_batch_norm_param.eps if own else layer.batch_norm_param.eps
    return [normalized(bottoms[0], *(blob.ravel() for blob in blobs), eps)]


@formula("Normalize")
def normalize(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    (x,), param, scale = bottoms, layer.norm_param, blobs[0].ravel()
    found = np.empty_like(x)
    for n, c in np.ndindex(x.shape[:2]):
        total = (x[n] ** 2).sum() if param.across_spatial else (x[n] ** 2).sum(axis=0)
        found[n, c] = scale[c if len(scale) > 1 else 0] * x[n, c] / np.sqrt(total + param.eps)
    return [found]


@formula("Axpy")
def axpy(_layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    a, x, y = bottoms
    found = y.copy()
    for n, c in np.ndindex(x.shape[:2]):
        found[n, c] += a[n, c].item() * x[n, c]
    return [found]


elementwise("ReLU6", lambda _, x: np.minimum(np.maximum(x, 0), 6))
elementwise("HardSwish", lambda _, x: x * np.clip(x + 3, 0, 6) / 6)
elementwise("Mish", lambda _, x: x * np.tanh(np.log1p(np.exp(x))))


@formula("HardSigmoid")
def hard_sigmoid(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p = layer.hardsigmoid_param if layer.HasField("hardsigmoid_param") else layer.hard_sigmoid_param
    return [np.clip(p.alpha * bottoms[0] + p.beta, 0, 1)]


@formula("Permute")
def permute(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    (x,), order = bottoms, list(layer.permute_param.order)
    order += [axis for axis in range(x.ndim) if axis not in order]
    found = np.empty([x.shape[axis] for axis in order])
    for place in np.ndindex(*found.shape):
        source = [0] * x.ndim
        for axis, index in zip(order, place, strict=True):
            source[axis] = index
        found[place] = x[tuple(source)]
    return [found]


@formula("ShuffleChannel")
def shuffle_channel(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    (x,), rows = bottoms, layer.shuffle_channel_param.group
    columns = x.shape[1] // rows
    found = np.empty_like(x)
    for i, j in product(range(rows), range(columns)):
        found[:, j * rows + i] = x[:, i * columns + j]
    return [found]


@formula("Reorg")
def reorg(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    """Darknet's index arithmetic: place k, j, i of the one is place `other` of the other."""
    (x,), s = bottoms, layer.reorg_param.stride
    n, c, h, w = x.shape
    found = np.empty((n, x[0].size))
    flat = x.reshape(n, -1)
    for k, j, i in np.ndindex(c, h, w):
        inner, offset = k % (c // s**2), k // (c // s**2)
        place = i + w * (j + h * k)
        other = i * s + offset % s + w * s * (j * s + offset // s + h * s * inner)
        if layer.reorg_param.reverse:
            found[:, other] = flat[:, place]
        else:
            found[:, place] = flat[:, other]
    shape = (c // s**2, h * s, w * s) if layer.reorg_param.reverse else (c * s**2, h // s, w // s)
    return [found.reshape(n, *shape)]


@formula("Upsample")
def upsample(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    x, s = bottoms[0], layer.upsample_param.scale
    n, c, h, w = x.shape
    found = np.empty((n, c, h * s, w * s))
    for row, column in np.ndindex(h * s, w * s):
        found[:, :, row, column] = x[:, :, row // s, column // s]
    return [found]


@formula("Interp")
def interp(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p = layer.interp_param
    x = bottoms[0]
    x = x[:, :, -p.pad_beg : x.shape[2] + p.pad_end, -p.pad_beg : x.shape[3] + p.pad_end]
    sizes = []
    for size, given in zip(x.shape[2:], (p.height, p.width), strict=True):
        if p.HasField("shrink_factor") or p.HasField("zoom_factor"):
            size = (size - 1) // p.shrink_factor + 1
            size = size + (size - 1) * (p.zoom_factor - 1)
        else:
            size = given
        sizes.append(size)
    found = np.empty((*x.shape[:2], *sizes))
    for row, column in np.ndindex(*sizes):
        value = 0.0
        for i, u in weights_at(row, sizes[0], x.shape[2]):
            for j, v in weights_at(column, sizes[1], x.shape[3]):
                value = value + u * v * x[:, :, i, j]
        found[:, :, row, column] = value
    return [found]


def weights_at(place: int, count: int, size: int) -> list[tuple[int, float]]:
    """The pixels of one axis that a place between them is made of, and their shares."""
    at = place * (size - 1) / (count - 1) if count > 1 else 0.0
    low = min(int(at), size - 1)
    return [(low, 1 - (at - low)), (min(low + 1, size - 1), at - low)]


def cases() -> Iterator[Case]:
    yield from (
        Case(kind, bottoms=shapes) for kind in ("BN", "CuDNNBatchNorm") for shapes in (((4, 6, 5),), ((4,),))
    )
    yield Case("BN", "bn_param { bn_mode: INFERENCE }")
    yield Case("BN", "bn_param { eps: 0.01 momentum: 0.9 frozen: true slope_filler { value: 1 } }")
    yield Case("CuDNNBatchNorm", "batch_norm_param { eps: 0.02 }")
    yield Case("CuDNNBatchNorm", "cudnn_batch_norm_param { eps: 0.03 }", ((4, 7),))
    for fields in ("scale_bias: true", "scale_filler { value: 1 }", "bias_filler { value: 0 } eps: 0.01"):
        yield Case("BatchNorm", f"batch_norm_param {{ {fields} }}")
    yield Case("BatchNorm", "batch_norm_param { scale_bias: true eps: 1e-9 }", ((4,),), draw="large")
    for across, shared, eps in product((True, False), (True, False), (1e-10, 0.5)):
        yield Case("Normalize", block("norm_param", across_spatial=across, channel_shared=shared, eps=eps))
    yield Case("Normalize", "norm_param { across_spatial: false }", ((4, 7),))
    for one in ((4,), (4, 1, 1)):
        yield Case("Axpy", "", (one, (4, 6, 5), (4, 6, 5)))
    yield Case("Axpy", "", ((4,), (4,), (4,)))
    yield Case("ReLU6", draw="wide")
    yield Case("HardSwish", draw="wide")
    yield Case("Mish", draw="wide")
    yield Case("HardSigmoid", draw="wide")
    yield Case("HardSigmoid", "hard_sigmoid_param { alpha: 0.3 beta: 0.4 }", draw="wide")
    yield Case("HardSigmoid", "hardsigmoid_param { alpha: 0.17 }", draw="wide")
    for order in ([0, 2, 3, 1], [0, 3], [0], [0, 2, 1, 3], []):
        yield Case("Permute", block("permute_param", order=order))
    yield Case("Permute", "permute_param { order: 0 order: 2 }", ((3, 4),))
    for group, shapes in product((1, 2, 3), (((6, 4, 5),), ((6,),), ((6, 7),))):
        yield Case("ShuffleChannel", block("shuffle_channel_param", group=group), shapes)
    for stride, reverse in product((1, 2, 3), (True, False)):
        yield Case("Reorg", block("reorg_param", stride=stride, reverse=reverse), ((36, 6, 12),))
    for scale in (1, 2, 3):
        yield Case("Upsample", block("upsample_param", scale=scale), ((2, 3, 4),))
    sizes = [{"height": 9, "width": 7}, {"height": 1, "width": 3}, {"height": 4, "width": 6}]
    factors = [{"zoom_factor": 2}, {"shrink_factor": 2}, {"zoom_factor": 3, "shrink_factor": 2}]
    for how, pad in product((*sizes, *factors), ((0, 0), (-1, 0), (-1, -2))):
        yield Case("Interp", block("interp_param", pad_beg=pad[0], pad_end=pad[1], **how), ((2, 7, 9),))
    yield Case("Interp", "interp_param { height: 5 width: 5 }", ((3, 1, 1),))
    yield Case("Interp", "interp_param { height: 9 width: 9 shrink_factor: 3 }", ((2, 7, 9),))


CASES = list(cases())
