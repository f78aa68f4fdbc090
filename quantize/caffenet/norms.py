"""Layers that normalize with stored statistics: where they keep them, and statistics that cannot be meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.caffenet.schema import LayerParameter, NetParameter
from quantize.caffenet.weights import Weights

NAMED = 5
"""So many layers are named in one line."""
NORM_TYPES = ("BatchNorm", "BN", "CuDNNBatchNorm")
"""Layers that normalize; SegNet's BN has been made to rescale only."""
NVCAFFE_LEAST_EPS = 1e-5


@dataclass(frozen=True)
class NormPlaces:
    """The numbers of the blobs in which a layer keeps what it normalizes with.

    Attributes:
        mean, variance: of each channel.
        factor: one number, by which both are multiplied in the file; None: there is none.
        is_divided: whether the layer looks at the factor.
        affine: of each channel what the normalized values are multiplied by and what is then added, if any.
        blobs: how many the layer has.
    """

    mean: int
    variance: int
    factor: int | None
    is_divided: bool
    affine: tuple[int, int] | None
    blobs: int


CAFFE_PLACES = NormPlaces(0, 1, 2, True, None, 3)
"""Of Caffe's own BatchNorm."""
_NVCAFFE = NormPlaces(0, 1, 2, False, (3, 4), 5)
_BN = NormPlaces(2, 3, None, False, (0, 1), 4)


def norm_places(layer: LayerParameter) -> NormPlaces | None:
    """Where a layer keeps its statistics; None where it has none.

    - BatchNorm of Caffe: mean, variance, factor. NVCaffe's, where a scale and a bias follow, does not look at
      the third blob.
    - BN of yjxiong's Caffe and PSPNet, CuDNNBatchNorm of SENet's forks: scale, shift, mean, variance. With a
      bn_mode BN is SegNet's, which has no statistics.
    """
    if layer.type == "BatchNorm":
        return _NVCAFFE if has_scale_bias(layer) else CAFFE_PLACES
    if layer.type == "CuDNNBatchNorm" or (layer.type == "BN" and not layer.bn_param.HasField("bn_mode")):
        return _BN
    return None


def places_with_affine(blobs: int) -> NormPlaces | None:
    """Where those layers of forks keep things that have so many blobs, a scale and a shift among them."""
    return next((places for places in (_NVCAFFE, _BN) if places.blobs == blobs), None)


def places_of(layer: LayerParameter) -> NormPlaces:
    """`norm_places` of a layer that has statistics."""
    places = norm_places(layer)
    if places is None:
        raise ValueError(f"layer {layer.name!r} ({layer.type}) has no statistics")
    return places


def has_scale_bias(layer: LayerParameter) -> bool:
    """Whether a BatchNorm has a scale and a bias of its own, as NVCaffe's may."""
    param = layer.batch_norm_param
    return param.scale_bias or param.HasField("scale_filler") or param.HasField("bias_filler")


def is_learning(layer: LayerParameter) -> bool:
    """Whether a BN is one of SegNet that normalizes by the batch at hand."""
    param = layer.bn_param
    return layer.type == "BN" and param.HasField("bn_mode") and param.bn_mode == param.LEARN


def epsilon(layer: LayerParameter) -> float:
    """What a layer adds to the variance."""
    if layer.type == "BN":
        return layer.bn_param.eps
    if layer.HasField("cudnn_batch_norm_param"):
        return layer.cudnn_batch_norm_param.eps
    eps = layer.batch_norm_param.eps
    return max(eps, NVCAFFE_LEAST_EPS) if has_scale_bias(layer) else eps


def stored_statistics(
    blobs: Sequence[FloatArray], places: NormPlaces = CAFFE_PLACES
) -> tuple[Floats, Floats]:
    """Mean and variance, float64 (channels,), as Caffe computes with them (``Forward_cpu``).

    Args:
        blobs: the layer's; where the factor is 0 Caffe takes mean and variance as 0.
        places: where they are.
    """
    mean, variance = (_channels(blobs[place]) for place in (places.mean, places.variance))
    if places.factor is None or not places.is_divided:
        return mean, variance
    factor = _channels(blobs[places.factor])[0]
    inverse = 1 / factor if factor else 0.0
    return mean * inverse, variance * inverse


def scale_and_shift(layer: LayerParameter, blobs: Sequence[FloatArray]) -> tuple[Floats, Floats]:
    """a and b, float64 (channels,), of the y = a x + b that a layer of one of ``NORM_TYPES`` computes."""
    if layer.type == "BN" and norm_places(layer) is None:
        return _channels(blobs[0]), _channels(blobs[1])
    places = places_of(layer)
    mean, variance = stored_statistics(blobs, places)
    a = 1 / np.sqrt(variance + epsilon(layer))
    if places.affine is None:
        return a, -mean * a
    scale, shift = (_channels(blobs[place]) for place in places.affine)
    return scale * a, shift - scale * mean * a


def with_statistics(
    blobs: Sequence[FloatArray], places: NormPlaces, mean: Floats, variance: Floats
) -> list[FloatArray]:
    """A layer's blobs, float32, with other statistics (channels,) and, where it has one, the factor 1."""
    changed = list(blobs)
    for place, values in ((places.mean, mean), (places.variance, variance)):
        changed[place] = values.astype(np.float32).reshape(changed[place].shape)
    if places.factor is not None:
        changed[places.factor] = np.ones(1, np.float32)
    return changed


def _channels(blob: FloatArray) -> Floats:
    return np.asarray(blob, np.float64).reshape(-1)


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


def doubtful_norms(net: NetParameter, weights: Weights) -> list[str]:
    """What cannot be meant in the BatchNorms of an inference net, in lines that name the layers.

    Caffe computes with it all the same, and so does labelfree. A variance of 0 leaves sqrt(eps) to divide by,
    so what a layer puts out is some 300 times what it takes in.
    """
    ignored, empty = [], []
    for layer in net.layer:
        places = norm_places(layer)
        if places is None or layer.name not in weights or len(weights[layer.name]) != places.blobs:
            continue
        blobs = weights[layer.name]
        mean, variance = stored_statistics(blobs, places)
        if not (mean.any() or variance.any()) and (blobs[places.mean].any() or blobs[places.variance].any()):
            ignored.append(layer.name)
        elif not variance.any():
            empty.append(layer.name)
    faults = []
    if ignored:
        faults.append(
            f"BatchNorm {_listed(ignored)}: the third blob is 0, so Caffe ignores the mean and variance that "
            "are stored and takes both as 0; files of NVCaffe are like this: set that blob to 1, in pycaffe "
            "with net.params[layer][2].data[...] = 1"
        )
    if empty:
        faults.append(
            f"BatchNorm {_listed(empty)}: the stored variance is 0 in every channel; the layer was not "
            "trained, or its statistics were lost: check model.weights"
        )
    return faults


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
