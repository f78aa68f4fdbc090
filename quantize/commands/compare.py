"""`labelfree compare`: several results side by side, and what their settings have that differs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantize.commands.evaluation import accuracy_json, paired_text
from quantize.commands.summary import size_text, table
from quantize.errors import InputError
from quantize.job.store import read_record
from quantize.measure.accuracy import Rights
from quantize.measure.significance import mcnemar
from quantize.record import Accuracy, Closeness, Paired, RunRecord

LONGEST_VALUE = 48
PLACES = ("name", "output")
"""Settings that say where results lie: they always differ."""


@dataclass(frozen=True)
class Result:
    """An output folder and its report."""

    folder: Path
    record: RunRecord

    @property
    def accuracy(self) -> Accuracy | None:
        """Of the quantized net, where it has been evaluated."""
        evaluation = self.record.evaluation
        return evaluation.accuracy["quantized"] if evaluation is not None else None

    @property
    def closeness(self) -> Closeness | None:
        """Of the quantized net's class scores."""
        evaluation = self.record.evaluation
        return evaluation.closeness.get("quantized") if evaluation is not None else None

    @property
    def mean_bits(self) -> float | None:
        """Per quantized weight."""
        layers = self.record.stages.weights.layers if self.record.stages.weights is not None else []
        weights = sum(layer.weights for layer in layers)
        return sum(layer.weights * layer.bits for layer in layers) / weights if weights else None

    @property
    def sqnr_db(self) -> float | None:
        """The lowest of the outputs' ones."""
        outputs = self.record.evaluation.outputs if self.record.evaluation is not None else []
        values = [output.closeness["quantized"].sqnr_db for output in outputs]
        return min((value for value in values if value is not None), default=None)

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(stage.seconds for stage in self.record.stages.done.values())


def read_results(folders: Sequence[Path]) -> list[Result]:
    """The reports of at least two output folders.

    Raises:
        InputError: fewer, or a folder without a report of this version.
    """
    if len(folders) < 2:
        raise InputError("compare: give at least two output folders, as in `labelfree compare out/a out/b`")
    return [Result(folder, read_record(folder)) for folder in folders]


def compare_text(results: Sequence[Result]) -> str:
    """A column for each result: figures, then the settings that differ; and what the figures are worth."""
    names = _short_names([result.folder for result in results])
    figures = [("", *names), *_figures(results)]
    settings = [("setting", *names), *_settings(results)]
    parts = [table(figures), "" if len(settings) > 1 else "all settings are the same"]
    return "\n".join([*parts, *([table(settings)] if len(settings) > 1 else []), *_remarks(results, names)])


def compare_json(results: Sequence[Result]) -> str:
    """One JSON object: figures of each result, settings that differ, each result paired with the first."""
    pairs = [paired(results[0], other) for other in results[1:]]
    return json.dumps(
        {
            "results": [_figures_json(result) for result in results],
            "settings": dict(differing(results)),
            "paired": [asdict(pair) if pair is not None else None for pair in pairs],
        }
    )


def _figures_json(result: Result) -> dict[str, Any]:
    evaluation, close = result.record.evaluation, result.closeness
    return {
        "output": str(result.folder),
        "missing": result.record.stages.missing,
        "sizes": result.record.sizes.model_dump(),
        "mean_bits": result.mean_bits,
        "seconds": result.seconds,
        "images": evaluation.images if evaluation is not None else None,
        "fp32": accuracy_json(evaluation.accuracy["fp32"]) if evaluation is not None else None,
        "quantized": accuracy_json(evaluation.accuracy["quantized"]) if evaluation is not None else None,
        "agreement": close.agreement if close is not None else None,
        "divergence": close.divergence if close is not None else None,
        "sqnr_db": result.sqnr_db,
    }


def _figures(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """Rows of the first table; those that no result has are left out."""
    closeness = [result.closeness for result in results]
    accuracies = [result.accuracy for result in results]
    evaluations = [result.record.evaluation for result in results]
    full = [each.accuracy["fp32"].top1 if each else None for each in evaluations]
    sizes = [result.record.sizes for result in results]
    lacking = [", ".join(f"no {stage}" for stage in result.record.stages.missing) for result in results]
    rows = (
        ("unfinished", [text or None for text in lacking]),
        ("packed", [f"{size_text(size.packed)} ({size.model / size.packed:.1f}x smaller)" for size in sizes]),
        ("bits per weight", _texts("{:.2f}", [result.mean_bits for result in results])),
        ("full precision top-1", _texts("{:.2f} %", full)),
        ("top-1", _texts("{:.2f} %", [each.top1 if each else None for each in accuracies])),
        ("   95 % confidence", [_interval(each) for each in accuracies]),
        ("top-5", _texts("{:.2f} %", [each.top5 if each else None for each in accuracies])),
        ("agreement", _texts("{:.2f} %", [close.agreement if close else None for close in closeness])),
        (
            "KL divergence",
            _texts("{:.2g} nats", [close.divergence if close else None for close in closeness]),
        ),
        ("lowest output SQNR", _texts("{:.1f} dB", [result.sqnr_db for result in results])),
        ("on images", _texts("{:,}", [each.images if each else None for each in evaluations])),
        ("seconds", [f"{result.seconds:.1f}" for result in results]),
    )
    for title, cells in rows:
        if any(cell is not None for cell in cells):
            yield title, *("-" if cell is None else cell for cell in cells)


def _texts(form: str, values: Sequence[float | None]) -> list[str | None]:
    return [None if value is None else form.format(value) for value in values]


def _interval(accuracy: Accuracy | None) -> str | None:
    if accuracy is None or accuracy.top1_interval is None:
        return None
    low, high = accuracy.top1_interval
    return f"{low:.2f} - {high:.2f}"


def differing(results: Sequence[Result]) -> Iterator[tuple[str, list[Any]]]:
    """Keys of settings that are not the same everywhere, and their values; None where one is not there."""
    flat = [dict(_flat(result.record.settings.model_dump(mode="json"))) for result in results]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [settings.get(key) for settings in flat]
        if key not in PLACES and any(value != values[0] for value in values):
            yield key, values


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settings(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """Rows of the second table."""
    for key, values in differing(results):
        texts = ("-" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values)
        yield key, *(t if len(t) <= LONGEST_VALUE else f"...{t[3 - LONGEST_VALUE :]}" for t in texts)


def _remarks(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """What the figures leave open: other models, no evaluation, and differences that may be chance."""
    lines = []
    first = results[0]
    for result, name in zip(results, names, strict=True):
        if result.record.inputs != first.record.inputs:
            lines.append(f"note: {name} was made from another model than {names[0]}")
        if result.record.evaluation is None:
            lines.append(f"note: {name} has not been evaluated; `labelfree evaluate` does it")
        if result is first or result.accuracy is None or result.accuracy.top1 is None:
            continue
        pair = paired(first, result)
        if pair is not None:
            lines.append(f"top-1: {paired_text(pair, names[0], name)}")
        elif first.record.evaluation is not None:
            lines.append(f"note: {name} was not evaluated on the same images as {names[0]}")
    return ["", *lines] if lines else []


def paired(first: Result, second: Result) -> Paired | None:
    """Where two quantized nets are right on the same images; None where they were not evaluated on the same.

    These are the same where their labels are, and full precision is right on the same of them.
    """
    before, now = first.record.evaluation, second.record.evaluation
    if before is None or now is None or before.labels_hash is None:
        return None
    same = (before.images, before.labels_hash, before.accuracy["fp32"].right)
    if same != (now.images, now.labels_hash, now.accuracy["fp32"].right):
        return None
    one, other = _rights(first.accuracy, before.labeled), _rights(second.accuracy, now.labeled)
    first_only, second_only = int((one & ~other).sum()), int((other & ~one).sum())
    return Paired(first_only, second_only, mcnemar(first_only, second_only))


def _rights(accuracy: Accuracy | None, labeled: int) -> Rights:
    packed = base64.b64decode((accuracy.right if accuracy is not None else None) or "")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=labeled)
    return bits.astype(np.bool_)


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The folders without what all have in common before the last part."""
    parts = [folder.absolute().parts for folder in folders]
    common = 0
    while len({each[: common + 1] for each in parts}) == 1 and all(len(each) > common + 1 for each in parts):
        common += 1
    return ["/".join(each[common:]) for each in parts]
