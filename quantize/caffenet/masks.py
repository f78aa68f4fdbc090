"""Masks of poolings: the places of maxima, which an Upsample layer puts values back to."""

from __future__ import annotations

from collections.abc import Mapping

from quantize.arrays import Shape
from quantize.caffenet.schema import LayerParameter, NetParameter
from quantize.errors import InputError


def check_masks(net: NetParameter, shapes: Mapping[str, Shape]) -> None:
    """Check that the second bottom of every Upsample is a mask, of a pooling of as many pixels as it makes.

    Caffe takes any numbers for places, and stops in the middle of a run when one lies outside.

    Args:
        net: a filtered net, or a part of one.
        shapes: of its blobs.

    Raises:
        InputError: naming the layer.
    """
    makers: dict[str, LayerParameter] = {}
    for layer in net.layer:
        if layer.type == "Upsample" and len(layer.bottom) == 2:
            _check(layer, makers.get(layer.bottom[1]), shapes)
        makers.update(dict.fromkeys(layer.top, layer))


def _check(layer: LayerParameter, maker: LayerParameter | None, shapes: Mapping[str, Shape]) -> None:
    where, mask = f"layer {layer.name!r} ({layer.type})", layer.bottom[1]
    if maker is None or maker.type != "Pooling" or list(maker.top).index(mask) != 1:
        raise InputError(
            f"{where}: its second bottom {mask!r} is no mask: the second top of a MAX Pooling layer is needed"
        )
    pooled, made = shapes[maker.bottom[0]][2:], shapes[layer.top[0]][2:]
    if pooled != made:
        raise InputError(
            f"{where} makes {_size(made)} pixels, but the mask {mask!r} is of a pooling of {_size(pooled)}: "
            "give upsample_param that size (upsample_h, upsample_w)"
        )


def _size(sizes: Shape) -> str:
    return "x".join(map(str, sizes))
