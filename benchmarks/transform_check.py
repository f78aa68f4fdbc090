"""What the transform check says of the right transform and of usual mistakes, as a Markdown table.

    python -m benchmarks.transform_check configs/digits.yaml --draws 20

The transform of the configuration is taken to be the right one. Each draw is 64 of the calibration images,
chosen at random. The mistakes get a quarter of the draws: trying other transforms takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import numpy as np

from quantize.caffenet.model import Model
from quantize.commands.config import load
from quantize.data.feed import Feed
from quantize.data.loader import Images
from quantize.data.sources import Image, Selection
from quantize.engines import engine_opener
from quantize.job.feeds import calibration_feed, calibration_images
from quantize.job.given import Given
from quantize.job.transforms import has_data_layer
from quantize.measure.transform_check import IMAGES, Scaling, TransformCheck, check_transform


class Swapped(Selection):
    """Some images of a source with their channels in the opposite order."""

    def read(self, index: int, color: bool | None = None) -> Image:
        """Read one."""
        image = super().read(index, color)
        return replace(image, pixels=image.pixels[::-1])


def mistakes(right: Scaling) -> Iterator[tuple[str, Scaling]]:
    """The right transform and what is mistaken for it; ``swapped``: of images in the order RGB."""
    backwards = replace(right, mean=right.mean[::-1])
    found = [("right", right), ("no mean", replace(right, mean=()))]
    if backwards != right:
        found.append(("mean in RGB order", backwards))
    found += [(f"scale {name}", replace(right, scale=s)) for name, s in (("1", 1.0), ("1/255", 1 / 255))]
    found += [("neither", Scaling()), ("0..1", Scaling((), 1 / 255)), ("-1..1", Scaling((127.5,), 1 / 127.5))]
    if len(right.mean) > 1:
        found.append(("images in RGB order", replace(right, swapped=True)))
        found.append(("images and mean in RGB order", replace(backwards, swapped=True)))
    return ((name, values) for name, values in found if name == "right" or values != right)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--draws", type=click.IntRange(1), default=20, show_default=True)
@click.option("--images", "count", type=click.IntRange(1), default=IMAGES, show_default=True)
def main(config: Path, draws: int, count: int) -> None:
    """Print the table."""
    settings = load(config)
    net = Given(settings).net
    model = Model.of(net, settings.model.weights)
    given = Given(settings, net)
    feed = calibration_feed(given, calibration_images(given))
    (blob, images), *_ = feed.inputs.items()
    open_engine = engine_opener(settings.engine, settings.caffe, settings.threads)
    right = Scaling(images.transform.mean_value, images.transform.scale)
    rng = np.random.default_rng(0)
    drawn = [sorted(rng.choice(len(feed), min(count, len(feed)), replace=False)) for _ in range(draws)]

    def check(values: Scaling, numbers: list[int]) -> TransformCheck:
        source = (Swapped if values.swapped else Selection)(images.source, numbers)
        transform = replace(images.transform, mean_value=values.mean, mean_file=None, scale=values.scale)
        few = Images(source, transform, images.phase, None, images.seed, images.threads)
        own = [right] if has_data_layer(net) else []
        return check_transform(model, Feed({blob: few}), open_engine, own)

    print("| transform | mean shift | variance ratio | misfit | doubted | named |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in mistakes(right):
        found = [check(values, numbers) for numbers in drawn[: draws if name == "right" else -(-draws // 4)]]
        fits = [each.given for each in found if each.given is not None]
        misfits = [fit.misfit for fit in fits]
        named = sum(bool(each.better) and right_enough(each.better[0].values, right) for each in found)
        print(
            f"| {name} | {median(fit.mean_shift for fit in fits):.2g} "
            f"| {median(fit.variance_ratio for fit in fits):.3g} | {min(misfits):.2g} to {max(misfits):.2g} "
            f"| {sum(each.doubtful for each in found)} of {len(found)} | {named} |",
            flush=True,
        )


def right_enough(values: Scaling | None, right: Scaling) -> bool:
    """Whether a transform is the right one but for 2 levels of the mean and 4 % of the scale."""
    if values is None or values.swapped:
        return False
    off = np.abs(np.array(values.mean or (0.0,)) - np.array(right.mean or (0.0,)))
    return bool(off.max() <= 2) and abs(values.scale / right.scale - 1) <= 0.04


if __name__ == "__main__":
    main()
