"""The prototxts that go with quantized weights: one for ``caffe test``, one for deployment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from quantize.arrays import Shape
from quantize.caffenet import (
    TEST,
    InferenceNet,
    LayerParameter,
    NetParameter,
    empty_like,
    filter_net,
    infer_shapes,
    is_data_layer,
    is_measure,
    known_part,
)
from quantize.caffenet.norms import with_stored_statistics
from quantize.caffenet.schema import DataParameter
from quantize.caffenet.strings import from_path
from quantize.caffenet.traits import Trait, traits_of
from quantize.data.sources import LmdbSource
from quantize.job.feeds import effective_transform, resizing, to_proto
from quantize.job.given import Given
from quantize.job.inputs import image_input
from quantize.measure.outputs import net_outputs
from quantize.record import CaffeTest


class ImageScores(NamedTuple):
    """The blob with the class scores of an image, and how many; 0 where there are none or it is not known."""

    blob: str
    classes: int


def validation_prototxt(net: NetParameter, given: Given, scores: ImageScores) -> NetParameter:
    """The net with a TEST Data layer that reads the validation LMDB, for ``caffe test``.

    It takes the place of whatever makes the images in the TEST phase: a Data layer, or the Input layer of a
    deploy prototxt. A net without Accuracy layers then gets them, as far as its scores are one per class.
    Without a validation LMDB the net's own data layers stay as they are; so they do where the net has other
    inputs beside the images, which a Data layer could not feed.

    Args:
        net: the quantized net with all its phases.
        given: what the job started from.
        scores: of the net before it was quantized.
    """
    config, changed = given.config, with_stored_statistics(net)
    source = validation_lmdb(given)
    test = InferenceNet.of(changed)
    if source is None or len(test.inputs) > 1:
        return changed
    filtered = filter_net(changed, TEST)
    feeding = [layer for layer in filtered.layer if is_data_layer(layer)]
    images = next(layer for layer in feeding if test.blob in layer.top)
    label = _label_blob(filtered, images)
    name = images.name if Trait.IMAGES in traits_of(images) else _unused(test.net, "data")
    data = LayerParameter(name=name, type="Data")
    data.top.extend([test.blob, label])
    data.include.add().phase = TEST
    data.transform_param.CopyFrom(to_proto(effective_transform(given, TEST)))
    data.data_param.source = from_path(source)
    data.data_param.batch_size = config.data.validation.batch_size if config.data.validation else 1
    data.data_param.backend = DataParameter.LMDB
    replaced = [images, *(layer for layer in feeding if list(layer.top) == [label])]
    layers = [data if layer == images else layer for layer in changed.layer if layer not in replaced[1:]]
    del changed.layer[:]
    changed.layer.extend(layers)
    if not any(layer.type == "Accuracy" for layer in filtered.layer):
        changed.layer.extend(_accuracy(scores.blob, label, k) for k in (1, 5) if k <= scores.classes)
    return changed


def caffe_test(job: Given) -> CaffeTest:
    """Whether `caffe test` can run the `validation_prototxt` of a job, and if not, what it would need.

    Its Data layer reads labeled images from an LMDB and resizes nothing.
    """
    config = job.config
    others = [name for name in job.inference.inputs if name != image_input(job)]
    if others:
        return CaffeTest(None, f"a layer that feeds the input {others[0]}, which a Data layer does not")
    transform = effective_transform(job, TEST)
    data = config.data.validation
    given = data.source if data is not None and not data.inputs else None
    if data is not None and given is not None:
        source = job.source(given)
        if isinstance(source, LmdbSource) and not (transform.resize or transform.resize_short):
            return CaffeTest(max(1, len(source) // data.batch_size))
        transform, _ = resizing(job, given, transform) or (transform, "")
    option = f" --resize-short {transform.resize_short}" if transform.resize_short else ""
    if transform.resize:
        option = f" --resize {transform.resize[0]}x{transform.resize[1]}"
    images = f"the images of {given}" if given is not None else "labeled images"
    make = f"`labelfree make-lmdb {given or 'IMAGES'} LMDB{option}`, then `--validation LMDB`"
    return CaffeTest(None, f"{images} in an LMDB: {make}")


def _label_blob(net: NetParameter, images: LayerParameter) -> str:
    """The blob with the labels: made beside the images, or read by a loss or Accuracy, or a new one."""
    if len(images.top) == 2:
        return images.top[1]
    read = (layer.bottom[1] for layer in net.layer if is_measure(layer) and len(layer.bottom) > 1)
    return next(read, "label")


def image_scores(net: NetParameter, shapes: Mapping[str, Shape]) -> ImageScores:
    """The class scores of an image.

    Args:
        net: not quantized, with all its phases.
        shapes: by input the shape of one image's values, where it is known.
    """
    test = InferenceNet.of(net)
    one = {blob: (1, *shape) for blob, shape in shapes.items()}
    known = infer_shapes(known_part(test.net, one), one).blobs
    for output in net_outputs(net):
        shape = known.get(output.blob, ())
        axis = output.axis_of(shape)
        if output.is_main and axis is not None and math.prod(shape) == shape[axis]:
            return ImageScores(output.blob, shape[axis])
    return ImageScores("", 0)


def deploy_prototxt(net: NetParameter, shapes: Mapping[str, Shape]) -> NetParameter:
    """The TEST net with an Input layer for each input of one image, and without layers that need labels.

    Args:
        shapes: by input the shape of one image's values.
    """
    test = InferenceNet.of(with_stored_statistics(net))
    deploy = empty_like(net)
    for blob in test.inputs:
        data = deploy.layer.add(name=_unused(test.whole, blob), type="Input", top=[blob])
        data.input_param.shape.add().dim.extend([1, *shapes[blob]])
    for layer in test.whole.layer:
        deploy.layer.append(layer)
        del deploy.layer[-1].include[:]
        del deploy.layer[-1].exclude[:]
    return deploy


def validation_lmdb(given: Given) -> Path | None:
    """The absolute path of the validation LMDB; None where there is none, or not all comes from it."""
    validation = given.config.data.validation
    if validation is None or validation.source is None or validation.inputs:
        return None
    path = validation.source
    return Path(os.path.abspath(path)) if isinstance(given.source(path), LmdbSource) else None


def _unused(net: NetParameter, name: str) -> str:
    """``name``, made unlike those of all layers: the first layer of a name is the one that gets its blobs."""
    taken = {layer.name for layer in net.layer}
    while name in taken:
        name += "_"
    return name


def _accuracy(scores: str, label: str, top_k: int) -> LayerParameter:
    layer = LayerParameter(name=f"accuracy/top-{top_k}", type="Accuracy")
    layer.bottom.extend([scores, label])
    layer.top.append(layer.name)
    layer.include.add().phase = TEST
    layer.accuracy_param.top_k = top_k
    return layer
