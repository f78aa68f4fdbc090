"""Short texts about a finished run, for the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from statistics import fmean, median

import click

from quantize.commands.terminal import is_wide
from quantize.job.output import Files
from quantize.record import (
    ActivationsRecord,
    AnyStageRecord,
    RenormRecord,
    RunRecord,
    WeightsRecord,
)
from quantize.settings import Config

KILOBYTE = 1000
RESULT_COLUMN = 2


def print_summary(record: RunRecord, config: Config, following: str) -> None:
    """Print what was done, how long it took, what was written, what is next and how to test it with Caffe.

    With colors and rules on a terminal, in plain lines on a narrow one, in aligned columns elsewhere.
    NO_COLOR is obeyed.

    Args:
        record: the content of report.json.
        config: the settings of the run.
        following: the command to run next.
    """
    rows = _stage_rows(record)
    if not is_wide(sys.stdout):
        plain = _stage_lines(rows) if sys.stdout.isatty() else table(rows)
        click.echo("\n".join([plain, *_below(record, config, following)]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = Table(title=Text(f"{record.name}: done"), title_justify="left")
    for place, heading in enumerate(rows[0]):
        shown.add_column(heading, justify="left" if place in (0, RESULT_COLUMN) else "right")
    for row in rows[1:]:
        shown.add_row(*map(Text, row))
    console.print(shown)
    console.print("\n".join(_below(record, config, following)), markup=False, highlight=False, soft_wrap=True)


def _stage_rows(record: RunRecord) -> list[tuple[str, ...]]:
    heading = ("stage", "layers", "result", "seconds", "peak MB")
    return [
        heading,
        *(
            (
                name,
                str(len(stage.layers)),
                _result(stage),
                f"{stage.seconds:.1f}",
                f"{stage.peak_memory_bytes / KILOBYTE**2:.0f}",
            )
            for name, stage in record.stages.done.items()
        ),
    ]


def _stage_lines(rows: Sequence[Sequence[str]]) -> str:
    """The rows as sentences, for a terminal with few columns."""
    return "\n".join(
        f"{stage}: {layers} layers, {result}, {seconds} s, {memory} MB at most"
        for stage, layers, result, seconds, memory in rows[1:]
    )


def _below(record: RunRecord, config: Config, following: str) -> list[str]:
    sizes = record.sizes
    page = config.output / "report.html"
    transform = record.transform
    doubt = [f"warning: {transform.finding}; {transform.remedy}"] if transform and transform.doubtful else []
    return [
        *(["", *doubt] if doubt else []),
        "",
        f"size: {size_text(sizes.model)} as given, {size_text(sizes.packed)} packed "
        f"({sizes.model / sizes.packed:.1f}x smaller)",
        f"wrote: {', '.join(sorted(record.outputs))}",
        f"   in: {config.output}",
        *([f" look: {page}"] if page.exists() else []),
        f" next: {following}",
        *_caffe_test(record, config),
    ]


def _result(stage: AnyStageRecord) -> str:
    if not stage.layers:
        return "nothing to do"
    match stage:
        case WeightsRecord():
            bits = f"mean {stage.budget.mean_bits:.2f} bits, " if stage.budget else ""
            return f"{bits}median SQNR {_median(layer.sqnr_db for layer in stage.layers):.1f} dB"
        case RenormRecord():
            return f"mean shift {fmean(layer.mean_shift for layer in stage.layers):.3f} deviations"
        case ActivationsRecord():
            sqnr = _median(layer.sqnr_db for layer in stage.layers)
            clipped = fmean(layer.clipped for layer in stage.layers)
            return f"median SQNR {sqnr:.1f} dB, clipped {100 * clipped:.2f} %"


def _median(values: Iterable[float | None]) -> float:
    """Of those that there are: one that is exact but for rounding has hundreds of dB."""
    return median([value for value in values if value is not None] or [0.0])


def _caffe_test(record: RunRecord, config: Config) -> list[str]:
    """The `caffe test` command for what was written, or what it would need."""
    test = record.caffe_test
    if test.iterations is None:
        return ["", f"accuracy under Caffe (`caffe test`) would need {test.needed}"]
    files = Files.of(config.name)
    weights = files.renorm if record.stages.renorm else files.quantized
    command = [
        *("caffe", "test", "--model", str(config.output / files.val)),
        *("--weights", str(config.output / weights)),
        *("--iterations", str(test.iterations)),
    ]
    layer = " (with the ActQuantize layer in it; add --gpu 0 for a GPU)"
    return ["", f"accuracy under Caffe{layer}:", f"  {shlex.join(command)}"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first row a heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def size_text(size: int) -> str:
    """Bytes in kB or MB of 1000."""
    return f"{size / KILOBYTE**2:.2f} MB" if size >= KILOBYTE**2 else f"{size / KILOBYTE:.1f} kB"
