"""Stage 1: a full-precision net becomes a net with quantized weights and ``*_alpha_term`` Scale layers.

Every kernel w of a quantized layer is replaced by alpha * Q, with Q on a grid of few levels (He & Cheng 2018,
section 3.1). The layer keeps blob 0 = Q and blob 1 = bias; the new Scale layer right behind it has blob 0 =
alpha and, where there is a bias b, blob 1 = b * (1 - alpha), so that alpha * (Qx + b) + b * (1 - alpha) =
alpha * Qx + b. A layer of several tops gets a Scale layer behind each. Layers that share their weights by
name (``param``) share Q, and their Scale layers alpha.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray
from quantize.caffenet import (
    BlobId,
    LayerParameter,
    NetParameter,
    Weights,
    all_finite,
    foreign_field_text,
    foreign_fields,
    sharers,
)
from quantize.caffenet.kernels import are_kernels, from_kernels, outputs, to_kernels
from quantize.caffenet.shapes import no_weights
from quantize.errors import InputError
from quantize.numerics.decibels import decibels
from quantize.numerics.grids import make_grid
from quantize.numerics.solvers import Fit, Solver, fit
from quantize.progress import SILENT, Progress
from quantize.record import QuantizedLayer
from quantize.settings import GridChoice, LayerChoice, WeightSettings
from quantize.stages.data_aware import Calibration, DataAwareFit, data_aware

QUANTIZED_TYPES = (
    *("Convolution", "ConvolutionDepthwise", "DepthwiseConvolution", "Deconvolution"),
    "InnerProduct",
)
ALPHA_SUFFIX = "_alpha_term"


def choices(net: NetParameter, settings: WeightSettings) -> dict[str, GridChoice]:
    """The grid of every layer to quantize, in network order.

    The first and the last layer of a quantized type get ``settings.first_last``, a layer named in
    ``settings.layers`` its override, all others the general setting. Layers with the same weights count as
    one, under the name of the first: they have what any of them has.

    Args:
        net: the inference net.

    Raises:
        InputError: an override names a layer that is not there or has no weights to quantize, layers with the
            same weights have different overrides, or a layer to quantize has a field of a fork, which may
            compute something else of its weights.
    """
    names, left_out = _names(net), unquantizable(net)
    for name in settings.layers:
        if name not in names:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InputError(f"weights.layers.{name}: not a layer that can be quantized; these are: {known}")
        reason = left_out.get(name)
        if reason and not settings.layers[name].skip:
            raise InputError(f"weights.layers.{name}: cannot be quantized: {reason}; leave it out")
    if not names:
        raise InputError(
            f"the net has no layer to quantize (types {', '.join(QUANTIZED_TYPES)}); check model.prototxt"
        )
    free = free_layers(net, settings)
    users = weight_users(net)
    found: dict[str, GridChoice] = {}
    for name in users:
        override = _override(users[name], settings)
        if override is None or not override.skip:
            found[name] = override or (settings if name in free else settings.first_last)
    quantized = {user for name in found for user in users[name]}
    for layer, foreign in zip(net.layer, foreign_fields(net), strict=True):
        if layer.name in quantized and foreign is not None:
            raise InputError(
                f"layer {layer.name!r} ({layer.type}): {foreign_field_text(foreign)}; or leave the layer's "
                f"weights alone (weights.layers: {{{layer.name}: {{skip: true}}}})"
            )
    return found


def free_layers(net: NetParameter, settings: WeightSettings) -> list[str]:
    """The layers that the general setting is for: neither the first nor the last one, nor overridden.

    Args:
        net: the inference net.
    """
    names = _names(net)
    fixed = {names[0], names[-1], *settings.layers}
    return [name for name, users in weight_users(net).items() if fixed.isdisjoint(users)]


def weight_users(net: NetParameter) -> dict[str, list[str]]:
    """By layer with weights to quantize all layers that have the same weights, itself first; network order.

    Left out are the layers in `unquantizable`.

    Args:
        net: of one phase.
    """
    left_out = unquantizable(net)
    return {users[0]: users for name, users in _same_weights(net).items() if name not in left_out}


def unquantizable(net: NetParameter) -> dict[str, str]:
    """The layers of a quantized type that keep their weights, for Q without alpha would be wrong elsewhere.

    Args:
        net: of one phase.

    Returns:
        By layer who has the same weights and does something else with them.
    """
    layers = {layer.name: layer for layer in net.layer}
    names = set(_names(net))
    found: dict[str, str] = {}
    for blob, same in sharers(net).items():
        if blob.index or blob.layer not in names:
            continue
        for other in same:
            fits = other.layer in names and not other.index
            if not fits or _kernel_order(layers[other.layer]) != _kernel_order(layers[blob.layer]):
                found[blob.layer] = (
                    f"its weights are also in layer {other.layer} ({layers[other.layer].type}), where they "
                    "are no such kernels"
                )
    return found


def _names(net: NetParameter) -> list[str]:
    return [layer.name for layer in net.layer if layer.type in QUANTIZED_TYPES]


def _kernel_order(layer: LayerParameter) -> tuple[int, int]:
    """What makes kernels of a weight blob: their number, and in how many parts they are its columns."""
    if layer.type == "Deconvolution":
        return outputs(layer), layer.convolution_param.group
    return outputs(layer), int(layer.type == "InnerProduct" and layer.inner_product_param.transpose)


def _override(users: Iterable[str], settings: WeightSettings) -> LayerChoice | None:
    """What ``settings.layers`` says of layers with the same weights.

    Raises:
        InputError: different things.
    """
    given = [(name, settings.layers[name]) for name in users if name in settings.layers]
    for name, choice in given[1:]:
        if choice != given[0][1]:
            raise InputError(
                f"weights.layers.{name}: differs from weights.layers.{given[0][0]}, but these layers have "
                "the same weights (param); give one of them, or the same for both"
            )
    return given[0][1] if given else None


def to_be_quantized(net: NetParameter, settings: WeightSettings) -> set[str]:
    """The layers whose weights the settings have quantized.

    Args:
        net: the inference net.
    """
    users = weight_users(net)
    return {user for name in choices(net, settings) for user in users[name]}


def with_quantized_weights(net: NetParameter) -> set[str]:
    """The layers of a net that have an ``*_alpha_term`` layer behind them."""
    names = {layer.name for layer in net.layer}
    return {name for name in _names(net) if name + ALPHA_SUFFIX in names}


def check_unquantized(net: NetParameter) -> None:
    """Check that a net is not one that stage 1 has written.

    Raises:
        InputError: it has an ``*_alpha_term`` layer.
    """
    taken = {layer.name for layer in net.layer}.intersection(name + ALPHA_SUFFIX for name in _names(net))
    if taken:
        raise InputError(
            f"the net has a layer {min(taken)!r}: it has been quantized; give the net from before"
        )


def check_kernels(net: NetParameter, weights: Weights, names: Iterable[str]) -> None:
    """Check the blobs of layers to quantize as far as can be said without knowing what goes into them.

    `caffenet.check_weights` checks more, but only layers with no unknown type before them.

    Args:
        net: of one phase.
        names: the layers; those with the same weights are checked, too.

    Raises:
        InputError: a layer has no weights, or they are not finite or not ``num_output`` kernels and biases.
    """
    same_weights = _same_weights(net)
    for name in (user for owner in names for user in same_weights[owner]):
        layer = _layer(net, name)
        where = f"layer {name!r} ({layer.type})"
        if name not in weights or not weights[name]:
            raise InputError(f"{where} {no_weights(name)}")
        blobs = weights[name]
        kernels = outputs(layer)
        if not are_kernels(layer, blobs[0].shape) or any(bias.size != kernels for bias in blobs[1:]):
            shapes = ", ".join(str(blob.shape) for blob in blobs)
            raise InputError(
                f"{where}: its blobs in the caffemodel have the shapes {shapes}, which are not weights and "
                f"bias of num_output {kernels}; it belongs to another net"
            )
        if not all(all_finite(blob) for blob in blobs):
            raise InputError(f"{where}: a blob holds a NaN or an infinity; the training of it has diverged")


def weights_quan(
    net: NetParameter,
    weights: Weights,
    chosen: Mapping[str, GridChoice],
    solver: Solver | Literal["data_aware"],
    progress: Progress = SILENT,
    calibration: Calibration | None = None,
) -> tuple[NetParameter, Weights, list[QuantizedLayer]]:
    """Quantize the weights of the layers in ``chosen``.

    Args:
        net: the net with all its phases.
        weights: its blobs.
        chosen: grid by layer name (see `choices`).
        solver: ``optimal``, ``reference`` or ``data_aware``.
        calibration: the images for ``data_aware``.

    Returns:
        The new net, its blobs (everything else carried over untouched), and what was done per layer.
    """
    weights = weights.copy()
    if not chosen:
        return with_alpha_terms(net, weights), weights, []
    progress.start("weights", sum(weights[name][0].size for name in chosen))
    aware: dict[str, DataAwareFit] = {}
    if solver == "data_aware":
        if calibration is None:
            raise ValueError("the data_aware solver needs a calibration")
        aware = data_aware(weights, chosen, calibration, progress)
        solver = "optimal"
    findings = []
    shared, same_weights = sharers(net), _same_weights(net)
    for name, choice in chosen.items():
        w = to_kernels(_layer(net, name), weights[name][0])
        informed = aware.get(name)
        found = informed or fit(w, make_grid(choice.grid, choice.bits), solver)
        users = [user for user in same_weights[name] if user in weights]
        for user in users:
            blobs, of_alpha = _blobs(
                _layer(net, user),
                weights[user],
                found,
                aware[user].bias if user in aware else None,
                bias_is_shared=BlobId(user, 1) in shared,
            )
            weights.replace(user, blobs)
            for alpha in reversed(_alpha_layers(_layer(net, user), same_weights[user])):
                weights.insert_after(user, alpha, of_alpha)
        # Kernel by kernel: float64 copies of the largest layers would take more than the whole model.
        loss = sum(_energy(kernel - a * q) for kernel, a, q in zip(w, found.alpha, found.Q, strict=True))
        energy = sum(_energy(kernel) for kernel in w)
        findings.append(
            QuantizedLayer(
                name=name,
                bits=choice.bits,
                grid=choice.grid,
                kernels=len(w),
                weights=w.size,
                loss=loss,
                sqnr_db=decibels(energy, loss),
                output_sqnr_db=informed.output_sqnr_db if informed else None,
                nearest_sqnr_db=informed.nearest_sqnr_db if informed else None,
                shared_by=[user for user in users if user != name],
            )
        )
        if informed is None:
            progress.advance(w.size)
    return with_alpha_terms(net, weights), weights, findings


def _blobs(
    layer: LayerParameter,
    blobs: Sequence[FloatArray],
    found: Fit | DataAwareFit,
    bias: FloatArray | None,
    bias_is_shared: bool,
) -> tuple[list[FloatArray], list[FloatArray]]:
    """The blobs of a quantized layer and those of the Scale layers behind it.

    Args:
        bias: what the layer is to add, if that is not the bias it has.
        bias_is_shared: others have the bias, too, so it must stay; the Scale layers make up for it.
    """
    shifts = []
    biases = blobs[1:]
    if bias is not None and not bias_is_shared:
        biases = [bias.reshape(old.shape) for old in biases]
    for kept in biases:
        b = kept.reshape(-1)
        shifts.append(b * (1 - found.alpha) + (0 if bias is None else bias - b))
    of_alpha = [blob.astype(np.float32) for blob in (found.alpha, *shifts)]
    return [from_kernels(layer, found.Q, blobs[0].shape), *biases], of_alpha


def with_alpha_terms(net: NetParameter, weights: Container[str]) -> NetParameter:
    """The net with the Scale layers for which ``weights`` has an ``*_alpha_term`` layer, copied otherwise.

    Args:
        weights: the blobs, or no more than the names of their layers.
    """
    changed = NetParameter()
    changed.CopyFrom(net)
    del changed.layer[:]
    same_weights = _same_weights(net)
    present = {layer.name for layer in net.layer}
    for layer in net.layer:
        changed.layer.append(layer)
        if layer.type in QUANTIZED_TYPES:
            alphas = _alpha_layers(layer, same_weights[layer.name])
            changed.layer.extend(a for a in alphas if a.name in weights and a.name not in present)
    return changed


def correctable(net: NetParameter) -> dict[str, str]:
    """The layers whose bias can be corrected, and the Scale layers that carry their alphas.

    Left out are layers without a bias, with several tops, or with a blob that others share, and outputs
    whose channels are not their second axis.

    Args:
        net: the inference net with its ``*_alpha_term`` layers.
    """
    layers = {layer.name: layer for layer in net.layer}
    shared = {blob.layer for blob in sharers(net)}
    found = {}
    for layer in net.layer:
        scale = layers.get(layer.name + ALPHA_SUFFIX)
        if (
            layer.type not in QUANTIZED_TYPES
            or scale is None
            or shared.intersection((layer.name, scale.name))
        ):
            continue
        if len(layer.top) == 1 and scale.scale_param.bias_term and scale.scale_param.axis == 1:
            found[layer.name] = scale.name
    return found


def _same_weights(net: NetParameter) -> dict[str, list[str]]:
    """By layer of a quantized type all such layers that have its weights as theirs, in network order."""
    orders = {layer.name: _kernel_order(layer) for layer in net.layer if layer.type in QUANTIZED_TYPES}
    shared = sharers(net)
    return {
        name: [
            blob.layer
            for blob in shared.get(BlobId(name, 0), [BlobId(name, 0)])
            if not blob.index and orders.get(blob.layer) == order
        ]
        for name, order in orders.items()
    }


def _energy(x: npt.NDArray[np.floating[Any]]) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def _layer(net: NetParameter, name: str) -> LayerParameter:
    return next(layer for layer in net.layer if layer.name == name)


def _alpha_layers(layer: LayerParameter, users: Sequence[str]) -> list[LayerParameter]:
    """The Scale layers behind the tops of a layer: one alpha and one shift for all.

    Args:
        users: all layers with its weights; the alpha is one for them, too.
    """
    name = layer.name + ALPHA_SUFFIX
    is_product = layer.type == "InnerProduct"
    parameters = layer.inner_product_param if is_product else layer.convolution_param
    found = []
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
        found.append(alpha)
    return found
