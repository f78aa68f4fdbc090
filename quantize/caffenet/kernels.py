"""Weight blobs as matrices of kernels."""

from __future__ import annotations

import numpy as np

from quantize.arrays import FloatArray
from quantize.caffenet import LayerParameter


def outputs(layer: LayerParameter) -> int:
    """How many kernels a layer has, by its prototxt."""
    if layer.type == "InnerProduct":
        return layer.inner_product_param.num_output
    return layer.convolution_param.num_output


def to_kernels(layer: LayerParameter, blob: FloatArray) -> FloatArray:
    """A layer's weight blob as n kernels (output channels) by k weights."""
    if layer.type == "InnerProduct" and layer.inner_product_param.transpose:
        return np.ascontiguousarray(blob.reshape(-1, outputs(layer)).T)
    return blob.reshape(outputs(layer), -1)


def from_kernels(layer: LayerParameter, kernels: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The inverse of `to_kernels`."""
    transposed = layer.type == "InnerProduct" and layer.inner_product_param.transpose
    return np.ascontiguousarray(kernels.T if transposed else kernels, np.float32).reshape(shape)
