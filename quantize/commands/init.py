"""`labelfree init`: a commented configuration for a network, with guesses that are said."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from quantize.arrays import Shape
from quantize.caffenet import (
    TRAIN,
    InferenceNet,
    NetParameter,
    Weights,
    read_net,
)
from quantize.caffenet.kernels import are_kernels, to_kernels
from quantize.caffenet.phases import takes_images
from quantize.data.transform import shape_text
from quantize.errors import InputError
from quantize.job.feeds import effective_transform, resizing
from quantize.job.given import Given
from quantize.job.inputs import GivenShapes, is_placeholder, placeholder_text, shapes_of_inputs
from quantize.job.output import OutputFolder
from quantize.job.transforms import ARITHMETIC, has_data_layer, with_chosen_transform, with_transform
from quantize.numerics.decibels import decibels
from quantize.numerics.grids import make_grid
from quantize.numerics.solvers import fit
from quantize.settings import (
    ActivationSettings,
    Config,
    ModelFiles,
    RenormSettings,
    TransformKeys,
    WeightSettings,
)
from quantize.stages.weights import free_layers

FILL_IN = "VALUES"
"""Stands where only the user knows what goes into an input."""
MOST_IMAGES = 1000
KEPT_SHARE = 5
"""One image in so many is kept back for evaluate."""
UNIFORM = "uniform"
"""The grid that is compared with the default."""
KERNELS_LOOKED_AT = 64
"""Of each layer, for that: the medians of a net move by a tenth of a decibel."""
CLEARLY_BETTER = 1.0
"""Decibels."""

TEMPLATE = """\
# {name}: written by `labelfree init`. Paths are relative to this file; ~ and $VARS expand.
name: {name}                          # prefix of every output file
model:
  prototxt: {prototxt}
  weights: {weights}{model}
data:
  calibration: {{source: {calibration}, images: {images}{inputs}}}  # unlabeled; {kept}
  # validation: {{source: /path/to/labeled_lmdb, batch_size: 50}}    # for evaluate and `caffe test`
{transform}{shapes}
  augment: train                      # random crops and mirrors as in training; test: centre crops
  seed: 0                             # of random crops and mirrors
weights:
  bits: 4                             # 2 to 5 on the power_of_two grid; or `budget: 3.5`, on average
  grid: power_of_two
  solver: optimal                     # reference: the paper's own iteration
  first_last: {{bits: 8, grid: fixed_point}}
  # layers: {{some_layer: {{bits: 8, grid: fixed_point}}, other_layer: {{skip: true}}}}
renorm:
  statistics: paired                  # to full precision's; measured: the images' own, as published
  # images: {renorm_images}                        # of calibration; the default
activations:
  bits: 8                             # codes 0..127, -127..127 with negative values; `levels: 255`: full byte
  scope: inputs                       # what quantized layers read; relu: the outputs of ReLUs, as published
  # images: {activation_images}
memory: 2GiB                          # bound on what is kept between two layers
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
    name = re.sub(r"[^\w.+-]+", "_", net.name or model.prototxt.stem).strip("_.+-") or "net"
    data = {"calibration": {"source": calibration}, "input_shape": shapes}
    config = Config.model_validate({"name": name, "model": model, "data": data, "output": f"out/{name}"})
    with closing(Given(config, net)) as given:
        count = len(given.source(calibration))
        keys = _geometry(given, calibration, told.get(blob), guesses)
        images = min(MOST_IMAGES, count - count // KEPT_SHARE)
        kept = f"{count - images} are kept for evaluate" if count > images else "none are left for evaluate"
        guesses.append(f"data.calibration.images {images} of {count}: {kept}")
        config = with_transform(config, TransformKeys.model_validate(keys))
        config, why = with_chosen_transform(given.with_config(config))
        grid_guesses = _better_grid(given.inference.net, given.model.weights)
    guesses.append(f"data.transform: {why}")
    guesses += grid_guesses
    shown = json.dumps({**keys, **_arithmetic(config.data.transform)}).replace('"', "")
    comment = "  # overrides of the prototxt's transform_param" if has_data_layer(net) else ""
    text = TEMPLATE.format(
        name=name,
        prototxt=_path(model.prototxt, folder),
        weights=_path(model.weights, folder),
        model=_more_of_the_model(model, folder),
        inputs=_inputs(others),
        shapes=f"\n  input_shape: {json.dumps(shapes)}" if shapes else "",
        calibration=_path(calibration, folder),
        images=images,
        kept=kept,
        renorm_images=RenormSettings().images,
        activation_images=ActivationSettings().images,
        transform=f"  transform: {shown}{comment}",
        output=json.dumps(f"out/{name}"),
    )
    return Initial(name, text, guesses)


def _geometry(given: Given, calibration: Path, shape: Shape | None, guesses: list[str]) -> dict[str, object]:
    """The keys of data.transform that say how large images become, as far as the prototxt does not."""
    keys: dict[str, object] = {}
    net, transform = given.net, effective_transform(given, TRAIN)
    if not has_data_layer(net) and transform.crop_size:
        keys["crop_size"] = transform.crop_size
        guesses.append(f"crop_size {transform.crop_size} from the shape of the input")
    elif not has_data_layer(net) and shape is not None:
        keys["resize"] = list(shape[1:])
        guesses.append(f"images are resized to {shape_text(shape[1:])}, the input's height and width")
    try:
        resized = resizing(given, calibration, transform)
    except InputError as error:
        guesses.append(f"nothing about the images' size before the crop, for {error}")
        return keys
    if resized is not None:
        guessed, how = resized
        keys |= {"resize": guessed.resize} if guessed.resize else {"resize_short": guessed.resize_short}
        guesses.append(how)
    return keys


def _better_grid(net: NetParameter, weights: Weights) -> list[str]:
    """What the weights at their nearest levels say about the grid, where another one is clearly better."""
    settings = WeightSettings()
    ratios: dict[str, list[float]] = {settings.grid: [], UNIFORM: []}
    layers = {layer.name: layer for layer in net.layer}
    for name in free_layers(net, settings):
        if name not in weights or not are_kernels(layers[name], weights[name][0].shape):
            continue  # the caffemodel does not fit the net: `quantize` says it
        kernels = to_kernels(layers[name], weights[name][0])
        some = kernels[:: max(1, len(kernels) // KERNELS_LOOKED_AT)]
        energy = float(np.square(some, dtype=np.float64).sum())
        for grid, found in ratios.items():
            ratio = decibels(energy, float(fit(some, make_grid(grid, settings.bits)).loss.sum()))
            found += [ratio] if ratio is not None else []
    if not all(ratios.values()):
        return []
    first, other = (median(found) for found in ratios.values())
    if other < first + CLEARLY_BETTER:
        return []
    return [
        f"weights.grid {settings.grid}, as published; {settings.bits}-bit weights have a median SQNR of "
        f"{first:.1f} dB on it, of {other:.1f} dB on {UNIFORM}: take that where products need not be shifts"
    ]


def _arithmetic(transform: TransformKeys) -> dict[str, object]:
    """The keys of data.transform that say what happens to the values of pixels."""
    if not ARITHMETIC & transform.model_fields_set:
        return {}
    mean = [float(f"{value:.7g}") for value in transform.mean_value or []]
    keys: dict[str, object] = {"mean_value": [int(value) if value.is_integer() else value for value in mean]}
    return keys if transform.scale == 1 else {**keys, "scale": float(f"{transform.scale:.7g}")}


def write_initial(
    model: ModelFiles, calibration: Path, path: Path | None, force: bool, shapes: GivenShapes = None
) -> tuple[Path, list[str]]:
    """Write the configuration to ``path`` (default: NAME.yaml here).

    Returns:
        Where it was written, and what was guessed.

    Raises:
        InputError: bad input, or the file is there and ``force`` is not set.
    """
    net = read_net(model.prototxt, model.caffe_proto, model.stages, model.level)
    folder = path.parent if path is not None else Path()
    initial = initial_config(net, model, calibration, folder, shapes)
    target = path if path is not None else Path(f"{initial.name}.yaml")
    if target.exists() and not force:
        raise InputError(f"{target}: there already; choose another --config or give --force")
    output = OutputFolder(target.parent)
    try:
        output.write(target.name, initial.yaml.encode())
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
