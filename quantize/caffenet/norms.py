"""The statistics that BatchNorm layers have stored, and those that cannot be meant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.caffenet.schema import NetParameter
from quantize.caffenet.weights import Weights

NORM_BLOBS = 3
NAMED = 5
"""So many layers are named in one line."""


def stored_statistics(blobs: Sequence[FloatArray]) -> tuple[Floats, Floats]:
    """Mean and variance (channels,) as ``BatchNormLayer::Forward_cpu`` computes with them.

    Args:
        blobs: both multiplied by the third one; where that is 0 Caffe takes them as 0.
    """
    mean, variance, factor = (np.asarray(blob, np.float64).reshape(-1) for blob in blobs)
    inverse = 1 / factor[0] if factor[0] else 0.0
    return mean * inverse, variance * inverse


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
    norms = {
        layer.name: weights[layer.name]
        for layer in net.layer
        if layer.type == "BatchNorm" and layer.name in weights and len(weights[layer.name]) == NORM_BLOBS
    }

    ignored, empty = [], []
    for name, (mean, variance, factor) in norms.items():
        if not factor.any() and (mean.any() or variance.any()):
            ignored.append(name)
        elif not variance.any():
            empty.append(name)
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
