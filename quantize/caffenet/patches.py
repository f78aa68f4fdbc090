"""The columns that a layer's kernels are multiplied with: im2col patches, at all or at some places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import LayerParameter
from quantize.caffenet.shape_rules import Window, canonical_axis, convolution_window

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Patches:
    """How a layer sees its bottom: at every place of an image, G groups of k values give n outputs each.

    Attributes:
        groups: G.
        columns: k.
        places: outputs per channel and image.
        window: of a convolution over two axes; None: the layer is an InnerProduct.
        width: places per row of a convolution's output.
    """

    groups: int
    columns: int
    places: int
    window: Window | None
    width: int

    @classmethod
    def of(cls, layer: LayerParameter, bottom: Shape, top: Shape, kernels: Shape) -> Patches | None:
        """For a layer and the shapes of its bottom, top and weight blob; None where this is not provided for.

        Not provided for are convolutions over other than two axes or of several bottoms, and Deconvolution,
        whose outputs are sums over several places.
        """
        if layer.type == "InnerProduct":
            axis = canonical_axis(layer.inner_product_param.axis, bottom)
            return cls(1, math.prod(bottom[axis:]), math.prod(bottom[1:axis]), None, 1) if axis else None
        if layer.type == "Deconvolution":
            return None
        window = convolution_window(layer.convolution_param, bottom)
        if len(layer.bottom) != 1 or window.channel_axis != 1 or len(window.kernel) != 2:
            return None
        groups = bottom[1] // kernels[1]
        return cls(groups, math.prod(kernels[1:]), math.prod(top[2:]), window, top[3])

    def inputs(self, blob: FloatArray, at: Places) -> FloatArray:
        """The patches at ``at`` (images, p) of a bottom: shape (G, images * p, k), in Caffe's order."""
        if self.window is None:
            rows = blob.reshape(len(blob), self.places, self.columns)
            return np.take_along_axis(rows, at[:, :, None], axis=1).reshape(1, -1, self.columns)
        (top, left), (down, right) = self.window.pad, self.window.stride
        padded = np.pad(blob, ((0, 0), (0, 0), (top, top), (left, left)))
        high, wide = self.window.dilation
        windows = sliding_window_view(padded, tuple(self.window.extents()), axis=(2, 3))[..., ::high, ::wide]
        y, x = np.divmod(at, self.width)
        image = np.arange(len(blob))[:, None]
        taken = windows[image, :, y * down, x * right].reshape(-1, self.groups, self.columns)
        return np.ascontiguousarray(taken.swapaxes(0, 1))

    def outputs(self, blob: FloatArray, at: Places) -> FloatArray:
        """The values at ``at`` of a top: shape (G, images * p, n)."""
        if self.window is None:
            rows = blob.reshape(len(blob), self.places, -1)
        else:
            rows = blob.reshape(len(blob), -1, self.places).swapaxes(1, 2)
        taken = rows[np.arange(len(blob))[:, None], at].reshape(at.size, self.groups, -1)
        return np.ascontiguousarray(taken.swapaxes(0, 1))

    def sample(self, images: Sequence[int], per_image: int, seed: int) -> Places:
        """``per_image`` places (at most all) of each image, which depend on the seed and its number."""
        count = min(per_image, self.places)
        if count == self.places:
            return np.tile(np.arange(self.places), (len(images), 1))
        return np.stack(
            [np.random.default_rng([seed, i]).choice(self.places, count, replace=False) for i in images]
        )
