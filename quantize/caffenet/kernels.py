"""Weight blobs as matrices of kernels."""

from __future__ import annotations

import math

import numpy as np

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import LayerParameter


def outputs(layer: LayerParameter) -> int:
    """How many kernels a layer has, by its prototxt."""
    if layer.type == "InnerProduct":
        return layer.inner_product_param.num_output
    return layer.convolution_param.num_output


def are_kernels(layer: LayerParameter, shape: Shape) -> bool:
    """Whether a weight blob of this shape can be parted into the layer's kernels."""
    n, size = outputs(layer), math.prod(shape)
    if layer.type != "Deconvolution":
        return n > 0 and size > 0 and size % n == 0
    groups = layer.convolution_param.group
    in_groups = groups > 0 and n % groups == 0 and len(shape) > 1 and shape[0] % groups == 0
    return n > 0 and size > 0 and in_groups and shape[1] == n // groups


def to_kernels(layer: LayerParameter, blob: FloatArray) -> FloatArray:
    """A layer's weight blob as n kernels (output channels) by k weights."""
    if layer.type == "InnerProduct" and layer.inner_product_param.transpose:
        return np.ascontiguousarray(blob.reshape(-1, outputs(layer)).T)
    if layer.type == "Deconvolution":
        grouped = blob.reshape(_deconvolution_axes(layer, blob.shape))
        return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(outputs(layer), -1)
    return blob.reshape(outputs(layer), -1)


def from_kernels(layer: LayerParameter, kernels: FloatArray, shape: Shape) -> FloatArray:
    """The inverse of `to_kernels`."""
    if layer.type == "Deconvolution":
        groups, inputs, n, taps = _deconvolution_axes(layer, shape)
        kernels = kernels.reshape(groups, n, inputs, taps).swapaxes(1, 2)
    elif layer.type == "InnerProduct" and layer.inner_product_param.transpose:
        kernels = kernels.T
    return np.ascontiguousarray(kernels, np.float32).reshape(shape)


def _deconvolution_axes(layer: LayerParameter, shape: Shape) -> tuple[int, int, int, int]:
    """Groups, inputs and outputs of each, and places of a kernel: the blob is (C, n / groups, ...)."""
    groups = layer.convolution_param.group
    return groups, shape[0] // groups, outputs(layer) // groups, math.prod(shape[2:])
