"""What to do next, drawn from the numbers of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from quantize.measure.plausible import doubt
from quantize.record import RunRecord
from quantize.report.facts import NormPlot, Row
from quantize.settings import GRID_BITS

ENOUGH_IMAGES = {"paired": 16, "measured": 500}
ENOUGH_VALUES = {"paired": 64, "measured": 1000}
"""Per channel: the relative error of a variance from m values is about sqrt(2 / m), 4.5 % at 1,000. Most of
it cancels in paired statistics."""
USUAL_IMAGES = {"paired": 64, "measured": 1000}
STANDS_OUT_DB = 2.0
"""So far below the median layer, 1.6 times its error, a layer is worth a finer grid."""
OVERRIDE = {"bits": 8, "grid": "fixed_point"}
MUCH_CLIPPED = 0.01
LOW_AGREEMENT = 97.0
MUCH_MOVED = 2.0
"""A variance that changed by this factor."""


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        level: ``warning``, ``note``, ``good`` or ``next``.
        finding: what was seen.
        remedy: what to do about it, may be empty.
        code: lines to copy, may be empty.
    """

    level: str
    finding: str
    remedy: str = ""
    code: str = ""


def advise(record: RunRecord, rows: Sequence[Row], norms: Sequence[NormPlot]) -> list[Advice]:
    """Everything worth saying about a run, the most important first."""
    advice = [
        *_transform(record),
        *_accuracy(record),
        *_unfinished(record),
        *_given(record),
        *_images(record),
        *_weights(record, rows),
        *_norms(record, norms),
        *_activations(record),
    ]
    order = ("warning", "note", "good")
    advice.sort(key=lambda each: order.index(each.level))
    if all(each.level == "good" for each in advice):
        advice.append(Advice("good", "Nothing needs attention."))
    return [*advice, *_result(record)]


def _result(record: RunRecord) -> list[Advice]:
    """The files to use."""
    if record.stages.activations is None:
        return []
    name, test = record.name, record.caffe_test
    use = "They need one layer type that stock Caffe lacks, ActQuantize: see docs/caffe.md of labelfree."
    finding = f"Use {name}_deploy.prototxt with {name}_renorm.caffemodel."
    if test.iterations is None:
        return [Advice("next", finding, f"{use} For `caffe test` there would have to be {test.needed}.")]
    command = f"caffe test -model {name}_val.prototxt -weights {name}_renorm.caffemodel"
    measures = f"{use} Caffe itself measures the accuracy:"
    return [Advice("next", finding, measures, f"{command} -iterations {test.iterations}")]


def _transform(record: RunRecord) -> list[Advice]:
    """Before everything else: with a wrong transform no other number means what it says."""
    advice = []
    check = record.transform
    if check is not None and check.doubtful:
        is_code = check.remedy.startswith("--set")
        finding = f"Images probably do not come as in training. {check.finding}."
        advice.append(Advice("warning", finding, *(("", check.remedy) if is_code else (check.remedy, ""))))
    evaluation = record.evaluation
    if evaluation is not None and evaluation.accuracy:
        full, final = (evaluation.accuracy[name].top1 for name in ("fp32", "quantized"))
        reason = doubt(full, final, evaluation.agreement, evaluation.labeled, evaluation.classes)
        if reason:
            advice.append(Advice("warning", f"{reason[0].upper()}{reason[1:]}."))
    return advice


def _accuracy(record: RunRecord) -> list[Advice]:
    if record.evaluation is None:
        return [
            Advice(
                "note",
                "The results of the two networks have not been compared yet.",
                "Measure agreement with full precision, and accuracy where there are labels:",
                "labelfree report --evaluate --config YOUR.yaml",
            )
        ]
    agreement = record.evaluation.agreement
    if agreement is None:
        return []
    best = record.settings.weights.solver == "data_aware"
    main = record.evaluation.main
    where = "images" if main is not None and main.places == 1 else "places of the images"
    if agreement >= LOW_AGREEMENT:
        more = "" if best else "Closer still, at the same size, with what takes longer: --quality best."
        finding = f"Both networks choose the same class for {agreement:.2f} % of the {where}."
        return [Advice("good", finding, more)]
    return [
        Advice(
            "warning",
            f"The networks choose the same class for only {agreement:.2f} % of the {where}.",
            "Give the layers with the lowest output SQNR 8 bits, or try more bits everywhere:"
            if best
            else "Fit the weights to what each layer's output should be, at the same size:",
            _more_bits(record) if best else "--quality best",
        )
    ]


def _unfinished(record: RunRecord) -> list[Advice]:
    missing = record.stages.missing
    if not missing:
        return []
    return [
        Advice(
            "warning",
            f"Not run yet: {' and '.join(missing)}. The numbers below are those of an unfinished network.",
            "Go on from here:",
            f"labelfree quantize --config YOUR.yaml --stages {','.join(missing)}",
        )
    ]


def _given(record: RunRecord) -> list[Advice]:
    """What was wrong with the model before anything was done to it."""
    stage = record.stages.weights
    return [Advice("warning", f"{line}.") for line in stage.doubtful] if stage is not None else []


def _images(record: RunRecord) -> list[Advice]:
    renorm = record.stages.renorm
    if renorm is None or not renorm.layers:
        return []
    fewest = min(renorm.layers, key=lambda layer: layer.values)
    enough = fewest.values >= ENOUGH_VALUES[renorm.statistics]
    if enough and renorm.images >= ENOUGH_IMAGES[renorm.statistics]:
        return []
    return [
        Advice(
            "note" if enough else "warning",
            f"Renorm saw {renorm.images:,} images: {fewest.values:,} values per channel at {fewest.name}.",
            f"{USUAL_IMAGES[renorm.statistics]:,} images are usual, and they need no labels. With more of "
            "them the statistics of the deep layers get steadier:",
            f"--set renorm.images={USUAL_IMAGES[renorm.statistics]}",
        )
    ]


def _more_bits(record: RunRecord) -> str:
    """The option for half a bit more where a budget was kept, for 5 bits otherwise."""
    budget = record.stages.weights.budget if record.stages.weights else None
    if budget is None:
        return "--set weights.bits=5"
    grid = record.settings.weights.grid
    if budget.limit + 0.5 <= GRID_BITS[grid][1]:
        return f"--set weights.budget={budget.limit + 0.5:g}"
    return "--set activations.levels=255" if grid == "uniform" else "--set weights.grid=uniform"


def _weights(record: RunRecord, rows: Sequence[Row]) -> list[Advice]:
    stage = record.stages.weights
    if stage is None:
        return []
    coarse = [row for row in rows if row.is_low_bit and row.weights and row.weights.sqnr_db is not None]
    advice = [
        Advice("note", f"{name} keeps full precision, as the configuration says.") for name in stage.skipped
    ]
    advice += [Advice("note", f"{name} keeps full precision: {why}.") for name, why in stage.kept.items()]
    if len(coarse) < 2 or stage.budget is not None:
        return advice  # with a budget the bits were chosen by what they do to the whole network
    figure, what = (_output_sqnr, "output") if all(map(_output_sqnr, coarse)) else (_weight_sqnr, "weight")
    worst = min(coarse, key=figure)
    own, typical = figure(worst), median(map(figure, coarse))
    if typical - own < STANDS_OUT_DB or worst.weights is None:
        return advice
    bits = worst.weights.bits
    cost = worst.weights.weights * (8 - bits) / 8
    return [
        *advice,
        Advice(
            "note",
            f"{worst.name} is furthest from full precision: {what} SQNR {own:.1f} dB, the median of the "
            f"{bits}-bit layers is {typical:.1f} dB.",
            f"8 bits for this layer cost {cost / 1000:,.1f} kB. In the YAML file, under weights:",
            f"layers: {json.dumps({worst.name: OVERRIDE}, ensure_ascii=False)}",
        ),
    ]


def _weight_sqnr(row: Row) -> float:
    return row.weights.sqnr_db or 0.0 if row.weights else 0.0


def _output_sqnr(row: Row) -> float:
    return row.output.get("quantized") or 0.0


def _norms(record: RunRecord, norms: Sequence[NormPlot]) -> list[Advice]:
    renorm = record.stages.renorm
    if renorm is None:
        return []
    if not renorm.layers:
        return [
            Advice(
                "warning",
                "The network has no BatchNorm, so renorm had only biases to repair.",
                "If BatchNorm was folded into the convolutions, quantize the network from before.",
            )
        ]
    advice = []
    dead = {norm.name: norm.dead for norm in norms if norm.dead}
    dead |= {layer.name: layer.dead for layer in renorm.layers if layer.dead}
    if dead:
        layers = ", ".join(f"{name} ({count})" for name, count in list(dead.items())[:5])
        more = f" and {len(dead) - 5} more layers" if len(dead) > 5 else ""
        advice.append(
            Advice(
                "note",
                f"Dead channels, the same value for every image: {layers}{more}.",
                "They were dead before quantization or lost all their weights to it; removing them makes the "
                "network smaller still.",
            )
        )
    moved = max(renorm.layers, key=lambda layer: max(layer.variance_ratio, 1 / layer.variance_ratio))
    ratio = moved.variance_ratio
    if not 1 / MUCH_MOVED < ratio < MUCH_MOVED:
        advice.append(
            Advice(
                "note",
                f"At {moved.name} the variance is {ratio:.2f} times what BatchNorm had stored.",
                "Renorm repaired it. So large a change also comes from calibration images that are unlike "
                "the training images: check data.transform (mean, scale, crop, order of channels).",
            )
        )
    return advice


def _activations(record: RunRecord) -> list[Advice]:
    stage = record.stages.activations
    if stage is None:
        return []
    advice = [
        Advice(
            "note",
            f"{layer.name} is dead: its output was 0 for every calibration image.",
            "Check data.transform and the images; if they are right, the layer does nothing.",
        )
        for layer in stage.layers
        if layer.dead
    ]
    clipped = [layer for layer in stage.layers if layer.clipped > MUCH_CLIPPED]
    if clipped:
        worst = max(clipped, key=lambda layer: layer.clipped)
        advice.append(
            Advice(
                "note",
                f"{worst.name} clips {100 * worst.clipped:.2f} % of its outputs, more than usual.",
                "Least squares chose that range. Twice the levels would cost nothing in an unsigned byte:",
                "--set activations.levels=255",
            )
        )
    return advice
