"""The prototxts that go with quantized weights: one for ``caffe test``, one for deployment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quantize.caffenet import TEST, LayerParameter, NetParameter
from quantize.caffenet.schema import DataParameter
from quantize.config import Config
from quantize.data.sources import LmdbSource, open_source
from quantize.feeds import InferenceNet, data_layer, effective_transform, to_proto


def validation_prototxt(net: NetParameter, config: Config) -> NetParameter:
    """The net with a TEST Data layer that reads the validation LMDB, for ``caffe test``.

    A net without Data layers (a deploy prototxt) gets one, in the place of its Input layers, and Accuracy
    layers where it has none. Without a validation LMDB the net's own data layers stay as they are.
    """
    changed = NetParameter()
    changed.CopyFrom(net)
    source = validation_lmdb(config)
    if source is None:
        return changed
    test = InferenceNet.of(net)
    existing = data_layer(net, TEST)
    data = LayerParameter(name=existing.name if existing else test.blob, type="Data")
    data.top.extend(existing.top if existing else [test.blob, "label"])
    data.include.add().phase = TEST
    data.transform_param.CopyFrom(to_proto(effective_transform(net, TEST, config)))
    data.data_param.source = str(source)
    data.data_param.batch_size = config.data.validation.batch_size if config.data.validation else 1
    data.data_param.backend = DataParameter.LMDB
    if existing is not None:
        place = next(i for i, layer in enumerate(changed.layer) if layer == existing)
        changed.layer[place].CopyFrom(data)
        return changed
    kept = [layer for layer in changed.layer if layer.type != "Input"]
    del changed.layer[:]
    changed.layer.append(data)
    changed.layer.extend(kept)
    if not any(layer.type == "Accuracy" for layer in kept):
        changed.layer.extend(_accuracy(test.scores, k) for k in (1, 5))
    return changed


def deploy_prototxt(net: NetParameter, shape: Sequence[int] | None) -> NetParameter:
    """The TEST net with an Input layer for one image and without layers that need labels.

    Args:
        shape: (channels, height, width) of an image; None where it is not known: the net's own data
            layers' tops then have no shape and the Input layer declares none.
    """
    test = InferenceNet.of(net)
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


def _accuracy(scores: str, top_k: int) -> LayerParameter:
    layer = LayerParameter(name=f"accuracy/top-{top_k}", type="Accuracy")
    layer.bottom.extend([scores, "label"])
    layer.top.append(layer.name)
    layer.include.add().phase = TEST
    layer.accuracy_param.top_k = top_k
    return layer
