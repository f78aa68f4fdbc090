"""An exported file against what it was made from: how close its scores are, and how fast it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from quantize.arrays import FloatArray
from quantize.engines.exported import ExportedFile
from quantize.measure.closeness import Sums
from quantize.record import FileComparison

LEAST_SECONDS = 2.0
"""How long the two files take turns."""
LEAST_TURNS = 5


def compare_file(
    file: ExportedFile,
    full: ExportedFile,
    feeds: Mapping[str, FloatArray],
    scores: FloatArray,
    class_axis: int | None,
) -> FileComparison:
    """Run an exported file on some images.

    Args:
        file: opened with one output.
        full: the net in full precision, exported the same way.
        feeds: the images.
        scores: that output of the quantized net in labelfree's engine.
        class_axis: of the scores; None where they are no scores of classes.
    """
    sums = Sums(class_axis)
    sums.update(scores, file.run(feeds).blobs[file.outputs[0]])
    close = sums.closeness
    seconds, float_seconds = _taking_turns(file, full, feeds)
    images = len(next(iter(feeds.values())))
    return FileComparison(images, close.sqnr_db, close.agreement, seconds, float_seconds, file.kernels())


def _taking_turns(
    file: ExportedFile, full: ExportedFile, feeds: Mapping[str, FloatArray]
) -> tuple[float, float]:
    """Median seconds per image of the two."""
    one = {name: values[:1] for name, values in feeds.items()}
    works = [(each, each.taken(one)) for each in (file, full)]
    for each, taken in works:
        each.compute(taken)
    times: list[list[float]] = [[], []]
    start = time.perf_counter()
    while len(times[1]) < LEAST_TURNS or time.perf_counter() - start < LEAST_SECONDS:
        for (each, taken), found in zip(works, times, strict=True):
            begun = time.perf_counter()
            each.compute(taken)
            found.append(time.perf_counter() - begun)
    return statistics.median(times[0]), statistics.median(times[1])
