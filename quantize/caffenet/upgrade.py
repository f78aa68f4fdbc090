"""Nets of older Caffes made nets of Caffe 1.0, as ``UpgradeNetAsNeeded`` does (``upgrade_proto.cpp``)."""

from __future__ import annotations

import re
from typing import Any

from quantize.caffenet.schema import LayerParameter, NetParameter, V1LayerParameter

_V1_TYPES = {
    "NONE": "",
    "ABSVAL": "AbsVal",
    "ACCURACY": "Accuracy",
    "ARGMAX": "ArgMax",
    "BNLL": "BNLL",
    "CONCAT": "Concat",
    "CONTRASTIVE_LOSS": "ContrastiveLoss",
    "CONVOLUTION": "Convolution",
    "DATA": "Data",
    "DECONVOLUTION": "Deconvolution",
    "DROPOUT": "Dropout",
    "DUMMY_DATA": "DummyData",
    "ELTWISE": "Eltwise",
    "EUCLIDEAN_LOSS": "EuclideanLoss",
    "EXP": "Exp",
    "FLATTEN": "Flatten",
    "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output",
    "HINGE_LOSS": "HingeLoss",
    "IM2COL": "Im2col",
    "IMAGE_DATA": "ImageData",
    "INFOGAIN_LOSS": "InfogainLoss",
    "INNER_PRODUCT": "InnerProduct",
    "LRN": "LRN",
    "MEMORY_DATA": "MemoryData",
    "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss",
    "MVN": "MVN",
    "POOLING": "Pooling",
    "POWER": "Power",
    "RELU": "ReLU",
    "SIGMOID": "Sigmoid",
    "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss",
    "SILENCE": "Silence",
    "SLICE": "Slice",
    "SOFTMAX": "Softmax",
    "SOFTMAX_LOSS": "SoftmaxWithLoss",
    "SPLIT": "Split",
    "TANH": "TanH",
    "THRESHOLD": "Threshold",
    "WINDOW_DATA": "WindowData",
}
"""``UpgradeV1LayerType``: the enum's names and the types that they became."""

_V1_PARAM_LISTS = {
    "param": "name",
    "blob_share_mode": "share_mode",
    "blobs_lr": "lr_mult",
    "weight_decay": "decay_mult",
}
"""V1's parallel lists over a layer's blobs, and the fields of ParamSpec that took their place."""

_ENGINE = re.compile("^(?:CuDNN|MKLDNN|MKL)")
"""What some forks put in front of a type's name to say who computes it."""
_DATA_PARAMS = ("data_param", "image_data_param", "window_data_param")
_TRANSFORM_FIELDS = ("scale", "mean_file", "crop_size", "mirror")


class UnsupportedLayerError(Exception):
    """The net has something that cannot be upgraded; the text says what and the remedy."""


def upgrade_net(net: NetParameter) -> None:
    """Upgrade a net in place: V1 layers, top-level inputs, BatchNorm's explicit parameters.

    Raises:
        UnsupportedLayerError: V0 layers, layers of two ages, or inputs whose dimensions do not add up.
    """
    _upgrade_v1_layers(net)
    _upgrade_inputs(net)
    for layer in net.layer:
        layer.type = _without_engine(layer.type)
        if layer.type == "BatchNorm" and len(layer.param) == 3:
            for param in layer.param:  # the statistics are not learned
                param.lr_mult = 0
                param.decay_mult = 0


def upgrade_v1_layer(old: V1LayerParameter, new: LayerParameter) -> None:
    """Fill an empty LayerParameter with what a V1 layer says (``UpgradeV1LayerParameter``).

    Raises:
        UnsupportedLayerError: the layer is V0 inside.
    """
    if old.HasField("layer"):
        raise UnsupportedLayerError(
            f"layer {old.layer.name!r} is of Caffe's first format (V0, 2013); upgrade the file with Caffe's "
            "upgrade_net_proto_text or upgrade_net_proto_binary"
        )
    _move_transform_fields(old)
    for field, value in old.ListFields():
        if field.name == "type":
            new.type = _V1_TYPES[V1LayerParameter.LayerType.Name(value)]
        elif field.name in _V1_PARAM_LISTS:
            for index, each in enumerate(value):
                while len(new.param) <= index:
                    new.param.add()
                setattr(new.param[index], _V1_PARAM_LISTS[field.name], each)
        else:
            _copy_field(new, field.name, value)


def _upgrade_v1_layers(net: NetParameter) -> None:
    if not net.layers:
        return
    if net.layer:
        raise UnsupportedLayerError(
            "the net has both old ('layers') and new ('layer') layers; rewrite the old ones"
        )
    for old in net.layers:
        upgrade_v1_layer(old, net.layer.add())
    net.ClearField("layers")


def _without_engine(type_name: str) -> str:
    """Convolution for CuDNNConvolution and the like: every Caffe that has the one has the other, too.

    CuDNNBatchNorm is a type of its own.
    """
    plain = _ENGINE.sub("", type_name)
    return plain if plain in _V1_TYPES.values() else type_name


def _move_transform_fields(old: V1LayerParameter) -> None:
    """``UpgradeNetDataTransformation``: scale, mean_file, crop_size and mirror move to transform_param."""
    for name in _DATA_PARAMS:
        if not old.HasField(name):
            continue
        data = getattr(old, name)
        for field in _TRANSFORM_FIELDS:
            if data.HasField(field):
                setattr(old.transform_param, field, getattr(data, field))
                data.ClearField(field)


def _copy_field(message: Any, name: str, value: Any) -> None:
    target = getattr(message, name)
    if hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    elif hasattr(target, "extend"):
        target.extend(value)
    else:
        setattr(message, name, value)


def _upgrade_inputs(net: NetParameter) -> None:
    """``UpgradeNetInput``: top-level inputs become one Input layer, which stands first."""
    if not net.input:
        return
    shapes = [list(shape.dim) for shape in net.input_shape]
    if not shapes:
        shapes = [list(net.input_dim[i : i + 4]) for i in range(0, len(net.input_dim), 4)]
    if shapes and (len(shapes) != len(net.input) or (not net.input_shape and len(net.input_dim) % 4)):
        raise UnsupportedLayerError(
            f"the net has {len(net.input)} 'input' but {len(net.input_shape)} 'input_shape' and "
            f"{len(net.input_dim)} 'input_dim'; give one input_shape, or four input_dim, for each"
        )
    if shapes:
        layer = net.layer.add()
        layer.name = "input"
        layer.type = "Input"
        layer.top.extend(net.input)
        for dims in shapes:
            layer.input_param.shape.add().dim.extend(dims)
        net.layer.insert(0, net.layer.pop())
    for field in ("input", "input_shape", "input_dim"):
        net.ClearField(field)
