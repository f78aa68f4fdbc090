"""On which images a net is right, counted as Caffe counts them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Labels
from quantize.errors import InputError

Rights = npt.NDArray[np.bool_]


def right_top_k(scores: FloatArray, labels: Labels, k: int) -> Rights:
    """Whether an image's label is among the k best classes, as in Caffe's accuracy_layer.

    The label is right when fewer than k other classes have a score at least as large: ties count against it.

    Args:
        scores: (images, classes).
        labels: (images,).

    Raises:
        InputError: a label outside 0 .. classes - 1.
    """
    classes = scores.shape[1]
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        bad = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise InputError(
            f"data.validation: label {bad} does not fit the net's {classes} classes; check the labels"
        )
    own = np.take_along_axis(scores, labels[:, None].astype(np.intp), axis=1)
    right: Rights = (scores >= own).sum(axis=1) - 1 < k
    return right
