"""Images and the input blob that they go into."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.data.loader import Images
from quantize.data.sources import Selection


@dataclass(frozen=True)
class Feed:
    """Images and the input blob that they go into."""

    blob: str
    images: Images


def thinned(feed: Feed, count: int) -> Feed:
    """At most ``count`` of a feed's images, spread evenly over them: neighbours often show the same class."""
    images, total = feed.images, len(feed.images)
    count = min(count, total)
    few = Selection(images.source, [total * number // count for number in range(count)])
    return Feed(feed.blob, Images(few, images.transform, images.phase, None, images.seed, images.threads))
