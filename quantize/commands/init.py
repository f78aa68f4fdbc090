"""`labelfree init`: a commented configuration for a network, with guesses that are said."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.arrays import Shape
from quantize.caffenet import (
    TEST,
    TRAIN,
    InferenceNet,
    NetParameter,
    Weights,
    at_state,
    data_layer,
    load_schema,
    read_prototxt,
)
from quantize.caffenet.phases import takes_images
from quantize.data.sources import FileSource, open_source
from quantize.data.transform import shape_text
from quantize.errors import InputError
from quantize.job.feeds import RESIZE_PER_CROP
from quantize.job.inputs import GivenShapes, is_placeholder, placeholder_text, shapes_of_inputs
from quantize.job.output import OutputFolder
from quantize.settings import ModelFiles

IMAGENET_MEAN = [104, 117, 123]
"""Blue, green, red: what most published Caffe networks subtract."""
FILL_IN = "VALUES"
"""Stands where only the user knows what goes into an input."""

TEMPLATE = """\
# {name}: written by `labelfree init`. Paths are relative to this file; ~ and $VARS expand.
name: {name}                          # prefix of every output file
model:
  prototxt: {prototxt}
  weights: {weights}{model}
data:
  calibration: {{source: {calibration}, images: {images}{inputs}}}  # unlabeled
  # validation: {{source: /path/to/labeled_lmdb, batch_size: 50}}    # for evaluate and `caffe test`
{transform}{shapes}
  seed: 0                             # of random crops and mirrors
weights:
  bits: 4                             # 2 to 5 on the power_of_two grid; or `budget: 3.5`, on average
  grid: power_of_two
  solver: optimal                     # reference: the paper's own iteration
  first_last: {{bits: 8, grid: fixed_point}}
  # layers: {{some_layer: {{bits: 8, grid: fixed_point}}, other_layer: {{skip: true}}}}
renorm:
  images: {images}
  augment: train                      # random crops and mirrors as in training; test: centre crops
  memory: 2GiB                        # bound on what the sweep keeps
activations:
  bits: 8                             # codes 0..127; `levels: 255` uses the full byte
  images: {activation_images}
output: {output}
"""


@dataclass(frozen=True)
class Initial:
    """A configuration and what was guessed in it."""

    name: str
    yaml: str
    guesses: list[str]


def initial_config(
    net: NetParameter, model: ModelFiles, calibration: Path, folder: Path, shapes: GivenShapes = None
) -> Initial:
    """A configuration for a net.

    Args:
        net: the network.
        model: its files, and how they are read.
        calibration: LMDB, image folder or list file.
        folder: where the YAML file will be; paths are written relative to it.
        shapes: of its inputs, where the prototxt does not say them.

    Raises:
        InputError: the net or the images cannot be read, or images cannot go into the net.
    """
    guesses: list[str] = []
    told = shapes_of_inputs(net, shapes, "--shape")
    blob, *others = InferenceNet.of(net).inputs
    if not takes_images(told.get(blob)):
        raise InputError(
            f"{model.prototxt}: input {blob!r} of shape {shape_text(told[blob])} takes no images; write the "
            "configuration by hand, with data.calibration.inputs"
        )
    if shapes is None and blob in told and is_placeholder(told[blob]):
        guesses.append(placeholder_text(blob, told[blob], "--shape, data.input_shape"))
    if others:
        names = ", ".join(others)
        guesses.append(
            f"images go into input {blob}; say in the file what goes into {names}, instead of {FILL_IN}"
        )
    source = open_source(calibration)
    count = len(source)
    files = isinstance(source, FileSource)
    source.close()
    name = re.sub(r"[^\w.+-]+", "_", net.name or model.prototxt.stem).strip("_.+-") or "net"
    images = min(1000, count)
    if count < 1000:
        guesses.append(f"renorm uses all {count} images; about 1,000 are usual")
    text = TEMPLATE.format(
        name=name,
        prototxt=_path(model.prototxt, folder),
        weights=_path(model.weights, folder),
        model=_more_of_the_model(model, folder),
        inputs=_inputs(others),
        shapes=f"\n  input_shape: {json.dumps(shapes)}" if shapes else "",
        calibration=_path(calibration, folder),
        images=images,
        activation_images=min(400, count),
        transform=_transform(net, told.get(blob), files, guesses),
        output=json.dumps(f"out/{name}"),
    )
    return Initial(name, text, guesses)


def write_initial(
    model: ModelFiles, calibration: Path, path: Path | None, force: bool, shapes: GivenShapes = None
) -> tuple[Path, list[str]]:
    """Write the configuration to ``path`` (default: NAME.yaml here).

    Returns:
        Where it was written, and what was guessed.

    Raises:
        InputError: bad input, or the file is there and ``force`` is not set.
    """
    net = read_prototxt(model.prototxt, load_schema(model.caffe_proto) if model.caffe_proto else None)
    net = at_state(net, model.stages, model.level)
    Weights.read(model.weights)
    folder = path.parent if path is not None else Path()
    initial = initial_config(net, model, calibration, folder, shapes)
    target = path if path is not None else Path(f"{initial.name}.yaml")
    if target.exists() and not force:
        raise InputError(f"{target}: there already; choose another --config or give --force")
    output = OutputFolder(target.parent)
    try:
        with output.writing(target.name) as file:
            file.write(initial.yaml.encode())
    finally:
        output.close()
    return target, initial.guesses


def _path(path: Path, folder: Path) -> str:
    """A path as YAML, relative to the folder where it lies below it."""
    absolute = Path(os.path.abspath(path))
    base = Path(os.path.abspath(folder))
    shown = absolute.relative_to(base) if absolute.is_relative_to(base) else absolute
    return _text(str(shown))


def _text(text: str) -> str:
    """A text as YAML."""
    return json.dumps(text, ensure_ascii=False)


def _inputs(names: Sequence[str]) -> str:
    """What is to be filled in for the inputs that take no images."""
    return f", inputs: {{{', '.join(f'{_text(name)}: {FILL_IN}' for name in names)}}}" if names else ""


def _more_of_the_model(model: ModelFiles, folder: Path) -> str:
    """The lines about the model that most networks do not need."""
    schema = f"\n  caffe_proto: {_path(model.caffe_proto, folder)}" if model.caffe_proto else ""
    stages = f"\n  stages: {json.dumps(model.stages, ensure_ascii=False)}" if model.stages else ""
    return schema + stages + (f"\n  level: {model.level}" if model.level else "")


def _transform(net: NetParameter, shape: Shape | None, files: bool, guesses: list[str]) -> str:
    layer = data_layer(net, TRAIN) or data_layer(net, TEST)
    keys: dict[str, object] = {}
    if layer is not None:
        guesses.append(f"the transform is that of the prototxt's layer {layer.name}")
        crop = layer.transform_param.crop_size
    else:
        crop = shape[-1] if shape is not None and shape[-2] == shape[-1] else 0
        if shape is not None and not crop:
            keys["resize"] = list(shape[1:])
            guesses.append(f"images are resized to {shape_text(shape[1:])}, the input's height and width")
        if crop:
            keys["crop_size"] = crop
            guesses.append(f"crop_size {crop} from the shape of the input")
        if shape is not None and shape[0] == len(IMAGENET_MEAN):
            keys["mean_value"] = IMAGENET_MEAN
            guesses.append(
                f"mean_value {IMAGENET_MEAN}, the usual one: check it against how the net was trained"
            )
    if files and crop:
        keys["resize_short"] = round(crop * RESIZE_PER_CROP)
        guesses.append(f"images are resized so that the shorter side is {keys['resize_short']}")
    comment = "  # overrides of the prototxt's transform_param" if layer is not None else ""
    return f"  transform: {json.dumps(keys).replace(chr(34), '')}{comment}"
