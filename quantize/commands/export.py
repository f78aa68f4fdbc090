"""What `labelfree export` prints: the files, how small, how close and how fast they are, what stays float."""

from __future__ import annotations

import json
from dataclasses import asdict

from quantize.commands.summary import size_text, table
from quantize.record import Export


def export_json(outcome: Export) -> str:
    """One JSON object; sizes in bytes, agreement in percent, SQNR in decibels."""
    found = outcome.comparison
    return json.dumps(
        {
            "files": {str(path): size for path, size in outcome.paths.items()},
            "model_bytes": outcome.model_bytes,
            "float_bytes": outcome.float_bytes,
            "float_layers": outcome.in_float,
            "notes": list(outcome.notes),
            "comparison": None if found is None else asdict(found),
        }
    )


def export_text(outcome: Export) -> str:
    """A table of the files, a line of what has been compared, and one for each layer that stays in float."""
    rows = [("file", "size"), *((str(path), size_text(size)) for path, size in outcome.paths.items())]
    lines = [table(rows)]
    if outcome.model_bytes is not None and outcome.float_bytes is not None:
        smaller = outcome.float_bytes / outcome.model_bytes
        full = size_text(outcome.float_bytes)
        lines.append(f"{size_text(outcome.model_bytes)}, in full precision {full}: {smaller:.2f}x smaller")
    if outcome.comparison is not None:
        found = outcome.comparison
        close = "the same scores" if found.sqnr_db is None else f"SQNR {found.sqnr_db:.1f} dB"
        agreed = "" if found.agreement is None else f", agreement {found.agreement:.2f} %"
        layers = found.kernels.integer + found.kernels.floating
        lines += [
            f"against labelfree's scores, on {found.images} images: {close}{agreed}",
            f"images per second, one at a time: {1 / found.seconds:.1f}, in full precision "
            f"{1 / found.float_seconds:.1f}: {found.float_seconds / found.seconds:.2f}x as fast",
            f"in integers: {found.kernels.integer} of {layers} layers with weights",
        ]
    lines += [f"in float: {', '.join(names)}: {why}" for why, names in outcome.in_float_by_reason.items()]
    return "\n".join([*lines, *outcome.notes])
