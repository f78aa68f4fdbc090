"""`labelfree init`: a commented configuration for a network, with guesses that are said."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.caffenet import (
    TEST,
    TRAIN,
    InferenceNet,
    NetParameter,
    TransformationParameter,
    Weights,
    data_layer,
    declared_shape,
    load_schema,
    read_prototxt,
)
from quantize.data.sources import FileSource, open_source
from quantize.data.transform import Transform
from quantize.errors import InputError
from quantize.job.feeds import resized_before_crop
from quantize.job.output import OutputFolder

IMAGENET_MEAN = [104, 117, 123]
"""Blue, green, red: what most published Caffe networks subtract."""

TEMPLATE = """\
# {name}: written by `labelfree init`. Paths are relative to this file; ~ and $VARS expand.
name: {name}                          # prefix of every output file
model:
  prototxt: {prototxt}
  weights: {weights}{schema}
data:
  calibration: {{source: {calibration}, images: {images}}}  # unlabeled
  # validation: {{source: /path/to/labeled_lmdb, batch_size: 50}}    # for evaluate and `caffe test`
{transform}
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
    net: NetParameter,
    prototxt: Path,
    weights: Path,
    calibration: Path,
    folder: Path,
    caffe_proto: Path | None = None,
) -> Initial:
    """A configuration for a net.

    Args:
        net: the network in ``prototxt``.
        prototxt: its file.
        weights: its caffemodel.
        calibration: LMDB, image folder or list file.
        folder: where the YAML file will be; paths are written relative to it.
        caffe_proto: the schema of the fork of Caffe that the net is for, if any.

    Raises:
        InputError: the net or the images cannot be read.
    """
    guesses: list[str] = []
    source = open_source(calibration)
    count = len(source)
    files = isinstance(source, FileSource)
    source.close()
    name = re.sub(r"[^\w.+-]+", "_", net.name or prototxt.stem).strip("_.+-") or "net"
    images = min(1000, count)
    if count < 1000:
        guesses.append(f"renorm uses all {count} images; about 1,000 are usual")
    text = TEMPLATE.format(
        name=name,
        prototxt=_path(prototxt, folder),
        weights=_path(weights, folder),
        schema=f"\n  caffe_proto: {_path(caffe_proto, folder)}" if caffe_proto else "",
        calibration=_path(calibration, folder),
        images=images,
        activation_images=min(400, count),
        transform=_transform(net, prototxt.parent, files, guesses),
        output=json.dumps(f"out/{name}"),
    )
    return Initial(name, text, guesses)


def write_initial(
    prototxt: Path,
    weights: Path,
    calibration: Path,
    path: Path | None,
    force: bool,
    caffe_proto: Path | None = None,
) -> tuple[Path, list[str]]:
    """Write the configuration to ``path`` (default: NAME.yaml here).

    Returns:
        Where it was written, and what was guessed.

    Raises:
        InputError: bad input, or the file is there and ``force`` is not set.
    """
    net = read_prototxt(prototxt, load_schema(caffe_proto) if caffe_proto else None)
    Weights.read(weights)
    folder = path.parent if path is not None else Path()
    initial = initial_config(net, prototxt, weights, calibration, folder, caffe_proto)
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
    return json.dumps(str(shown), ensure_ascii=False)


def _transform(net: NetParameter, base: Path, files: bool, guesses: list[str]) -> str:
    layer = data_layer(net, TRAIN) or data_layer(net, TEST)
    keys: dict[str, object] = {}
    if layer is not None:
        guesses.append(f"the transform is that of the prototxt's layer {layer.name}")
        crop = layer.transform_param.crop_size
    else:
        shape = declared_shape(net, InferenceNet.of(net).blob)
        crop = shape[-1] if shape is not None and len(shape) == 3 else 0
        if crop:
            keys["crop_size"] = crop
            guesses.append(f"crop_size {crop} from the shape of the input")
        if shape is not None and shape[0] == len(IMAGENET_MEAN):
            keys["mean_value"] = IMAGENET_MEAN
            guesses.append(
                f"mean_value {IMAGENET_MEAN}, the usual one: check it against how the net was trained"
            )
    if files and crop:
        param = TransformationParameter() if layer is None else layer.transform_param
        try:
            guessed, how = resized_before_crop(replace(Transform.from_proto(param, base), crop_size=crop))
        except InputError as error:
            guesses.append(f"nothing about the images' size before the crop, for {error}")
        else:
            keys |= {"resize": guessed.resize} if guessed.resize else {"resize_short": guessed.resize_short}
            guesses.append(how)
    comment = "  # overrides of the prototxt's transform_param" if layer is not None else ""
    return f"  transform: {json.dumps(keys).replace(chr(34), '')}{comment}"
