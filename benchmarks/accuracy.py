"""Accuracy of the solvers over calibration subsets, as a Markdown table.

    python -m benchmarks.accuracy configs/digits.yaml --settings 4/127,2/127 --subsets 5

A setting is the bits of a weight and the largest code of an activation: 127 is the default, 15 what others
call 4 bits, 7 what the paper's implementation calls 4 bits.

Each subset is a random draw from the first images of the calibration source; everything is calibrated on it
alone. The validation images are only looked at to fill the table.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import click
import numpy as np

from quantize.caffenet.model import Model
from quantize.commands.config import load
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.job.feeds import calibration_feed, validation_feed
from quantize.job.given import Given
from quantize.measure.evaluate import evaluate
from quantize.measure.outputs import net_outputs
from quantize.record import Closeness
from quantize.settings import ActivationSettings, Config, RenormSettings, StatisticsName, WeightSettings
from quantize.stages.activations import activations_quan
from quantize.stages.data_aware import CalibrationSweep
from quantize.stages.renorm import renorm
from quantize.stages.weights import choices, weights_quan

SOLVERS = {
    "published": ("reference", "reference"),
    "optimal": ("optimal", "optimal"),
    "data_aware": ("data_aware", "optimal"),
}
"""Solvers of weights and activations by column; ``published`` is He & Cheng 2018 as its authors ran it."""


class Subject:
    """A net, its images and how it runs."""

    def __init__(self, config: Config, statistics: StatisticsName, pool: int, images: int | None) -> None:
        self.config = config
        self.statistics = statistics
        net = Given(config).net
        self.model = Model.of(net, config.model.weights, config.model.prototxt)
        self.calibration = calibration_feed(Given(config, net), pool)
        self.validation = validation_feed(Given(config, net), images)
        self.open_engine = engine_opener(config.engine, config.caffe, config.threads)

    def feed(self, numbers: list[int]) -> Feed:
        """Calibration images by number."""
        return self.calibration.subset(numbers)

    def quantized(
        self, solver: str, settings: tuple[WeightSettings, ActivationSettings], numbers: list[int]
    ) -> Model:
        """The model after the three stages, calibrated on some images."""
        weight_settings, activation_settings = settings
        feed = self.feed(numbers)
        of_weights, of_activations = SOLVERS[solver]
        chosen = choices(self.model.inference.net, weight_settings)
        memory = self.config.memory
        statistics: StatisticsName = "measured" if solver == "published" else self.statistics
        model, _ = weights_quan(
            self.model,
            chosen,
            of_weights,  # type: ignore[arg-type]
            calibration=CalibrationSweep(feed, self.open_engine, memory, statistics),
        )
        settings_of_renorm = RenormSettings(statistics=statistics)
        model, _ = renorm(model, feed, settings_of_renorm, self.open_engine, memory)
        scope = "relu" if solver == "published" else activation_settings.scope
        steps = activation_settings.model_copy(update={"solver": of_activations, "scope": scope})
        first = self.feed(numbers[: activation_settings.images])
        return activations_quan(model, first, steps, self.open_engine)[0]


def row(subject: Subject, setting: str, grid: str, subsets: int, count: int) -> str:
    """One line of the table: mean and standard deviation over the subsets."""
    bits, levels = map(int, setting.split("/"))
    general = subject.config.weights.model_dump() | {"bits": bits, "budget": None, "grid": grid, "layers": {}}
    settings = (
        WeightSettings.model_validate(general),
        subject.config.activations.model_copy(update={"levels": levels}),
    )
    total = len(subject.calibration)
    top1: dict[str, list[float]] = {name: [] for name in ("fp32", *SOLVERS)}
    close: dict[str, list[Closeness]] = {name: [] for name in SOLVERS}
    seconds = 0.0
    for number in range(subsets):
        drawn = np.random.default_rng([subject.config.data.seed, number]).permutation(total)
        numbers = drawn[:count].tolist()
        candidates = {"fp32": subject.model}
        for solver in SOLVERS:
            start = time.monotonic()
            candidates[solver] = subject.quantized(solver, settings, numbers)
            seconds += (time.monotonic() - start) / subsets if solver == "data_aware" else 0
        found = evaluate(candidates, net_outputs(subject.model.net), subject.validation, subject.open_engine)
        for name in top1:
            top1[name].append(found.accuracy[name].top1 or 0.0)
        for name in close:
            close[name].append(found.closeness[name])
    cells = [mean_and_spread(top1[name]) for name in SOLVERS]
    cells += [mean_and_spread([c.agreement or 0.0 for c in close[name]]) for name in SOLVERS]
    cells += [f"{np.mean([c.divergence or 0.0 for c in close[name]]):.4f}" for name in SOLVERS]
    fp32 = f"{np.mean(top1['fp32']):.2f}"
    return f"| {' | '.join([subject.config.name, grid, setting, fp32, *cells, f'{seconds:.0f} s'])} |"


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation, percent."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def checked_settings(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    """What ``--settings`` lists, such as 4/127."""
    settings = text.split(",")
    for setting in settings:
        if not re.fullmatch(r"\d/\d{1,3}", setting):
            raise click.BadParameter(f"{setting!r}: expected two numbers such as 4/127")
    return settings


@click.command(help=__doc__)
@click.argument("configs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--settings",
    default="4/127,3/127,2/127,4/15",
    show_default=True,
    callback=checked_settings,
    help="Bits of a weight / largest code of an activation.",
)
@click.option("--grids", default="power_of_two,uniform", show_default=True)
@click.option("--subsets", type=click.IntRange(1), default=5, show_default=True)
@click.option("--pool", type=click.IntRange(1), default=1000, help="Images that subsets are drawn from.")
@click.option("--count", type=click.IntRange(1), default=800, help="Images per subset.")
@click.option(
    "--statistics",
    type=click.Choice(["paired", "measured"]),
    default="paired",
    show_default=True,
    help="Of optimal and data_aware; published has its own.",
)
@click.option("--images", type=click.IntRange(1), help="Validation images (default: all).")
def main(
    configs: tuple[Path, ...],
    settings: list[str],
    grids: str,
    subsets: int,
    pool: int,
    count: int,
    statistics: StatisticsName,
    images: int | None,
) -> None:
    """Print the table."""
    top1 = " | ".join(f"{name}, top-1" for name in SOLVERS)
    agreement = " | ".join(f"{name}, agreement" for name in SOLVERS)
    divergence = " | ".join(f"{name}, KL" for name in SOLVERS)
    click.echo(f"| net | grid | bits/levels | fp32, top-1 | {top1} | {agreement} | {divergence} | time |")
    click.echo("| --- " * (5 + 3 * len(SOLVERS)) + "|")
    for path in configs:
        subject = Subject(load(path), statistics, pool, images)
        for grid in grids.split(","):
            for setting in settings:
                click.echo(row(subject, setting, grid, subsets, count))


if __name__ == "__main__":
    main()
