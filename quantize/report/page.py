"""From the facts of a run to one HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files

from quantize.caffenet.model import Model
from quantize.caffenet.strings import from_path
from quantize.record import RunRecord
from quantize.report import plots
from quantize.report.advice import advise
from quantize.report.facts import Row, norm_plot, rows_of, weight_plot

SMALL_MULTIPLES = 6
"""Layers with a plot of their own, the worst ones; the others are in the overview."""
VERSIONS = (
    ("fp32", "full precision"),
    ("without_renorm", "quantized weights, no renorm"),
)
STAGE_TITLES = {
    "weights": "weights onto the grid",
    "renorm": "BatchNorm repaired",
    "activations": "a step and codes for each activation",
}
IMAGES_FROM = {
    "validation": "images of data.validation",
    "held_out": "calibration images that no stage had used",
    "calibration": "the calibration images themselves, which the network was fitted to",
}


def render(record: RunRecord, full: Model, quantized: Model, renormed: Model | None) -> str:
    """The report as HTML that needs nothing from outside.

    Args:
        record: the content of report.json.
        full: the model in full precision.
        quantized: what the stage weights has made of it.
        renormed: what the stage renorm has made of that; None where that has not run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    rows = rows_of(record, full.inference.net)
    shifts = record.stages.renorm.layers if record.stages.renorm else []
    layers = {layer.name: layer for layer in full.inference.net.layer}
    norms = [norm_plot(layers[shift.name], quantized, renormed) for shift in shifts if renormed is not None]
    moved = max(shifts, key=lambda shift: shift.mean_shift).name if shifts else None
    script = files("quantize.report").joinpath("sort.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("quantize.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "db": decibels_text,
        "percent": percent,
        "size": size,
        "number": number,
        "path": from_path,
    }
    pictures = {
        "depth": [plots.depth_plot(rows)] if any(row.weights for row in rows) else [],
        "weights": _weight_plots(rows, full, quantized),
        "norms": plots.norm_scatters(norms, moved) if norms else [],
        "activations": _activation_plots(record),
    }
    return environment.get_template("report.html.j2").render(
        record=record,
        rows=rows,
        advice=advise(record, rows, norms),
        plots={name: [Markup(svg) for svg in svgs] for name, svgs in pictures.items()},
        moved=moved,
        versions=versions_of(record),
        stage_titles=STAGE_TITLES,
        images_from=IMAGES_FROM,
        settings=json.dumps(record.settings.model_dump(mode="json"), indent=2, ensure_ascii=False),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def versions_of(record: RunRecord) -> list[tuple[str, str]]:
    """The nets that are compared, and what to call them: a net is only final when all stages have run."""
    missing = record.stages.missing
    last = f"unfinished: no {', no '.join(missing)}" if missing else "final"
    return [*VERSIONS, ("quantized", last)]


def _weight_plots(rows: Sequence[Row], full: Model, quantized: Model) -> list[str]:
    coarse = [row.weights for row in rows if row.weights and row.weights.sqnr_db is not None]
    coarse.sort(key=lambda layer: layer.sqnr_db or 0.0)
    return [plots.weight_histogram(weight_plot(layer, full, quantized)) for layer in coarse[:SMALL_MULTIPLES]]


def _activation_plots(record: RunRecord) -> list[str]:
    layers = record.stages.activations.layers if record.stages.activations else []
    seen = [layer for layer in layers if not layer.dead and layer.histogram]
    seen.sort(key=lambda layer: layer.sqnr_db if layer.sqnr_db is not None else float("inf"))
    return [plots.activation_histogram(layer) for layer in seen[:SMALL_MULTIPLES]]


def decibels_text(value: float | None) -> str:
    """A ratio in decibels; a dash where there is none."""
    return "–" if value is None else f"{value:.1f}"


def percent(value: float | None, digits: int = 2) -> str:
    """Percent without the sign."""
    return "–" if value is None else f"{value:.{digits}f}"


def size(value: float) -> str:
    """Bytes in kB or MB of 1000."""
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def number(value: float) -> str:
    """A plain number of about three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
