"""Blobs that several layers share by name (``param { name: "w" }``): which layer owns them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantize.arrays import Shape
from quantize.caffenet.schema import NetParameter
from quantize.errors import InputError


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
    found: dict[BlobId, BlobId] = {}
    for layer in net.layer:
        for index, param in enumerate(layer.param):
            blob = BlobId(layer.name, index)
            if param.name and first.setdefault(param.name, blob) != blob:
                found[blob] = first[param.name]
    return found


def users(net: NetParameter, index: int = 0) -> dict[str, list[str]]:
    """The layers whose blob ``index`` is the same blob ``index`` of one of them.

    Args:
        net: of one phase.

    Returns:
        By the owner's name all layers that have the blob, the owner first, in network order; at least two.
    """
    found: dict[str, list[str]] = {}
    for blob, owner in owners(net).items():
        if blob.index == owner.index == index:
            found.setdefault(owner.layer, [owner.layer]).append(blob.layer)
    return found


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
