"""How large a quantized model is with the bits per weight that its layers have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantize.arrays import FLOAT_BYTES
from quantize.caffenet import TEST, BlobId, filter_net, owners
from quantize.caffenet.kernels import outputs
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import alpha_terms
from quantize.settings import GridChoice


@dataclass(frozen=True)
class Packed:
    """A layer with quantized weights: how many, bits per weight, and kernels, each with an alpha."""

    weights: int
    bits: int
    kernels: int


def packed_bytes(model: Model, layers: Iterable[Packed]) -> int:
    """Bytes of a model with weights of so many bits, an alpha for each kernel, and all else as floats.

    What layers share counts once. The second blob of an alpha term follows from the rest and is left out.

    Args:
        model: quantized, or as it was before.
        layers: its quantized layers; of those that share their weights one.
    """
    weights = model.weights
    added = {term for terms in alpha_terms(model.net).values() for term in terms}
    shared = owners(filter_net(model.net, TEST))
    values = sum(
        blob.size
        for layer in weights.layers()
        if layer not in added
        for index, blob in enumerate(weights[layer])
        if BlobId(layer, index) not in shared
    )
    whole, packed = FLOAT_BYTES * values, 0
    for layer in layers:
        whole -= FLOAT_BYTES * layer.weights
        packed += -(-layer.weights * layer.bits // 8) + FLOAT_BYTES * layer.kernels
    return whole + packed


def packed_layers(model: Model, grids: Mapping[str, GridChoice]) -> list[Packed]:
    """What quantizing layers of a model with some grids, by layer, makes of them."""
    weights, layers = model.weights, {layer.name: layer for layer in filter_net(model.net, TEST).layer}
    return [Packed(weights[name][0].size, grid.bits, outputs(layers[name])) for name, grid in grids.items()]
