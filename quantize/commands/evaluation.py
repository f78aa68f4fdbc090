"""What `labelfree evaluate` prints: how close a quantized net is to full precision, and what that means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantize.commands.summary import table
from quantize.measure.plausible import doubt
from quantize.record import Accuracy, Closeness, Evaluation, OutputCloseness, Paired

CHANCE = 0.05
"""A difference that two equally good nets would have more often than this may be chance."""


def evaluation_json(evaluation: Evaluation) -> str:
    """One JSON object; figures in percent, divergence in nats, SQNR in decibels."""
    return json.dumps(
        {
            "images": evaluation.images,
            **{name: accuracy_json(each) for name, each in evaluation.accuracy.items()},
            "agreement": evaluation.agreement,
            "scores": evaluation.scores,
            "outputs": [asdict(output) for output in evaluation.outputs],
            "paired": {name: asdict(each) for name, each in evaluation.paired.items()},
            "missing": evaluation.missing,
        }
    )


def accuracy_json(accuracy: Accuracy) -> dict[str, Any]:
    """Percent; null without labels."""
    return {"top1": accuracy.top1, "top5": accuracy.top5, "top1_interval": accuracy.top1_interval}


def evaluation_text(evaluation: Evaluation) -> str:
    """A line for each net with what its class scores say, one for each other output, and what it means."""
    parts = []
    if evaluation.main is not None:
        parts.append(_classes_table(evaluation))
    others = [output for output in evaluation.outputs if output is not evaluation.main]
    if others:
        parts.append(_outputs_table(others))
    return "\n".join([*parts, *_meaning(evaluation)])


def _classes_table(evaluation: Evaluation) -> str:
    """Accuracy where there are labels, and closeness of the scores to full precision."""
    labeled = all(accuracy.top1 is not None for accuracy in evaluation.accuracy.values())
    rows = [("", *(("top-1", "top-5") if labeled else ()), "agreement", "KL divergence", "score SQNR")]
    for name, accuracy in evaluation.accuracy.items():
        tops = (_percent(accuracy.top1), _percent(accuracy.top5)) if labeled else ()
        rows.append((_title(name, evaluation), *tops, *_cells(evaluation.closeness.get(name))))
    return table(rows)


def _outputs_table(outputs: Sequence[OutputCloseness]) -> str:
    """Closeness to full precision of outputs that accuracy is not about."""
    rows = [("output", "net", "agreement", "KL divergence", "SQNR")]
    for output in outputs:
        for name, close in output.closeness.items():
            rows.append((output.blob, name.replace("_", " "), *_cells(close)))
    return table(rows)


def _title(name: str, evaluation: Evaluation) -> str:
    """A candidate as the table names it: an unfinished net says what it lacks."""
    lacking = ", ".join(f"no {stage}" for stage in evaluation.missing) if name == "quantized" else ""
    return f"{name.replace('_', ' ')} ({lacking})" if lacking else name.replace("_", " ")


def _cells(close: Closeness | None) -> tuple[str, str, str]:
    if close is None:
        return "-", "-", "-"
    return (
        "-" if close.agreement is None else f"{close.agreement:.2f} %",
        "-" if close.divergence is None else f"{close.divergence:.2g} nats",
        "-" if close.sqnr_db is None else f"{close.sqnr_db:.1f} dB",
    )


def _meaning(evaluation: Evaluation) -> list[str]:
    """What the figures say, in sentences; nothing of accuracy where there are no class scores."""
    lines = []
    if evaluation.missing:
        stages = " and ".join(evaluation.missing)
        verb = "have" if len(evaluation.missing) > 1 else "has"
        lines.append(
            f"not finished: {stages} {verb} not run, so these are not the figures of the final network; go "
            "on with `labelfree quantize --resume`"
        )
    main = evaluation.main
    if main is None or evaluation.agreement is None:
        several = any(output.classes for output in evaluation.outputs)
        why = "several outputs have class scores, and none is the main one" if several else "no class scores"
        lines.append(f"on {evaluation.images} images: {why}, so nothing is said about accuracy")
        return lines
    if evaluation.paired:
        return [*lines, *_labeled(evaluation, evaluation.agreement)]
    agreed = f"agreement {evaluation.agreement:.2f} %"
    if main.places != 1:
        lines.append(f"on {evaluation.images} images, at {main.places:,} places each: {agreed}")
        return lines
    presumed = f", if {main.blob} has class scores" if main.presumed else ""
    lines.append(
        f"on {evaluation.images} images without labels: {agreed}; top-1 accuracy can have changed by at most "
        f"{100 - evaluation.agreement:.2f} points on them{presumed}"
    )
    return lines


def _labeled(evaluation: Evaluation, agreement: float) -> list[str]:
    """What the labels say: the change of top-1, and what it is worth."""
    full, final, paired = (
        evaluation.accuracy["fp32"],
        evaluation.accuracy["quantized"],
        evaluation.paired["quantized"],
    )
    reason = doubt(full.top1, final.top1, agreement, evaluation.labeled, evaluation.classes)
    if reason:
        return [f"on {evaluation.images} images: agreement {agreement:.2f} %", f"warning: {reason}"]
    lost = (full.top1 or 0.0) - (final.top1 or 0.0)
    change = f"{abs(lost):.2f} points of top-1 {'lost' if lost > 0 else 'won'}" if lost else "no top-1 lost"
    low, high = final.top1_interval or (0.0, 100.0)
    return [
        f"on {evaluation.images} images: {change}, agreement {agreement:.2f} %",
        f"top-1 of the quantized network is {low:.2f} to {high:.2f} % with 95 % confidence",
        paired_text(paired, "full precision", "the quantized network"),
    ]


def paired_text(paired: Paired, first: str, second: str) -> str:
    """What two nets of some names do differently on the same images, and whether it may be chance."""
    if not paired.first_only + paired.second_only:
        return f"{first} and {second} are right on the same images"
    worth = "which may be chance" if paired.p_value > CHANCE else "hardly by chance"
    images = "image" if paired.first_only == 1 else "images"
    return (
        f"{first} alone is right on {paired.first_only} {images}, {second} alone on {paired.second_only}, "
        f"{worth} (McNemar, p = {paired.p_value:.2g})"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
