"""The prototxts that go with quantized weights: one for ``caffe test``, one for deployment."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from quantize.caffenet import (
    TEST,
    TRANSFORMING_TYPES,
    InferenceNet,
    LayerParameter,
    NetParameter,
    filter_net,
    infer_shapes,
    is_data_layer,
    is_measure,
    known_part,
)
from quantize.caffenet.schema import DataParameter
from quantize.data.sources import LmdbSource, open_source
from quantize.job.feeds import effective_transform, to_proto
from quantize.settings import Config


def validation_prototxt(net: NetParameter, config: Config, shape: Sequence[int] | None) -> NetParameter:
    """The net with a TEST Data layer that reads the validation LMDB, for ``caffe test``.

    It takes the place of whatever makes the images in the TEST phase: a Data layer, or the Input layer of a
    deploy prototxt. A net without Accuracy layers then gets them, as far as its scores are one per class.
    Without a validation LMDB the net's own data layers stay as they are.

    Args:
        net: the net with all its phases.
        config: the settings.
        shape: (channels, height, width) of an image; None where it is not known.
    """
    changed = with_stored_statistics(net)
    source = validation_lmdb(config)
    if source is None:
        return changed
    filtered = filter_net(changed, TEST)
    test = InferenceNet.of(changed)
    feeding = [layer for layer in filtered.layer if is_data_layer(layer)]
    images = next(layer for layer in feeding if test.blob in layer.top)
    label = _label_blob(filtered, images)
    data = LayerParameter(name=images.name if images.type in TRANSFORMING_TYPES else "data", type="Data")
    data.top.extend([test.blob, label])
    data.include.add().phase = TEST
    data.transform_param.CopyFrom(to_proto(effective_transform(net, TEST, config)))
    data.data_param.source = str(source)
    data.data_param.batch_size = config.data.validation.batch_size if config.data.validation else 1
    data.data_param.backend = DataParameter.LMDB
    replaced = [images, *(layer for layer in feeding if list(layer.top) == [label])]
    layers = [data if layer == images else layer for layer in changed.layer if layer not in replaced[1:]]
    del changed.layer[:]
    changed.layer.extend(layers)
    if not any(layer.type == "Accuracy" for layer in filtered.layer):
        found = classes(test, shape)
        changed.layer.extend(_accuracy(test.scores, label, k) for k in (1, 5) if k <= found)
    return changed


def with_stored_statistics(net: NetParameter) -> NetParameter:
    """A copy whose BatchNorms use their stored statistics in the TEST phase, whatever the given net says.

    ``use_global_stats: false`` there would make Caffe normalise by each batch and ignore what renorm found.
    """
    changed = NetParameter()
    changed.CopyFrom(net)
    for layer in changed.layer:
        if layer.type == "BatchNorm" and not layer.batch_norm_param.use_global_stats:
            layer.batch_norm_param.ClearField("use_global_stats")
    return changed


def _label_blob(net: NetParameter, images: LayerParameter) -> str:
    """The blob with the labels: made beside the images, or read by a loss or Accuracy, or a new one."""
    if len(images.top) == 2:
        return images.top[1]
    read = (layer.bottom[1] for layer in net.layer if is_measure(layer) and len(layer.bottom) > 1)
    return next(read, "label")


def classes(test: InferenceNet, shape: Sequence[int] | None) -> int:
    """The number of class scores of an image; 0 where there is no such number or it is not known."""
    if shape is None:
        return 0
    shapes = infer_shapes(known_part(test.net, [test.blob]), {test.blob: (1, *shape)})
    batch, *scores = shapes.blobs.get(test.scores, (1,))
    return scores[0] if batch == 1 and scores[:1] and math.prod(scores) == scores[0] else 0


def deploy_prototxt(net: NetParameter, shape: Sequence[int] | None) -> NetParameter:
    """The TEST net with an Input layer for one image and without layers that need labels.

    Args:
        shape: (channels, height, width) of an image; None where it is not known: the net's own data
            layers' tops then have no shape and the Input layer declares none.
    """
    test = InferenceNet.of(with_stored_statistics(net))
    deploy = NetParameter(name=net.name)
    data = LayerParameter(name=test.blob, type="Input")
    data.top.append(test.blob)
    if shape is not None:
        data.input_param.shape.add().dim.extend([1, *shape])
    deploy.layer.append(data)
    for layer in test.net.layer:
        deploy.layer.append(layer)
        del deploy.layer[-1].include[:]
        del deploy.layer[-1].exclude[:]
    return deploy


def validation_lmdb(config: Config) -> Path | None:
    """The absolute path of the validation LMDB; None where there is none."""
    if config.data.validation is None:
        return None
    path = config.data.validation.source
    source = open_source(path)
    try:
        return Path(os.path.abspath(path)) if isinstance(source, LmdbSource) else None
    finally:
        source.close()


def _accuracy(scores: str, label: str, top_k: int) -> LayerParameter:
    layer = LayerParameter(name=f"accuracy/top-{top_k}", type="Accuracy")
    layer.bottom.extend([scores, label])
    layer.top.append(layer.name)
    layer.include.add().phase = TEST
    layer.accuracy_param.top_k = top_k
    return layer
