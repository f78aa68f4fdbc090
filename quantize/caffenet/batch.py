"""Layers that have the number of images of a prototxt's batch written into them."""

from __future__ import annotations

from collections.abc import Sequence

from quantize.arrays import Shape
from quantize.caffenet.phases import exists
from quantize.caffenet.schema import TEST, LayerParameter, NetParameter
from quantize.caffenet.shapes import infer_shapes, known_part
from quantize.errors import InputError

_BATCH_SIZES = (
    "data_param",
    "image_data_param",
    "memory_data_param",
    "window_data_param",
    "hdf5_data_param",
)


def free_batch(net: NetParameter) -> None:
    """Have Reshape layers of the TEST phase copy their first axis where they name it, in place.

    Deploy nets for one image say ``dim: 1`` where they mean the batch, those for ten ``dim: 10``. ``dim: 0``,
    which copies the axis, is the same for that batch and right for any other: labelfree runs batches of any
    size, and writes a net for one image and one for the validation images.

    Args:
        net: the net with all its phases, no stages set (see `at_state`).
    """
    layers = [layer for layer in net.layer if exists(layer, TEST)]
    named = [layer for layer in layers if layer.type == "Reshape" and _names_first_axis(layer)]
    if not named:
        return
    batches, shapes = _batches(layers), _shapes(layers)
    for layer in named:
        batch = layer.reshape_param.shape.dim[0]
        if batch in batches and all(shapes.get(bottom, (batch,))[:1] == (batch,) for bottom in layer.bottom):
            layer.reshape_param.shape.dim[0] = 0


def _names_first_axis(layer: LayerParameter) -> bool:
    param = layer.reshape_param
    return param.axis == 0 and param.num_axes != 0 and len(param.shape.dim) > 0 and param.shape.dim[0] > 0


def _batches(layers: Sequence[LayerParameter]) -> set[int]:
    """Numbers of images that the layers that feed a net have; 1 where they say none."""
    sizes = {shape.dim[0] for layer in layers for shape in layer.input_param.shape if shape.dim}
    for layer in layers:
        sizes |= {getattr(layer, name).batch_size for name in _BATCH_SIZES if layer.HasField(name)}
    return sizes or {1}


def _shapes(layers: Sequence[LayerParameter]) -> dict[str, Shape]:
    """Shapes of the blobs for the batch that the prototxt has, as far as it tells them."""
    known = known_part(NetParameter(layer=layers), [])
    try:
        return infer_shapes(known, {}).blobs
    except InputError:  # to be said where the net is used
        return {}
