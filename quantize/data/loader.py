"""The images of a pass through the net: read, decoded and transformed ahead of it by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from copy import copy
from dataclasses import dataclass
from itertools import islice

import numpy as np

from quantize.arrays import FloatArray
from quantize.data.sources import Selection, Source
from quantize.data.transform import ImageShape, Transform, shape_text
from quantize.errors import InputError
from quantize.host import available_threads, pool

AHEAD = 32
"""Images prepared ahead of the one being used, at least; always whole batches, and at least one."""
CHUNK = 8
"""Images a thread prepares at a time."""


@dataclass(frozen=True)
class _Batch:
    """A batch being filled."""

    images: FloatArray
    labels: list[int | None]
    parts: list[Future[None]]


class Images:
    """The first ``count`` images of a source, transformed.

    What image i becomes depends on the source, the transform, the phase and the seed alone: its random
    numbers come from ``np.random.default_rng([seed, i])``. Passes can be repeated, in any batches.

    Args:
        source: where the images are. Not closed here.
        transform: what happens to each.
        phase: TRAIN or TEST.
        count: how many of them; None: all.
        seed: of the random crops and mirrors.
        threads: that read, decode and transform; None: as `available_threads` says.

    Attributes:
        shape: (channels, height, width) of every image after the transform.

    Raises:
        InputError: fewer images than asked for, one of them is missing, or the first is unusable.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        phase: int,
        count: int | None = None,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        if count is not None and count < 1:
            raise InputError(f"{source.path}: {count} images asked for: ask for at least 1")
        if count is not None and count > len(source):
            raise InputError(
                f"{source.path}: {count} images asked for but it holds {len(source)}: ask for fewer"
            )
        if seed < 0:
            raise InputError(f"the seed is {seed}: it must be 0 or more")
        self.source = source
        self.transform = transform
        self.phase = phase
        self.seed = seed
        self.threads = threads or available_threads()
        self._count = len(source) if count is None else count
        source.check(range(self._count))
        self.shape: ImageShape = self._read(0)[0].shape

    def __len__(self) -> int:
        """Return the number of images of a pass."""
        return self._count

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[FloatArray, list[int | None]]]:
        """Images ``start <= i < stop`` in order, ``size`` at a time; the last batch may be smaller.

        Args:
            size: images per batch.
            start: the first image.
            stop: one behind the last; None, or more than there are: to the end.

        Yields:
            float32 array (n, channels, height, width) that is the caller's to keep, and each image's label,
            None where it has none.

        Raises:
            InputError: an image is missing, damaged or of another shape; names it. Images before it in
                other batches have come by then.
        """
        stop = self._count if stop is None else min(stop, self._count)
        executor = pool(self.threads, "labelfree-images")
        try:
            coming = (self._begin(executor, i, min(i + size, stop)) for i in range(start, stop, size))
            begun = deque(islice(coming, 1 + -(-AHEAD // size)))
            while begun:
                batch = begun.popleft()
                for part in batch.parts:
                    part.result()
                begun.extend(islice(coming, 1))
                yield batch.images, batch.labels
        finally:
            executor.shutdown(cancel_futures=True)

    def subset(self, numbers: Sequence[int]) -> Images:
        """Some of the images, by number; the random crop and mirror of each is that of its new number."""
        self.source.check(numbers)
        other = copy(self)  # they have the same shape, so that none need be read to know it
        other.source, other._count = Selection(self.source, numbers), len(numbers)
        return other

    def _begin(self, executor: Executor, start: int, stop: int) -> _Batch:
        batch = _Batch(np.empty((stop - start, *self.shape), np.float32), [None] * (stop - start), [])
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            batch.parts.append(executor.submit(self._fill, batch, start, first, last))
        return batch

    def _fill(self, batch: _Batch, start: int, first: int, last: int) -> None:
        """Prepare images ``first <= i < last`` of the batch that begins with image ``start``."""
        for index in range(first, last):
            _, batch.labels[index - start] = self._read(index, batch.images[index - start])

    def _read(self, index: int, out: FloatArray | None = None) -> tuple[FloatArray, int | None]:
        """Transform image ``index``, which must have the shape of ``out``."""
        image = self.source.read(index, self.transform.color)
        try:
            shape = self.transform.shape_of(image.pixels.shape)
            if out is not None and shape != out.shape:
                raise InputError(
                    f"it becomes {shape_text(shape)} but the first image {shape_text(out.shape)}:"
                    " set crop_size with resize_short, resize, or force_color"
                )
            rng = np.random.default_rng([self.seed, index])
            return self.transform(image.pixels, self.phase, rng, out), image.label
        except InputError as error:
            raise InputError(f"{self.source.path}: image {self.source.name(index)}: {error}") from error
