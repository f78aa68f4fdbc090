"""The inputs of a net: their shapes, which one takes the images, and whether all are fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.arrays import Shape
from quantize.caffenet import InferenceNet, NetParameter, declared_shape, dependent_layers
from quantize.data.sources import Source
from quantize.data.transform import shape_text
from quantize.data.values import ENDLESS, Values, open_values
from quantize.errors import InputError
from quantize.job.given import Given
from quantize.settings import Fed

GivenShapes = list[int] | dict[str, list[int]] | None
SHOWN = 5
"""Layers that a message names."""
SMALL = 32
"""Inputs of fewer pixels are often placeholders for a size that is set at run time."""


def image_input(given: Given) -> str | None:
    """The input that images go into: the first that ``inputs`` does not name; None where it names all."""
    sections = (given.config.data.calibration, given.config.data.validation)
    named = {name for section in sections if section is not None for name in section.inputs}
    return next((name for name in given.inference.inputs if name not in named), None)


def told_shapes(given: Given) -> dict[str, Shape]:
    """By input the shape of one image's values, as ``data.input_shape`` says, else as the net declares it.

    Raises:
        InputError: ``data.input_shape`` names what is no input.
    """
    declared = given.once("declared", lambda: _declared(given.net, given.inference.inputs))
    key = "data.input_shape"
    return _told(declared, given.inference.inputs, given.config.data.input_shape, key, image_input(given))


def shapes_of_inputs(net: NetParameter, given: GivenShapes, key: str) -> dict[str, Shape]:
    """The same without a configuration.

    Args:
        net: with all its phases.
        given: the shape of the first input, or shapes by input; they win over what the net declares.
        key: where they were given, for messages.
    """
    inputs = InferenceNet.of(net).inputs
    return _told(_declared(net, inputs), inputs, given, key, None)


def _declared(net: NetParameter, inputs: Sequence[str]) -> dict[str, Shape]:
    shapes = {name: declared_shape(net, name) for name in inputs}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _told(
    declared: Mapping[str, Shape], inputs: Sequence[str], given: GivenShapes, key: str, images: str | None
) -> dict[str, Shape]:
    """The shapes that are declared, with those given in their place."""
    told = dict(declared)
    by_name = {images or inputs[0]: given} if isinstance(given, list) else given or {}
    for name, axes in by_name.items():
        _check_name(name, inputs, f"{key}: {name}")
        told[name] = tuple(axes)
    return told


def is_placeholder(shape: Shape) -> bool:
    """Whether an image's declared shape is so small that its size may be meant to be set at run time."""
    return len(shape) == 3 and min(shape[1:]) < SMALL


def placeholder_text(blob: str, shape: Shape, key: str) -> str:
    """What to say about it."""
    return (
        f"input {blob} is declared as {shape_text(shape)}: if its size is set at run time, give the real one "
        f"({key})"
    )


def check_inputs(test: InferenceNet, fed: Fed, blob: str | None, key: str) -> None:
    """Check that every input of the net is fed, and nothing else.

    Raises:
        InputError: an input is not fed; names it and the layers that depend on it. Or there is none of a
            name, or none that images could go into.
    """
    for name in fed.inputs:
        _check_name(name, test.inputs, f"{key}.inputs.{name}")
    if fed.source is not None and blob is None:
        raise InputError(
            f"{key}.source: inputs names every input of the net ({', '.join(test.inputs)}), so the images go "
            "nowhere; leave one of the two out"
        )
    for name in test.inputs:
        if name != blob and name not in fed.inputs:
            layers = [layer.name for layer in dependent_layers(test.net.layer, [name])]
            more = f" and {len(layers) - SHOWN} more layers" if len(layers) > SHOWN else ""
            images = f"images go into {blob!r}" if blob else f"there is no {key}.source"
            raise InputError(
                f"{key}: nothing feeds the net's input {name!r} ({images}), and layers "
                f"{', '.join(layers[:SHOWN])}{more} depend on it; give {key}.inputs: {{{name}: ...}}, a "
                "folder of .npy files, a .npy, .npz or HDF5 file, or a constant"
            )


def _check_name(name: str, inputs: Sequence[str], key: str) -> None:
    if name not in inputs:
        raise InputError(f"{key}: the net has no such input; it has {', '.join(inputs)}")


def check_counts(values: Mapping[str, Values], fed: Fed, present: int) -> None:
    """Check that there are as many values for each input as there are images: ``present``."""
    for given in values.values():
        if len(given) not in (present, ENDLESS):
            what = f"{fed.source} holds {present} images" if fed.source else f"another input has {present}"
            raise InputError(
                f"{given.where}: {len(given)} values but {what}; there must be one for each, in their order"
            )


def check_order(source: Source, values: Mapping[str, Values]) -> None:
    """Check that images are in an order that values can follow; those in subfolders come in turn."""
    for given in values.values():
        if len(given) != ENDLESS and source.folders is not None:
            raise InputError(
                f"{given.where}: values belong to images by their order, but the images of {source.path} lie "
                "in subfolders, which are taken in turn; name the images in that order in a list file"
            )


def images_present(given: Given, fed: Fed, key: str) -> int:
    """How many images there are: in the source, else as there are values of the first input that has many."""
    if fed.source is not None:
        return len(given.source(fed.source))
    for name, values in fed.inputs.items():
        if isinstance(values, Path):
            return len(values_of(given, values, name, None, f"{key}.inputs.{name}"))
    raise InputError(f"{key}.inputs: constants alone do not say how many images there are; give source too")


def values_of(
    given: Given, values: float | list[Any] | Path, name: str, expected: Shape | None, key: str
) -> Values:
    """What goes into an input that takes no images; see `open_values`."""
    return given.once(("values", key, expected), lambda: open_values(values, name, expected, key))
