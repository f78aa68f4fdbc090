"""Shapes of all blobs and weights that a net implies, and whether a caffemodel has those weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import fork_shape_rules as fork_shape_rules  # registers the rules
from quantize.caffenet.fork import foreign_field_text, foreign_fields
from quantize.caffenet.graph import dependent_layers, single_assignment
from quantize.caffenet.masks import check_masks
from quantize.caffenet.phases import NAMESAKE, is_data_layer
from quantize.caffenet.schema import LayerParameter, NetParameter
from quantize.caffenet.shape_rules import LayerShapes, ShapeError, has_rule, known_types, layer_shapes
from quantize.caffenet.sharing import BlobId, check_sharing, permissive_blobs
from quantize.caffenet.text_faults import did_you_mean
from quantize.caffenet.traits import Trait, traits_of
from quantize.caffenet.weights import MAX_AXES, Weights
from quantize.errors import InputError

MOST_NAMED = 10
"""So many layers that cannot be run are named."""
MAX_COUNT = 2**31 - 1
"""The most values of a blob in Caffe (``Blob::Reshape``); here of one image, as we choose the batch."""


@dataclass
class Shapes:
    """What a net's layers imply.

    Attributes:
        blobs: the shape of every blob by name, with the batch.
        params: the shapes of every layer's own blobs by layer name; an empty list where it has none.
        macs: multiply-accumulates of every layer by layer name, for the batch.
    """

    blobs: dict[str, Shape] = field(default_factory=dict)
    params: dict[str, list[Shape]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)


def known_part(net: NetParameter, inputs: Collection[str]) -> NetParameter:
    """The layers that have a shape rule, fed by ``inputs`` and such layers only.

    A layer with a field of a fork that may change what it computes has none, whatever its type.
    """
    known = NetParameter()
    known.CopyFrom(net)
    del known.layer[:]
    made = set(inputs)
    for layer, foreign in zip(net.layer, foreign_fields(net), strict=True):
        if has_rule(layer.type) and foreign is None and made.issuperset(layer.bottom):
            made.update(layer.top)
            known.layer.append(layer)
        else:
            made.difference_update(layer.top)
    return known


def infer_shapes(
    net: NetParameter, inputs: Mapping[str, Shape], told: Mapping[str, LayerShapes] | None = None
) -> Shapes:
    """Run the layers' shape rules in order.

    Args:
        net: a filtered net, or a part of one.
        inputs: shapes, with the batch, of the blobs that come from outside; they win over what an Input layer
            or another data layer of the net says about its tops.
        told: by layer name, what is known of layers that have no rule.

    Raises:
        InputError: naming the layer: its type is unknown, it has a field of a fork that may change what it
            computes, its bottoms or parameters are impossible, or a blob that it shares has another shape
            elsewhere.
    """
    foreign = dict(zip((layer.name for layer in net.layer), foreign_fields(net), strict=True))
    odd = [layer.name for layer in net.layer if not _is_known(layer, foreign[layer.name], inputs)]
    told = {name: shapes for name, shapes in (told or {}).items() if name in odd}
    unknown = [name for name in odd if name not in told]
    if unknown:
        raise InputError(_unknown_text(net, unknown, foreign))
    shapes = Shapes(blobs={name: tuple(shape) for name, shape in inputs.items()})
    for layer in net.layer:
        try:
            result = told.get(layer.name) or _infer_layer(layer, shapes.blobs, inputs)
            _check(layer, result)
        except ShapeError as error:
            raise InputError(f"layer {layer.name!r} ({layer.type}): {error}") from None
        shapes.blobs.update(zip(layer.top, result.tops, strict=True))
        shapes.params[layer.name] = list(result.params)
        shapes.macs[layer.name] = result.macs
    check_masks(net, shapes.blobs)
    check_sharing(net, shapes.params)
    return shapes


def check_weights(net: NetParameter, weights: Weights, shapes: Shapes) -> None:
    """Check that a caffemodel has the weights that a net's layers need; layers the net lacks are ignored.

    Blobs of old files, whose shapes are always four numbers, may differ from what is needed by leading ones,
    as in Caffe (see `in_shape`).

    Raises:
        InputError: naming the layer: it is missing in the caffemodel, or a blob is missing, has another
            shape, or holds a NaN or an infinity.
    """
    held: dict[str, list[list[FloatArray]]] = {}
    for name, blobs in weights.entries():
        held.setdefault(name, []).append(blobs)
    permissive = permissive_blobs(net)
    for layer in net.layer:
        expected = shapes.params[layer.name]
        if layer.name not in held:
            if expected:
                raise InputError(f"layer {layer.name!r} ({layer.type}) {no_weights(layer.name)}")
            continue
        for blobs in held[layer.name]:  # of several layers of one name Caffe copies all
            _check_blobs(layer, blobs, expected, permissive)


def in_shape(weights: Weights, shapes: Shapes) -> Weights:
    """The weights with each blob in the shape that it is needed in; the same object where all are.

    Args:
        weights: in which `check_weights` has found no fault.
    """
    present = set(weights.layers())
    other = {
        name: expected
        for name, expected in shapes.params.items()
        if name in present and [blob.shape for blob in weights[name]] != expected
    }
    changed = weights.copy() if other else weights
    for name, expected in other.items():
        changed.reshape(name, expected)
    return changed


def no_weights(name: str) -> str:
    """Why a caffemodel may have nothing for a layer that needs weights, and what to do."""
    first, _, number = name.rpartition(NAMESAKE)
    if number.isdecimal():
        return (
            f"has no weights: it is number {number} of the layers called {first!r}, and Caffe gives what a "
            "caffemodel has under a name to the first of them only; share its weights by name (param), or "
            "rename it in the prototxt and the caffemodel"
        )
    return "has no weights in the caffemodel; it belongs to another net, or the layer was renamed"


def _check_blobs(
    layer: LayerParameter,
    blobs: Sequence[FloatArray],
    expected: Sequence[Shape],
    permissive: Collection[BlobId],
) -> None:
    where = f"layer {layer.name!r} ({layer.type})"
    if len(blobs) != len(expected):
        raise InputError(
            f"{where} needs {len(expected)} blobs but has {len(blobs)} in the caffemodel; it belongs to "
            "another net, or bias_term differs"
        )
    for index, (blob, shape) in enumerate(zip(blobs, expected, strict=True)):
        fits = blob.shape in (shape, (1,) * (4 - len(shape)) + shape)
        if not fits and not (BlobId(layer.name, index) in permissive and blob.size == math.prod(shape)):
            raise InputError(
                f"{where}: blob {index} must have the shape {shape} but has {blob.shape} in the "
                "caffemodel; it belongs to another net, or the images have other channels or another size"
            )
        if not all_finite(blob):
            raise InputError(
                f"{where}: blob {index} holds a NaN or an infinity; the training of it has diverged"
            )


def all_finite(blob: FloatArray) -> bool:
    """Whether no value is a NaN or an infinity.

    Without an array of the blob's size: NaN passes through minimum, infinities are extremes.
    """
    return not blob.size or bool(np.isfinite(blob.min()) and np.isfinite(blob.max()))


def _is_known(layer: LayerParameter, foreign: str | None, inputs: Mapping[str, Shape]) -> bool:
    """Whether a layer's shapes follow from its rule, or from what it is fed with."""
    is_fed = is_data_layer(layer) and any(top in inputs for top in layer.top)
    return is_fed or (has_rule(layer.type) and foreign is None)


def _unknown_text(net: NetParameter, names: Sequence[str], foreign: Mapping[str, str | None]) -> str:
    """Why a net with some layers that nobody here can run is refused, in one line.

    Args:
        names: of the layers, at least one.
        foreign: by layer the field of a fork that may change what it computes.
    """
    types = {layer.name: layer.type for layer in net.layer}
    first, *others = names
    text = f"layer {first!r} ({types[first]}): "
    field = foreign[first]
    if field is not None and has_rule(types[first]):
        text += f"{foreign_field_text(field)}; or use engine: caffe with that fork"
        last = ""
    else:
        hint = did_you_mean(types[first], known_types())
        text += f"the onnx engine does not know this type{hint}{_needed_for(net, first)}; use engine: caffe, "
        text += "which runs what your Caffe knows, or --stages weights, which runs nothing"
        last = f". Known types are: {', '.join(sorted(known_types()))}"
    if others:
        shown = [
            f"{name!r} ({foreign[name] if has_rule(types[name]) else types[name]})"
            for name in others[:MOST_NAMED]
        ]
        more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        text += f". So it is with the layers {', '.join(shown)}{more}"
    return text + last


def _needed_for(net: NetParameter, name: str) -> str:
    """For the sake of which layer behind it one is to be run: the first with blobs."""
    layers = single_assignment(net).layer
    made = [top for layer in layers if layer.name == name for top in layer.top]
    for layer in dependent_layers(layers, made):
        if traits_of(layer) & (Trait.KERNELS | Trait.BLOBS):
            return f", and layer {layer.name!r} ({layer.type}) behind it needs what it makes"
    return ", and the run needs what it makes"


def _infer_layer(
    layer: LayerParameter, blobs: Mapping[str, Shape], inputs: Mapping[str, Shape]
) -> LayerShapes:
    if is_data_layer(layer) and any(top in inputs for top in layer.top):
        batch = next(inputs[top][0] for top in layer.top if top in inputs)
        return LayerShapes([inputs.get(top, (batch,)) for top in layer.top])  # what is not given is labels
    missing = [bottom for bottom in layer.bottom if bottom not in blobs]
    if missing:
        raise ShapeError(f"the bottom {missing[0]!r} is made by no layer before and is no input")
    return layer_shapes(layer, [blobs[bottom] for bottom in layer.bottom])


def _check(layer: LayerParameter, result: LayerShapes) -> None:
    if len(result.tops) != len(layer.top):
        raise ShapeError(f"{len(layer.top)} tops; the type makes {len(result.tops)}")
    for shape in (*result.tops, *result.params):
        if len(shape) > MAX_AXES:
            raise ShapeError(f"a blob of {len(shape)} axes; Caffe has at most {MAX_AXES}")
        if any(size < 1 for size in shape):
            raise ShapeError(f"a blob would have the impossible shape {shape}")
    for shape in result.tops:
        if math.prod(shape[1:]) > MAX_COUNT:
            raise ShapeError(f"a blob of the shape {shape} is larger than Caffe's {MAX_COUNT} values")
    for shape in result.params:
        if math.prod(shape) > MAX_COUNT:
            raise ShapeError(f"weights of the shape {shape} are larger than Caffe's {MAX_COUNT} values")
