"""`labelfree init`: a commented configuration for a network, with guesses that are said."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from quantize.caffenet import TRAIN, NetParameter, load_schema, load_weights, read_prototxt
from quantize.commands.config import load
from quantize.data.sources import Source, open_source
from quantize.errors import InputError
from quantize.job.feeds import effective_transform, guessed_short_side
from quantize.job.output import OutputFolder
from quantize.job.transforms import ARITHMETIC, has_data_layer, with_chosen_transform
from quantize.settings import Config, TransformKeys

USUAL_IMAGES = 1000
KEPT_SHARE = 5
"""One image in so many is kept back for evaluate."""

TEMPLATE = """\
# {name}: written by `labelfree init`. Paths are relative to this file; ~ and $VARS expand.
name: {name}                          # prefix of every output file
model:
  prototxt: {prototxt}
  weights: {weights}{schema}
data:
  calibration: {{source: {calibration}, images: {images}}}  # unlabeled; {kept}
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
  # images: 1000                      # of calibration; the default, or as many as there are
  augment: train                      # random crops and mirrors as in training; test: centre crops
  memory: 2GiB                        # bound on what the sweep keeps
activations:
  bits: 8                             # codes 0..127; `levels: 255` uses the full byte
  # images: 400
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
    name = re.sub(r"[^\w.+-]+", "_", net.name or prototxt.stem).strip("_.+-") or "net"
    options = {
        "name": name,
        "model.prototxt": str(prototxt),
        "model.weights": str(weights),
        "model.caffe_proto": str(caffe_proto) if caffe_proto else None,
        "data.calibration.source": str(calibration),
        "output": f"out/{name}",
    }
    config = load(None, options)
    source = open_source(calibration)
    try:
        count = len(source)
        keys = _geometry(net, config, source, guesses)
    finally:
        source.close()
    images = min(USUAL_IMAGES, count - count // KEPT_SHARE)
    if count < USUAL_IMAGES:
        guesses.append(f"{images} of {count} images are used, about {USUAL_IMAGES:,} are usual")
    kept = f"the other {count - images} are for evaluate" if count > images else "none are left for evaluate"
    guesses.append(f"data.calibration.images {images}: {kept}")
    config, why = with_chosen_transform(config, net, load_weights(weights, net))
    guesses.append(f"data.transform: {why}")
    shown = json.dumps({**keys, **_arithmetic(config.data.transform)}).replace('"', "")
    comment = "  # overrides of the prototxt's transform_param" if has_data_layer(net) else ""
    text = TEMPLATE.format(
        name=name,
        prototxt=_path(prototxt, folder),
        weights=_path(weights, folder),
        schema=f"\n  caffe_proto: {_path(caffe_proto, folder)}" if caffe_proto else "",
        calibration=_path(calibration, folder),
        images=images,
        kept=kept,
        transform=f"  transform: {shown}{comment}",
        output=json.dumps(f"out/{name}"),
    )
    return Initial(name, text, guesses)


def _geometry(net: NetParameter, config: Config, source: Source, guesses: list[str]) -> dict[str, object]:
    """The keys of data.transform that say how large images become, as far as the prototxt does not."""
    keys: dict[str, object] = {}
    transform = effective_transform(net, TRAIN, config)
    if not has_data_layer(net) and transform.crop_size:
        keys["crop_size"] = transform.crop_size
        guesses.append(f"crop_size {transform.crop_size} from the shape of the input")
    short = guessed_short_side(source, transform)
    if short is not None:
        keys["resize_short"] = short
        guesses.append(f"images are not all of the net's size: the shorter side is resized to {short}")
    return keys


def _arithmetic(transform: TransformKeys) -> dict[str, object]:
    """The keys of data.transform that say what happens to the values of pixels."""
    if not ARITHMETIC & transform.model_fields_set:
        return {}
    mean = [float(f"{value:.7g}") for value in transform.mean_value or []]
    keys: dict[str, object] = {"mean_value": [int(value) if value.is_integer() else value for value in mean]}
    return keys if transform.scale == 1 else {**keys, "scale": float(f"{transform.scale:.7g}")}


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
