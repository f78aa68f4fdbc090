"""What a net is fed with, micro-batch by micro-batch: values for each of its inputs, and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from quantize.arrays import FloatArray, Shape


@runtime_checkable
class Input(Protocol):
    """What goes into one input of a net: an array's rows, the images of a folder, or anything else with this.

    Passes can be repeated, in any batches, and give the same each time.
    """

    @property
    def shape(self) -> Shape:
        """Of one image's values, without the batch axis."""

    def __len__(self) -> int:
        """Return the number of images."""

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[FloatArray, list[int | None] | None]]:
        """Images ``start <= i < stop`` in order, ``size`` at a time; the label of each, or None for all."""

    def subset(self, numbers: Sequence[int]) -> Input:
        """Some of the images, by number."""


@dataclass(frozen=True)
class Batch:
    """What goes through a net together.

    Attributes:
        feeds: by input blob a C-contiguous float32 array, a row for each image.
        labels: each image's, None where it has none.
    """

    feeds: dict[str, FloatArray]
    labels: list[int | None]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(next(iter(self.feeds.values())))


@dataclass(frozen=True)
class Feed:
    """The values of all inputs of a net, image by image.

    Attributes:
        inputs: by input blob what goes into it: values for as many images, or a constant for all.
        seed: of what is chosen at random of each image.
        labeled: whether the labels that the inputs have count.
    """

    inputs: Mapping[str, Input]
    seed: int = 0
    labeled: bool = True

    @property
    def shapes(self) -> dict[str, Shape]:
        """By input blob the shape of one image's values, without the batch axis."""
        return {blob: values.shape for blob, values in self.inputs.items()}

    def __len__(self) -> int:
        """Return the number of images."""
        return min(map(len, self.inputs.values()))

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Images ``start <= i < stop`` in order, ``size`` at a time; the last batch may be smaller.

        Args:
            size: images per batch.
            start: the first image.
            stop: one behind the last; None, or more than there are: to the end.

        Raises:
            InputError: an image is missing, damaged or of another shape; names it.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        streams = [values.batches(size, start, stop) for values in self.inputs.values()]
        for parts in zip(*streams, strict=True):
            feeds = {blob: array for blob, (array, _) in zip(self.inputs, parts, strict=True)}
            unlabeled: list[int | None] = [None] * len(parts[0][0])
            given = (labels for _, labels in parts if labels is not None and self.labeled)
            yield Batch(feeds, next(given, unlabeled))

    def subset(self, numbers: Sequence[int]) -> Feed:
        """Some of the images, by number."""
        return replace(self, inputs={blob: values.subset(numbers) for blob, values in self.inputs.items()})

    def unlabeled(self) -> Feed:
        """The same without labels."""
        return replace(self, labeled=False)


def thinned(feed: Feed, count: int) -> Feed:
    """At most ``count`` of a feed's images, spread evenly over them: neighbours often show the same class."""
    count = min(count, len(feed))
    return feed.subset([len(feed) * number // count for number in range(count)])
