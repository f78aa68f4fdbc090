"""Stage 1: a full-precision net becomes a net with quantized weights and ``*_alpha_term`` Scale layers.

Every kernel w of a quantized layer is replaced by alpha * Q, with Q on a grid of few levels (He & Cheng 2018,
section 3.1). The layer keeps blob 0 = Q and blob 1 = bias; the new Scale layer right behind it has blob 0 =
alpha and, where there is a bias b, blob 1 = b * (1 - alpha), so that alpha * (Qx + b) + b * (1 - alpha) =
alpha * Qx + b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quantize.caffenet import LayerParameter, NetParameter, Weights, all_finite, insert_after
from quantize.caffenet.kernels import from_kernels, outputs, to_kernels
from quantize.errors import InputError
from quantize.numerics.decibels import decibels
from quantize.numerics.grids import make_grid
from quantize.numerics.solvers import Solver, fit
from quantize.progress import SILENT, Progress
from quantize.record import QuantizedLayer
from quantize.settings import GridChoice, LayerChoice, WeightSettings
from quantize.stages.data_aware import Calibration, DataAwareFit, data_aware

QUANTIZED_TYPES = ("Convolution", "ConvolutionDepthwise", "DepthwiseConvolution", "InnerProduct")
ALPHA_SUFFIX = "_alpha_term"


def choices(net: NetParameter, settings: WeightSettings) -> dict[str, GridChoice]:
    """The grid of every layer to quantize, in network order.

    The first and the last layer of a quantized type get ``settings.first_last``, a layer named in
    ``settings.layers`` its override, all others the general setting.

    Args:
        net: the inference net.

    Raises:
        InputError: an override names a layer that is not there or has no weights to quantize.
    """
    names = [layer.name for layer in net.layer if layer.type in QUANTIZED_TYPES]
    for name in settings.layers:
        if name not in names:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InputError(f"weights.layers.{name}: not a layer that can be quantized; these are: {known}")
    if not names:
        raise InputError(
            f"the net has no layer to quantize (types {', '.join(QUANTIZED_TYPES)}); check model.prototxt"
        )
    free = free_layers(net, settings)
    found: dict[str, GridChoice] = {}
    for name in names:
        override = settings.layers.get(name)
        if isinstance(override, LayerChoice) and override.skip:
            continue
        found[name] = override or (settings if name in free else settings.first_last)
    return found


def free_layers(net: NetParameter, settings: WeightSettings) -> list[str]:
    """The layers that the general setting is for: neither the first nor the last one, nor overridden.

    Args:
        net: the inference net.
    """
    names = [layer.name for layer in net.layer if layer.type in QUANTIZED_TYPES]
    return [name for name in names[1:-1] if name not in settings.layers]


def check_kernels(net: NetParameter, weights: Weights, names: Iterable[str]) -> None:
    """Check the blobs of layers to quantize as far as can be said without knowing what goes into them.

    `caffenet.check_weights` checks more, but only layers with no unknown type before them.

    Raises:
        InputError: a layer has no weights, or they are not finite or not ``num_output`` kernels and biases.
    """
    for name in names:
        layer = _layer(net, name)
        where = f"layer {name!r} ({layer.type})"
        if name not in weights or not weights[name]:
            raise InputError(
                f"{where} has no weights in the caffemodel; it belongs to another net, or the layer was "
                "renamed"
            )
        blobs = weights[name]
        kernels = outputs(layer)
        size = blobs[0].size
        if kernels < 1 or not size or size % kernels or any(bias.size != kernels for bias in blobs[1:]):
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
    progress.start("weights", sum(weights[name][0].size for name in chosen))
    aware: dict[str, DataAwareFit] = {}
    if solver == "data_aware":
        if calibration is None:
            raise ValueError("the data_aware solver needs a calibration")
        aware = data_aware(weights, chosen, calibration, progress)
        solver = "optimal"
    findings = []
    for name, choice in chosen.items():
        layer = _layer(net, name)
        blob, *bias = weights[name]
        w = to_kernels(layer, blob)
        informed = aware.get(name)
        found = informed or fit(w, make_grid(choice.grid, choice.bits), solver)
        if informed is not None and informed.bias is not None:
            bias = [informed.bias.reshape(bias[0].shape)]
        weights.replace(name, [from_kernels(layer, found.Q, blob.shape), *bias])
        shift = [(b.reshape(-1) * (1 - found.alpha)).astype(np.float32) for b in bias]
        weights.insert_after(name, _alpha_layer(layer), [found.alpha.astype(np.float32), *shift])
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
            )
        )
        if informed is None:
            progress.advance(w.size)
    return with_alpha_terms(net, weights), weights, findings


def with_alpha_terms(net: NetParameter, weights: Weights) -> NetParameter:
    """The net with the Scale layers for which ``weights`` has an ``*_alpha_term`` layer, copied otherwise."""
    changed = NetParameter()
    changed.CopyFrom(net)
    present = {layer.name for layer in net.layer}
    for name in dict.fromkeys(layer.name for layer in net.layer if layer.type in QUANTIZED_TYPES):
        if name + ALPHA_SUFFIX in weights and name + ALPHA_SUFFIX not in present:
            insert_after(changed, name, _alpha_layer(_layer(net, name)))
    return changed


def _energy(x: npt.NDArray[np.floating[Any]]) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def _layer(net: NetParameter, name: str) -> LayerParameter:
    return next(layer for layer in net.layer if layer.name == name)


def _alpha_layer(layer: LayerParameter) -> LayerParameter:
    alpha = LayerParameter(name=layer.name + ALPHA_SUFFIX, type="Scale")
    alpha.bottom.append(layer.top[0])
    alpha.top.append(layer.top[0])
    is_product = layer.type == "InnerProduct"
    parameters = layer.inner_product_param if is_product else layer.convolution_param
    if parameters.axis != 1:
        alpha.scale_param.axis = parameters.axis
    alpha.scale_param.bias_term = parameters.bias_term
    alpha.include.extend(layer.include)
    alpha.exclude.extend(layer.exclude)
    return alpha
