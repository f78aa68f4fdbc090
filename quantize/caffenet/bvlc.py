"""A fork's net in the forms of Caffe 1.0, as far as these say the same: ``model.write: bvlc``.

A layer that normalizes and has a scale and a shift of its own (NVCaffe's BatchNorm, BN, CuDNNBatchNorm)
becomes a BatchNorm and a Scale, SegNet's BN a Scale. Fields of forks that have no effect go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from quantize.arrays import FloatArray
from quantize.caffenet.fork import without_effectless
from quantize.caffenet.graph import unused_name
from quantize.caffenet.norms import CAFFE_PLACES, NormPlaces, epsilon, norm_places, places_with_affine
from quantize.caffenet.schema import LayerParameter, NetParameter
from quantize.caffenet.weights import Weights

LayerForms = Literal["as_read", "bvlc"]
"""The forms of a fork's layers: the fork's, or those of Caffe 1.0 where they say the same."""
SCALE_SUFFIX = "_scale"


def in_bvlc_forms(net: NetParameter) -> NetParameter:
    """A copy of a net, with all its phases, in the forms of Caffe 1.0."""
    changed = without_effectless(net)
    layers = list(changed.layer)
    del changed.layer[:]
    taken = {layer.name for layer in layers}
    for layer in layers:
        places = norm_places(layer)
        if places is not None and places.affine is not None:
            changed.layer.extend(_batch_norm_and_scale(layer, places, taken))
        elif layer.type == "BN":
            changed.layer.append(_scale(layer, layer.name, layer.bottom[0], range(2)))
        else:
            changed.layer.append(layer)
    return changed


def _batch_norm_and_scale(
    layer: LayerParameter, places: NormPlaces, taken: set[str]
) -> tuple[LayerParameter, LayerParameter]:
    assert places.affine is not None
    norm = _bare(layer, layer.name, "BatchNorm", layer.bottom[0], (places.mean, places.variance))
    eps = epsilon(layer)
    if eps != norm.batch_norm_param.eps:
        norm.batch_norm_param.eps = eps
    name = unused_name(layer.name + SCALE_SUFFIX, taken)
    taken.add(name)
    return norm, _scale(layer, name, layer.top[0], places.affine)


def _scale(layer: LayerParameter, name: str, bottom: str, places: Sequence[int]) -> LayerParameter:
    scale = _bare(layer, name, "Scale", bottom, places)
    scale.scale_param.bias_term = True
    return scale


def _bare(
    layer: LayerParameter, name: str, type_name: str, bottom: str, places: Sequence[int]
) -> LayerParameter:
    """A layer in the place of another, with some of that one's blobs; they stay shared where they are."""
    new = LayerParameter(name=name, type=type_name, bottom=[bottom], top=[layer.top[0]])
    new.include.extend(layer.include)
    new.exclude.extend(layer.exclude)
    params = [layer.param[place] for place in places if place < len(layer.param)]
    if any(param.name for param in params):
        new.param.extend(params)
    return new


def with_bvlc_blobs(net: NetParameter, weights: Weights) -> Weights:
    """The blobs of a fork's caffemodel for the net that `in_bvlc_forms` has made.

    Where the caffemodel has a fork's blobs under the name of a BatchNorm that a Scale without blobs follows,
    the two get theirs of them. Blobs (1, C, 1, 1) of a Scale become (C,).
    """
    given = dict(weights.entries())
    changed = weights.copy()
    for layer, behind in zip(net.layer, [*net.layer[1:], LayerParameter()], strict=True):
        blobs = given.get(layer.name, [])
        places = places_with_affine(len(blobs))
        if layer.type == "Scale" and len(blobs) == 2 and all(map(_is_of_bn, blobs)):
            changed.replace(layer.name, [blob.reshape(-1) for blob in blobs])
        elif (
            layer.type == "BatchNorm"
            and places is not None
            and behind.type == "Scale"
            and behind.bottom == layer.top
            and behind.name not in given
        ):
            norm, affine = _parted(blobs, places)
            changed.replace(layer.name, norm)
            changed.insert_after(layer.name, behind, affine)
    return changed


def _is_of_bn(blob: FloatArray) -> bool:
    return blob.ndim == 4 and blob.shape == (1, blob.size, 1, 1)


def _parted(blobs: Sequence[FloatArray], places: NormPlaces) -> tuple[list[FloatArray], list[FloatArray]]:
    """The blobs of Caffe's BatchNorm and of a Scale."""
    assert places.affine is not None
    norm: list[FloatArray] = [np.ones(1, np.float32)] * CAFFE_PLACES.blobs
    norm[CAFFE_PLACES.mean] = blobs[places.mean].reshape(-1)
    norm[CAFFE_PLACES.variance] = blobs[places.variance].reshape(-1)
    return norm, [blobs[place].reshape(-1) for place in places.affine]
