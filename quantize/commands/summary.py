"""Short texts about a finished run, for the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from statistics import fmean, median

import click

from quantize.measure.plausible import doubt
from quantize.record import (
    ActivationsRecord,
    AnyStageRecord,
    Coverage,
    Evaluation,
    RenormRecord,
    RunRecord,
    WeightsRecord,
)
from quantize.settings import Config

KILOBYTE = 1000
RESULT_COLUMN = 2
MOST_REASONS = 5
"""Layers left in float that are named on the terminal."""


def print_summary(record: RunRecord, config: Config) -> None:
    """Print what was done, how long it took, what was written, and how to test it with Caffe.

    With colors and rules on a terminal, in plain aligned columns elsewhere. NO_COLOR is obeyed.
    """
    rows = _stage_rows(record)
    if not sys.stdout.isatty():
        click.echo("\n".join([table(rows), *_below(record, config)]))
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
    console.print("\n".join(_below(record, config)), markup=False, highlight=False, soft_wrap=True)


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


def _below(record: RunRecord, config: Config) -> list[str]:
    sizes = record.sizes
    page = config.output / "report.html"
    transform = record.transform
    doubt = [f"warning: {transform.finding}; {transform.remedy}"] if transform and transform.doubtful else []
    return [
        *(["", *doubt] if doubt else []),
        "",
        f"size: {_size(sizes.model)} as given, {_size(sizes.packed)} packed "
        f"({sizes.model / sizes.packed:.1f}x smaller)",
        *([coverage_text(record.coverage)] if record.coverage else []),
        f"wrote: {', '.join(sorted(record.outputs))}",
        f"   in: {config.output}",
        *([f" look: {page}"] if page.exists() else []),
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
            codes = " and ".join(sorted({layer.codes for layer in stage.layers}, reverse=True))
            return f"codes {codes}, median SQNR {sqnr:.1f} dB, clipped {100 * clipped:.2f} %"


def coverage_text(coverage: Coverage) -> str:
    """What share of the work is quantized, and why the rest is not."""
    lines = [
        f"quantized, of the multiply-accumulates: weights {100 * coverage.weights:.1f} %, inputs "
        f"{100 * coverage.inputs:.1f} %, both {100 * coverage.both:.1f} %"
    ]
    shown = list(coverage.in_float.items())[:MOST_REASONS]
    lines += [f"  in float: {name}: {reason}" for name, reason in shown]
    more = len(coverage.in_float) - len(shown)
    return "\n".join([*lines, *([f"  and {more} more, in report.json"] if more else [])])


def _median(values: Iterable[float | None]) -> float:
    """Of those that there are: one that is exact but for rounding has hundreds of dB."""
    return median([value for value in values if value is not None] or [0.0])


def _caffe_test(record: RunRecord, config: Config) -> list[str]:
    """The `caffe test` command for what was written, where there is a validation LMDB."""
    from quantize.data.sources import open_source
    from quantize.job.output import Files
    from quantize.job.prototxts import validation_lmdb

    lmdb = validation_lmdb(config)
    if config.data.validation is None or lmdb is None:
        return []
    source = open_source(lmdb)
    images = len(source)
    source.close()
    files = Files.of(config.name)
    weights = files.renorm if record.stages.renorm else files.quantized
    command = [
        *("caffe", "test", "--model", str(config.output / files.val)),
        *("--weights", str(config.output / weights)),
        *("--iterations", str(max(1, images // config.data.validation.batch_size))),
    ]
    layer = " (with the ActQuantize layer in it; add --gpu 0 for a GPU)"
    return ["", f"accuracy under Caffe{layer}:", f"  {shlex.join(command)}"]


def evaluation_table(found: Evaluation) -> str:
    """Accuracy where there are labels, closeness to full precision, and what that means."""
    labeled = all(accuracy.top1 is not None for accuracy in found.accuracy.values())
    rows = [("", *(("top-1", "top-5") if labeled else ()), "agreement", "KL divergence", "score SQNR")]
    for name, accuracy in found.accuracy.items():
        close = found.closeness.get(name)
        tops = (_percent(accuracy.top1), _percent(accuracy.top5)) if labeled else ()
        closeness = (
            ("-", "-", "-")
            if close is None
            else (
                f"{close.agreement:.2f} %",
                f"{close.divergence:.2g} nats",
                "-" if close.sqnr_db is None else f"{close.sqnr_db:.1f} dB",
            )
        )
        rows.append((name.replace("_", " "), *tops, *closeness))
    return f"{table(rows)}\n{_meaning(found, labeled)}"


def _meaning(found: Evaluation, labeled: bool) -> str:
    final = list(found.accuracy.values())[-1]
    if labeled:
        full = found.accuracy["fp32"]
        reason = doubt(full.top1, final.top1, found.agreement, found.images, found.classes)
        if reason:
            return f"on {found.images} images: agreement {found.agreement:.2f} %\nwarning: {reason}"
        lost = (full.top1 or 0.0) - (final.top1 or 0.0)
        change = (
            f"{abs(lost):.2f} points of top-1 {'lost' if lost > 0 else 'won'}" if lost else "no top-1 lost"
        )
        return f"on {found.images} images: {change}, agreement {found.agreement:.2f} %"
    return (
        f"on {found.images} images without labels: agreement {found.agreement:.2f} %; top-1 accuracy can "
        f"have changed by at most {100 - found.agreement:.2f} points on them"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first row a heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _size(size: int) -> str:
    return f"{size / KILOBYTE**2:.2f} MB" if size >= KILOBYTE**2 else f"{size / KILOBYTE:.1f} kB"
