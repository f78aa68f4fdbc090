"""How quantized weights and activations stand in Caffe's files: written and read here alone.

**Weights.** Every kernel w of a quantized layer is alpha * Q. The layer keeps blob 0 = Q and blob 1 = bias;
a Scale layer ``<layer>_alpha_term`` right behind it has blob 0 = alpha and, where there is a bias b, blob 1 =
b * (1 - alpha), so that alpha * (Qx + b) + b * (1 - alpha) = alpha * Qx + b. A layer of several tops has such
a Scale layer behind each. Layers that share their weights by name (``param``) share Q, and their Scale layers
alpha. Which grid the levels of Q are from is not written: it is the smallest that has them all.

**Activations.** A layer of type ActQuantize makes a * clip(floor(x / a + 0.5), lowest, highest) of x.
caffe.proto needs no new field for it: ``relu_param.negative_slope`` is a, and ``threshold_param.threshold``
the highest code (absent or 0: 127) with 0 as the lowest, or -highest where codes have both signs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.caffenet.kernels import from_kernels, outputs, to_kernels
from quantize.caffenet.schema import LayerParameter, NetParameter
from quantize.caffenet.sharing import BlobId, sharers
from quantize.caffenet.traits import Trait, traits_of
from quantize.caffenet.weights import Weights
from quantize.errors import InputError
from quantize.numerics.grids import smallest_grid
from quantize.settings import GridChoice

ALPHA_SUFFIX = "_alpha_term"
QUANTIZER = "ActQuantize"
"""The type of the layers that put values on codes; in old prototxts it is Quant."""
DEFAULT_LEVELS = 127
"""The highest code where a layer does not say it."""


# ---- Weights ----


@dataclass(frozen=True)
class QuantizedWeights:
    """The weights of a layer: kernels alpha * Q.

    Attributes:
        bits: per weight.
        grid: name of the grid that Q is on.
        codes: Q, float32 (n kernels, k weights).
        alpha: float32 (n,).
    """

    bits: int
    grid: str
    codes: FloatArray = field(repr=False)
    alpha: FloatArray = field(repr=False)


def same_weights(net: NetParameter) -> dict[str, list[str]]:
    """By layer of a quantized type all such layers that have its weights as theirs, in network order."""
    orders = {layer.name: kernel_order(layer) for layer in net.layer if Trait.KERNELS in traits_of(layer)}
    shared = sharers(net)
    return {
        name: [
            blob.layer
            for blob in shared.get(BlobId(name, 0), [BlobId(name, 0)])
            if not blob.index and orders.get(blob.layer) == order
        ]
        for name, order in orders.items()
    }


def kernel_order(layer: LayerParameter) -> tuple[int, int]:
    """What makes kernels of a weight blob: their number, and in how many parts they are its columns."""
    if layer.type == "Deconvolution":
        return outputs(layer), layer.convolution_param.group
    return outputs(layer), int(layer.type == "InnerProduct" and layer.inner_product_param.transpose)


def write_quantized(
    weights: Weights,
    layer: LayerParameter,
    users: Sequence[str],
    codes: FloatArray,
    alpha: Floats,
    bias: FloatArray | None = None,
    bias_is_shared: bool = False,
) -> None:
    """Give a layer quantized weights instead of those it has, in place.

    Args:
        weights: the blobs, with those of the layer in full precision.
        layer: the layer.
        users: all layers with its weights (`same_weights`).
        codes: Q, (n, k).
        alpha: (n,).
        bias: what the layer is to add, (n,), if that is not the bias it has.
        bias_is_shared: others have the bias, too, so it must stay; the Scale layers make up for it.
    """
    first, *biases = weights[layer.name]
    if bias is not None and not bias_is_shared:
        biases = [bias.reshape(old.shape) for old in biases]
    shifts = []
    for kept in biases:
        b = kept.reshape(-1)
        shifts.append(b * (1 - alpha) + (0 if bias is None else bias - b))
    of_alpha = [blob.astype(np.float32) for blob in (alpha, *shifts)]
    weights.replace(layer.name, [from_kernels(layer, codes, first.shape), *biases])
    for term in reversed(_alpha_layers(layer, users)):
        weights.insert_after(layer.name, term, of_alpha)


def read_quantized(layer: LayerParameter, weights: Weights, told: GridChoice | None) -> QuantizedWeights:
    """The quantized weights of a layer that has an ``*_alpha_term``.

    Args:
        layer: the layer.
        weights: the blobs of its net.
        told: the grid, where it is known; otherwise it is the smallest that has all levels of Q.

    Raises:
        InputError: Q is on no grid.
    """
    codes = to_kernels(layer, weights[layer.name][0])
    if told is None:
        grid = smallest_grid(codes)
        if grid is None:
            raise InputError(
                f"layer {layer.name!r} ({layer.type}): it has a layer {layer.name + ALPHA_SUFFIX!r} but its "
                "weights are on no grid; the caffemodel has been changed, or is another net's"
            )
        told = GridChoice(bits=grid.bits, grid=grid.name)
    return QuantizedWeights(told.bits, told.grid, codes, alpha_of(weights, layer.name))


def alpha_of(weights: Weights, layer: str) -> FloatArray:
    """The alphas (n,) of a quantized layer."""
    return weights[layer + ALPHA_SUFFIX][0].reshape(-1)


def with_alpha_terms(net: NetParameter, weights: Container[str]) -> NetParameter:
    """The net with the Scale layers for which ``weights`` has an ``*_alpha_term`` layer, copied otherwise.

    Args:
        net: with all its phases.
        weights: the blobs, or no more than the names of their layers.
    """
    changed = NetParameter()
    changed.CopyFrom(net)
    del changed.layer[:]
    missing = {layer: list(terms) for layer, terms in _missing_terms(net, weights)}
    for number, layer in enumerate(net.layer):
        changed.layer.append(layer)
        changed.layer.extend(missing.get(number, ()))
    return changed


def check_alpha_terms(net: NetParameter, weights: Container[str]) -> None:
    """Check that a net has the Scale layers that belong to quantized weights.

    Without them it computes Qx instead of alpha * Qx, and nothing else tells.

    Raises:
        InputError: a layer is missing.
    """
    for number, terms in _missing_terms(net, weights):
        if terms:
            raise InputError(
                f"layer {net.layer[number].name!r}: the caffemodel has quantized weights for it but the net "
                f"has no layer {terms[0].name!r}, which scales what it makes; give the prototxt that was "
                "written with the caffemodel"
            )


def _missing_terms(net: NetParameter, weights: Container[str]) -> Iterator[tuple[int, list[LayerParameter]]]:
    """By number of a layer the Scale layers behind it that ``weights`` has and the net lacks."""
    users = same_weights(net)
    present = {layer.name for layer in net.layer}
    for number, layer in enumerate(net.layer):
        if Trait.KERNELS in traits_of(layer):
            terms = _alpha_layers(layer, users[layer.name])
            yield number, [term for term in terms if term.name in weights and term.name not in present]


def alpha_terms(net: NetParameter) -> dict[str, list[str]]:
    """The quantized layers of a net, and the Scale layers that carry their alphas."""
    present = {layer.name for layer in net.layer}
    users = same_weights(net)
    carriers = {}
    for layer in net.layer:
        if Trait.KERNELS in traits_of(layer) and layer.name + ALPHA_SUFFIX in present:
            terms = _alpha_layers(layer, users[layer.name])
            carriers[layer.name] = [term.name for term in terms if term.name in present]
    return carriers


def correctable(net: NetParameter) -> dict[str, str]:
    """The layers whose bias can be corrected, and the Scale layers that carry their alphas.

    Left out are layers without a bias, with several tops, or with a blob that others share, and outputs
    whose channels are not their second axis.

    Args:
        net: the inference net with its ``*_alpha_term`` layers.
    """
    layers = {layer.name: layer for layer in net.layer}
    shared = {blob.layer for blob in sharers(net)}
    terms = {}
    for name, (term, *more) in alpha_terms(net).items():
        scale = layers[term].scale_param
        if not more and scale.bias_term and scale.axis == 1 and not shared.intersection((name, term)):
            terms[name] = term
    return terms


def _alpha_layers(layer: LayerParameter, users: Sequence[str]) -> list[LayerParameter]:
    """The Scale layers behind the tops of a layer: one alpha and one shift for all.

    Args:
        users: all layers with its weights; the alpha is one for them, too.
    """
    name = layer.name + ALPHA_SUFFIX
    is_product = layer.type == "InnerProduct"
    parameters = layer.inner_product_param if is_product else layer.convolution_param
    scales = []
    for number, top in enumerate(layer.top, 1):
        alpha = LayerParameter(name=name if number == 1 else f"{name}_{number}", type="Scale")
        alpha.bottom.append(top)
        alpha.top.append(top)
        if len(users) > 1 or len(layer.top) > 1:
            alpha.param.add(name=users[0] + ALPHA_SUFFIX)
        if len(layer.top) > 1 and parameters.bias_term:
            alpha.param.add(name=f"{name}_bias")
        if parameters.axis != 1:
            alpha.scale_param.axis = parameters.axis
        alpha.scale_param.bias_term = parameters.bias_term
        alpha.include.extend(layer.include)
        alpha.exclude.extend(layer.exclude)
        scales.append(alpha)
    return scales


# ---- Activations ----


@dataclass(frozen=True)
class Quantizer:
    """What an ActQuantize layer does: a * clip(floor(x / a + 0.5), lowest, highest).

    Attributes:
        step: the quantization step a.
        lowest: the lowest code.
        highest: the highest code.
    """

    step: float
    lowest: int
    highest: int


def read_quantizer(layer: LayerParameter) -> Quantizer | None:
    """The quantizer that a layer is; None where its type is another."""
    if Trait.CODES not in traits_of(layer):
        return None
    threshold = int(layer.threshold_param.threshold)
    highest = abs(threshold) or DEFAULT_LEVELS
    return Quantizer(layer.relu_param.negative_slope, -highest if threshold < 0 else 0, highest)


def become_quantizer(layer: LayerParameter, quantizer: Quantizer) -> None:
    """Make a layer an ActQuantize layer, in place; its name, bottom and top stay.

    Args:
        layer: a ReLU, or a layer without a type.
        quantizer: whose lowest code is 0 or -highest.
    """
    layer.type = QUANTIZER
    layer.relu_param.negative_slope = quantizer.step
    if quantizer.lowest < 0:
        layer.threshold_param.threshold = -quantizer.highest
    elif quantizer.highest != DEFAULT_LEVELS:
        layer.threshold_param.threshold = quantizer.highest
