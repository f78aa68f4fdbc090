"""Blobs that several layers share by name (``param { name: "w" }``): who owns them, and what is in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.arrays import FloatArray, Shape
from quantize.caffenet.bvlc import with_bvlc_blobs
from quantize.caffenet.phases import filter_net
from quantize.caffenet.schema import TEST, NetParameter
from quantize.caffenet.weights import Weights
from quantize.errors import InputError
from quantize.files import Digest


@dataclass(frozen=True)
class BlobId:
    """Blob number ``index`` of the layer called ``layer``."""

    layer: str
    index: int


def owners(net: NetParameter) -> dict[BlobId, BlobId]:
    """Of every blob that a layer shares, the blob that it is (``Net::AppendParam``).

    The first layer of the net that gives a blob a name owns it; every later blob of that name, of whatever
    layer and at whatever place, is the same memory. A layer may share some of its blobs only.

    Args:
        net: of one phase (``filter_net``).

    Returns:
        The owner by blob, in network order; owners themselves, and blobs nobody shares, are left out.
    """
    first: dict[str, BlobId] = {}
    owner_of: dict[BlobId, BlobId] = {}
    for layer in net.layer:
        for index, param in enumerate(layer.param):
            blob = BlobId(layer.name, index)
            if param.name and first.setdefault(param.name, blob) != blob:
                owner_of[blob] = first[param.name]
    return owner_of


def users(net: NetParameter, index: int = 0) -> dict[str, list[str]]:
    """The layers whose blob ``index`` is the same blob ``index`` of one of them.

    Args:
        net: of one phase.

    Returns:
        By the owner's name all layers that have the blob, the owner first, in network order; at least two.
    """
    users_of: dict[str, list[str]] = {}
    for blob, owner in owners(net).items():
        if blob.index == owner.index == index:
            users_of.setdefault(owner.layer, [owner.layer]).append(blob.layer)
    return users_of


def sharers(net: NetParameter) -> dict[BlobId, list[BlobId]]:
    """Of every blob that is shared all blobs that it is, itself among them and the owner first.

    Args:
        net: of one phase.
    """
    by_owner: dict[BlobId, list[BlobId]] = {}
    for blob, owner in owners(net).items():
        by_owner.setdefault(owner, [owner]).append(blob)
    return {blob: same for same in by_owner.values() for blob in same}


def permissive_blobs(net: NetParameter) -> set[BlobId]:
    """The blobs that are one with another for which only the sizes need to agree.

    Args:
        net: of one phase.
    """
    layers = {layer.name: layer for layer in net.layer}
    permissive = set()
    for blob, owner in owners(net).items():
        param = layers[blob.layer].param[blob.index]
        if param.share_mode == param.PERMISSIVE:
            permissive |= {blob, owner}
    return permissive


def load_weights(path: str | Path, net: NetParameter, digest: Digest | None = None) -> Weights:
    """Read a caffemodel as Caffe loads it into a net (see `loaded` and `with_bvlc_blobs`).

    Args:
        path: the file.
        net: with all its phases; what counts is the TEST phase.
        digest: hears the file's bytes.

    Raises:
        InputError: as `Weights.read`.
    """
    test = filter_net(net, TEST)
    return loaded(test, with_bvlc_blobs(test, Weights.read(path, digest)))


def loaded(net: NetParameter, weights: Weights) -> Weights:
    """The blobs that a net has when a caffemodel has been loaded (``Net::CopyTrainedLayersFrom``).

    The layers of the file are copied in its order, so of blobs that are one the last in the file counts, and
    a layer that the file lacks has what it shares with others.

    Args:
        net: of one phase.
        weights: the caffemodel.

    Returns:
        Every layer with its own blobs; the shared ones hold the same values.
    """
    shared = owners(net)
    if not shared:
        return weights
    memory: dict[BlobId, FloatArray] = {}
    for name, blobs in weights.entries():
        for index, blob in enumerate(blobs):
            place = BlobId(name, index)
            memory[shared.get(place, place)] = blob
    given = dict(weights.entries())
    weights = weights.copy()
    for layer in net.layer:
        named = (BlobId(layer.name, index) for index in range(len(layer.param)))
        held = [memory.get(shared.get(place, place)) for place in named]
        own = given.get(layer.name, [])
        if own:
            new = [_in_place_of(blob, other) for blob, other in zip(own, held, strict=False)]
            if any(a is not b for a, b in zip(own, new, strict=False)):
                weights.replace(layer.name, [*new, *own[len(new) :]])
        elif held and all(blob is not None for blob in held):
            weights.add(layer, [blob for blob in held if blob is not None])
    return weights


def _in_place_of(blob: FloatArray, other: FloatArray | None) -> FloatArray:
    """What a blob holds that is one with ``other``, which may have another shape."""
    if other is None or other.size != blob.size or np.array_equal(other.reshape(blob.shape), blob):
        return blob  # sizes that differ are refused where shapes are checked
    return other.reshape(blob.shape)


def check_sharing(net: NetParameter, params: Mapping[str, Sequence[Shape]]) -> None:
    """Check that what is shared has one shape, or one size for ``share_mode: PERMISSIVE``, as Caffe does.

    Args:
        net: of one phase.
        params: the shapes of every layer's own blobs by layer name.

    Raises:
        InputError: naming both layers; or a layer has more ``param`` than blobs.
    """
    layers = {layer.name: layer for layer in net.layer}
    for layer in net.layer:
        has = len(params[layer.name])
        if len(layer.param) > has:
            raise InputError(
                f"layer {layer.name!r} ({layer.type}): {len(layer.param)} param for {has} blobs; Caffe "
                "allows no more than one for each"
            )
    for blob, owner in owners(net).items():
        layer = layers[blob.layer]
        param = layer.param[blob.index]
        own, shared = params[blob.layer][blob.index], params[owner.layer][owner.index]
        permissive = param.share_mode == param.PERMISSIVE
        if own != shared and not (permissive and math.prod(own) == math.prod(shared)):
            raise InputError(
                f"layer {layer.name!r} ({layer.type}): blob {blob.index} has the shape {own} but shares "
                f"{param.name!r} with layer {owner.layer!r}, where it has {shared}; Caffe shares blobs of "
                "one shape only (of one size with share_mode: PERMISSIVE)"
            )
