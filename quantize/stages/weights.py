"""Stage 1: a full-precision net becomes a net with quantized weights and ``*_alpha_term`` Scale layers.

Every kernel w of a quantized layer is replaced by alpha * Q, with Q on a grid of few levels (He & Cheng 2018,
section 3.1). How both stand in the net and its blobs is `caffenet.quantized`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

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
from quantize.caffenet.kernels import are_kernels, outputs, to_kernels
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import (
    alpha_terms,
    kernel_order,
    same_weights,
    write_quantized,
)
from quantize.caffenet.shapes import no_weights
from quantize.caffenet.traits import Trait, traits_of, types_with
from quantize.errors import InputError
from quantize.numerics.decibels import decibels
from quantize.numerics.grids import make_grid
from quantize.numerics.solvers import Solver, fit
from quantize.progress import SILENT, Progress
from quantize.record import QuantizedLayer
from quantize.settings import GridChoice, LayerChoice, SolverName, WeightSettings
from quantize.stages.data_aware import CalibrationSweep, DataAwareFit, data_aware


def choices(net: NetParameter, settings: WeightSettings) -> dict[str, GridChoice]:
    """The grid of every layer to quantize, in network order.

    The first and the last layer of a quantized type get ``settings.first_last``, a layer named in
    ``settings.layers`` its override, a depthwise one ``settings.depthwise`` where that is set, all others the
    general setting. Layers with the same weights count as one, named like the first: they have what any
    of them has.

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
        types = ", ".join(types_with(Trait.KERNELS))
        raise InputError(f"the net has no layer to quantize (types {types}); check model.prototxt")
    ends = {names[0], names[-1]}
    depthwise = depthwise_layers(net)
    users = weight_users(net)
    found: dict[str, GridChoice] = {}
    for name in users:
        override = _override(users[name], settings)
        if override is None or not override.skip:
            choice: GridChoice = override or settings
            if override is None and not ends.isdisjoint(users[name]):
                choice = settings.first_last
            elif override is None and settings.depthwise and not depthwise.isdisjoint(users[name]):
                choice = settings.depthwise
            found[name] = GridChoice(bits=choice.bits, grid=choice.grid)
    quantized = {user for name in found for user in users[name]}
    for layer, foreign in zip(net.layer, foreign_fields(net), strict=True):
        if layer.name in quantized and foreign is not None:
            raise InputError(
                f"layer {layer.name!r} ({layer.type}): {foreign_field_text(foreign)}; or leave the layer's "
                f"weights alone (weights.layers: {{{layer.name}: {{skip: true}}}})"
            )
    return found


def free_layers(net: NetParameter, settings: WeightSettings) -> list[str]:
    """The layers that the general setting is for, and no more special one.

    Args:
        net: the inference net.
    """
    names = _names(net)
    fixed = {names[0], names[-1], *settings.layers}
    if settings.depthwise is not None:
        fixed |= depthwise_layers(net)
    return [name for name, users in weight_users(net).items() if fixed.isdisjoint(users)]


def depthwise_layers(net: NetParameter) -> set[str]:
    """The convolutions with one output channel for each group, which see one channel each.

    Args:
        net: of one phase.
    """
    return {
        layer.name
        for layer in net.layer
        if layer.type in ("DepthwiseConvolution", "ConvolutionDepthwise")
        or (
            layer.type == "Convolution"
            and layer.convolution_param.num_output == layer.convolution_param.group > 1
        )
    }


def weight_users(net: NetParameter) -> dict[str, list[str]]:
    """By layer with weights to quantize all layers that have the same weights, itself first; network order.

    Left out are the layers in `unquantizable`.

    Args:
        net: of one phase.
    """
    left_out = unquantizable(net)
    return {users[0]: users for name, users in same_weights(net).items() if name not in left_out}


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
            if not fits or kernel_order(layers[other.layer]) != kernel_order(layers[blob.layer]):
                found[blob.layer] = (
                    f"its weights are also in layer {other.layer} ({layers[other.layer].type}), where they "
                    "are no such kernels"
                )
    return found


def _names(net: NetParameter) -> list[str]:
    return [layer.name for layer in net.layer if Trait.KERNELS in traits_of(layer)]


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


def check_unquantized(net: NetParameter) -> None:
    """Check that a net is not one that this stage has written.

    Raises:
        InputError: it has an ``*_alpha_term`` layer.
    """
    taken = alpha_terms(net)
    if taken:
        term = min(term for terms in taken.values() for term in terms)
        raise InputError(f"the net has a layer {term!r}: it has been quantized; give the net from before")


def check_kernels(net: NetParameter, weights: Weights, names: Iterable[str]) -> None:
    """Check the blobs of layers to quantize as far as can be said without knowing what goes into them.

    `caffenet.check_weights` checks more, but only layers with no unknown type before them.

    Args:
        net: of one phase.
        names: the layers; those with the same weights are checked, too.

    Raises:
        InputError: a layer has no weights, or they are not finite or not ``num_output`` kernels and biases.
    """
    users_of = same_weights(net)
    for name in (user for owner in names for user in users_of[owner]):
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
    model: Model,
    chosen: Mapping[str, GridChoice],
    solver: SolverName,
    progress: Progress = SILENT,
    calibration: CalibrationSweep | None = None,
) -> tuple[Model, list[QuantizedLayer]]:
    """Quantize the weights of the layers in ``chosen``.

    Args:
        model: in full precision.
        chosen: grid by layer name (see `choices`).
        solver: what looks for alpha and Q.
        calibration: the images for ``data_aware``.

    Returns:
        The quantized model (everything else of it carried over untouched), and what was done per layer.
    """
    net, weights = model.net, model.weights.copy()
    if chosen:
        progress.start("weights", sum(weights[name][0].size for name in chosen))
    aware: dict[str, DataAwareFit] = {}
    if solver == "data_aware" and chosen:
        if calibration is None:
            raise ValueError("the data_aware solver needs a calibration")
        aware = data_aware(model, chosen, calibration, progress)
    rest: Solver = "optimal" if solver == "data_aware" else solver
    findings = []
    shared, users_of = sharers(net), same_weights(net)
    for name, choice in chosen.items():
        w = to_kernels(_layer(net, name), weights[name][0])
        informed = aware.get(name)
        found = informed or fit(w, make_grid(choice.grid, choice.bits), rest)
        users = [user for user in users_of[name] if user in weights]
        for user in users:
            bias = aware[user].bias if user in aware else None
            is_shared = BlobId(user, 1) in shared
            layer = _layer(net, user)
            write_quantized(weights, layer, users_of[user], found.Q, found.alpha, bias, is_shared)
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
    return replace(model.holding(weights), grids=dict(chosen), solver=solver), findings


def _energy(x: npt.NDArray[np.floating[Any]]) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def _layer(net: NetParameter, name: str) -> LayerParameter:
    return next(layer for layer in net.layer if layer.name == name)
