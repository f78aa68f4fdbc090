"""Caffe's file formats: nets as prototxt, weights as caffemodel, and what a net implies."""

from quantize.caffenet.phases import (
    check_net,
    data_blobs,
    filter_net,
    inference_net,
    is_data_layer,
    is_measure,
    scores_blob,
)
from quantize.caffenet.prototxt import format_prototxt, load_schema, read_prototxt
from quantize.caffenet.schema import (
    TEST,
    TRAIN,
    BlobProto,
    BlobShape,
    Datum,
    LayerParameter,
    NetParameter,
    NetState,
    NetStateRule,
    PoolingParameter,
    TransformationParameter,
)
from quantize.caffenet.shape_rules import LayerShapes, Shape
from quantize.caffenet.shapes import Shapes, all_finite, check_weights, infer_shapes, known_part
from quantize.caffenet.surgery import (
    insert_after,
    layer_index,
    live_blobs,
    needed_layers,
    remove_layer,
    replace_layer,
    single_assignment,
)
from quantize.caffenet.weights import Weights

__all__ = [
    "TEST",
    "TRAIN",
    "BlobProto",
    "BlobShape",
    "Datum",
    "LayerParameter",
    "LayerShapes",
    "NetParameter",
    "NetState",
    "NetStateRule",
    "PoolingParameter",
    "Shape",
    "Shapes",
    "TransformationParameter",
    "Weights",
    "all_finite",
    "check_net",
    "check_weights",
    "data_blobs",
    "filter_net",
    "format_prototxt",
    "infer_shapes",
    "inference_net",
    "insert_after",
    "is_data_layer",
    "is_measure",
    "known_part",
    "layer_index",
    "live_blobs",
    "load_schema",
    "needed_layers",
    "read_prototxt",
    "remove_layer",
    "replace_layer",
    "scores_blob",
    "single_assignment",
]
