"""Short texts about a finished run, for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from quantize.config import Config
from quantize.evaluate import Evaluation

KILOBYTE = 1000


def summary(report: dict[str, Any], config: Config) -> str:
    """What was done, how long it took, what was written, and how to test it with Caffe."""
    stages = report["stages"]
    rows = [("stage", "layers", "result", "seconds", "peak MB")]
    rows += [
        (
            name,
            str(len(record["layers"])),
            _result(name, record["layers"]),
            f"{record['seconds']:.1f}",
            f"{record['peak_memory_bytes'] / KILOBYTE**2:.0f}",
        )
        for name, record in stages.items()
    ]
    sizes = report["sizes"]
    lines = [
        table(rows),
        "",
        f"size: {_size(sizes['model'])} as given, {_size(sizes['packed'])} packed "
        f"({sizes['model'] / sizes['packed']:.1f}x smaller)",
        "wrote: " + ", ".join(sorted({name for record in stages.values() for name in record["outputs"]})),
        f"   in: {config.output}",
    ]
    return "\n".join([*lines, *_caffe_test(report, config)])


def _result(stage: str, layers: Sequence[dict[str, Any]]) -> str:
    if not layers:
        return "nothing to do"
    if stage == "weights":
        return f"mean SQNR {_mean(layers, 'sqnr_db'):.1f} dB"
    if stage == "renorm":
        return f"mean shift {_mean(layers, 'mean_shift'):.3f} deviations"
    return f"mean SQNR {_mean(layers, 'sqnr_db'):.1f} dB, clipped {100 * _mean(layers, 'clipped'):.2f} %"


def _mean(layers: Sequence[dict[str, Any]], key: str) -> float:
    values = [layer[key] for layer in layers if layer[key] is not None]
    return fmean(values) if values else 0.0


def _caffe_test(report: dict[str, Any], config: Config) -> list[str]:
    """The `caffe test` command for what was written, where there is a validation LMDB."""
    from quantize.data.sources import open_source
    from quantize.pipeline import Files
    from quantize.prototxts import validation_lmdb

    if config.data.validation is None or validation_lmdb(config) is None:
        return []
    source = open_source(config.data.validation.source)
    images = len(source)
    source.close()
    files = Files.of(config.name)
    weights = files.renorm if "renorm" in report["stages"] else files.quantized
    command = [
        *("caffe", "test", "--model", str(config.output / files.val)),
        *("--weights", str(config.output / weights)),
        *("--iterations", str(max(1, images // config.data.validation.batch_size))),
    ]
    layer = " (with the ActQuantize layer in it; add --gpu 0 for a GPU)"
    return ["", f"accuracy under Caffe{layer}:", f"  {shlex.join(command)}"]


def evaluation_table(found: Evaluation) -> str:
    """Accuracy of both nets and their agreement."""
    rows = [("", "top-1", "top-5")]
    rows += [
        (name, _percent(accuracy["top1"]), _percent(accuracy["top5"]))
        for name, accuracy in found.accuracy.items()
    ]
    return f"{table(rows)}\nagreement {found.agreement:.2f} % of {found.images} images"


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
    return f"{size / KILOBYTE**2:.2f} MB"
