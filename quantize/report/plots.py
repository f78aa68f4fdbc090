"""The plots of the report, as SVG that takes its colors and its font from the page around it."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from quantize.record import QuantizedActivation
from quantize.report.facts import NormPlot, Row, WeightPlot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "#010101": "var(--text)",
    "#020202": "var(--faint)",
    "#030303": "var(--line)",
    "#040404": "var(--weights)",
    "#050505": "var(--before)",
    "#060606": "var(--final)",
    "#070707": "var(--alert)",
}
"""What matplotlib draws with, and the CSS value that takes its place: one plot serves light and dark."""
TEXT, FAINT, LINE, WEIGHTS, BEFORE, FINAL, ALERT = COLORS
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "labelfree",
    "text.parse_math": False,  # a layer may be called a$b$
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "grid.color": LINE,
    "legend.frameon": False,
}
NAMED_LAYERS = 26
"""With more layers than this the depth plot numbers them."""
MAX_POINTS = 6000
"""Of a scatter: more cannot be told apart and make the file large."""
WEIGHT_BINS = 90
LEVELS_DRAWN = 40
RATIO_TICKS = (0.01, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 5, 10, 100)
LOWEST = 0.7
"""Where the logarithmic count axis begins: below 1."""
LABEL_CHARACTERS = 22


class Panel(NamedTuple):
    """Inches of a plot, and the place of its axes: left, bottom, width and height as shares.

    Without a place matplotlib fits the axes to the texts around them, which takes twice the time.
    """

    size: tuple[float, float]
    axes: tuple[float, float, float, float] | None = None


WIDE = Panel((9.0, 3.4))
SMALL = Panel((3.4, 2.3), (0.03, 0.2, 0.94, 0.68))
SQUARE = Panel((4.3, 3.3), (0.15, 0.15, 0.82, 0.82))


def depth_plot(rows: Sequence[Row]) -> str:
    """SQNR of the weights and of the output of every layer with weights, along the depth."""
    numbered = [(number, row) for number, row in enumerate(rows, 1) if row.weights is not None]
    layers = [row for _, row in numbered]
    named = len(layers) <= NAMED_LAYERS

    def draw(axes: Axes) -> None:
        place = np.arange(1, len(layers) + 1) if named else np.array([number for number, _ in numbered])
        for label, color, style, values in (
            ("weights alone", WEIGHTS, "o", [row.weights and row.weights.sqnr_db for row in layers]),
            ("output without renorm", BEFORE, "s--", [row.output.get("without_renorm") for row in layers]),
            ("output, final network", FINAL, "D-", [row.output.get("quantized") for row in layers]),
        ):
            numbers = np.array([np.nan if v is None else v for v in values], float)
            if not np.isnan(numbers).all():
                axes.plot(place, numbers, style, color=color, label=label, markersize=4, linewidth=1.4)
        axes.set_ylabel("SQNR, dB (higher is better)")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_xlim(place[0] - 0.5, place[-1] + 0.5)
        if named:
            names = [shortened(row.name) for row in layers]
            axes.set_xticks(place, names, rotation=35, ha="right", rotation_mode="anchor")
        else:
            axes.set_xlabel("layer, as numbered in the table")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return _svg(draw, WIDE, "SQNR of every layer along the depth of the network")


def weight_histogram(plot: WeightPlot) -> str:
    """The weights in units of alpha, and where the grid has levels."""

    def draw(axes: Axes) -> None:
        scale = _signed_log if plot.logarithmic else _identity
        edge = float(np.abs(plot.levels).max()) * 1.25
        inside = np.clip(plot.units, -edge, edge)
        counts, edges = np.histogram(scale(inside), WEIGHT_BINS, (scale(-edge), scale(edge)))
        axes.stairs(counts, edges, fill=True, color=WEIGHTS)
        few = plot.levels if len(plot.levels) <= LEVELS_DRAWN else plot.levels[[0, -1]]
        for level in few:
            axes.axvline(float(scale(level)), color=FINAL, linewidth=0.8, alpha=0.75)
        ticks = few if len(few) <= 5 else np.array([x for x in few if abs(x) in (0, 1, 4, 16, 64)])
        ticks = ticks if len(ticks) else few[[0, -1]]
        axes.set_xticks([float(scale(t)) for t in ticks], [f"{t:g}" for t in ticks])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("weight / alpha")
        axes.set_title(shortened(plot.name))

    return _svg(draw, SMALL, f"Histogram of the weights of {plot.name} with the levels of its grid")


def norm_scatters(plots: Sequence[NormPlot], worst: str | None) -> list[str]:
    """Two scatters of all channels of all BatchNorms, before against after: means and variances.

    Channels without a variance are left out; without any other there is nothing to draw.

    Args:
        worst: the layer to stand out.
    """
    thin = max(1, -(-sum(len(plot.mean) for plot in plots) // MAX_POINTS))
    alive = {plot.name: (plot.variance > 0) & (plot.new_variance > 0) for plot in plots}
    if not any(some.any() for some in alive.values()):
        return []

    def means(axes: Axes) -> None:
        for plot in plots:
            some = alive[plot.name]
            deviation = np.sqrt(plot.variance[some])
            _scatter(axes, plot.mean[some] / deviation, plot.new_mean[some] / deviation, plot.name)
        _diagonal(axes)
        axes.set_xlabel("mean stored, in standard deviations")
        axes.set_ylabel("mean measured")

    def variances(axes: Axes) -> None:
        for plot in plots:
            some = alive[plot.name]
            _scatter(axes, plot.variance[some], plot.new_variance[some] / plot.variance[some], plot.name)
        axes.axhline(1, color=FINAL, linewidth=1, zorder=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda _, __: "")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.5), max(high, 2))
        axes.set_yticks([tick for tick in RATIO_TICKS if min(low, 0.5) <= tick <= max(high, 2)])
        axes.set_xlabel("variance stored")
        axes.set_ylabel("variance measured / stored")

    def _scatter(axes: Axes, x: Any, y: Any, name: str) -> None:
        is_worst = name == worst
        axes.scatter(
            x[:: 1 if is_worst else thin],
            y[:: 1 if is_worst else thin],
            s=9,
            color=ALERT if is_worst else WEIGHTS,
            alpha=0.9 if is_worst else 0.55,
            linewidth=0,
            zorder=3 if is_worst else 2,
        )

    return [
        _svg(means, SQUARE, "Means of BatchNorm before and after renorm"),
        _svg(variances, SQUARE, "Variances of BatchNorm before and after renorm"),
    ]


def activation_histogram(record: QuantizedActivation) -> str:
    """The values of a site and how far its codes reach."""
    _import_quietly()
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        counts = np.array(record.histogram, float)
        edges = np.linspace(record.minimum, record.maximum, len(counts) + 1)
        axes.stairs(np.maximum(counts, LOWEST), edges, baseline=LOWEST, fill=True, color=WEIGHTS)
        axes.set_yscale("log")
        axes.set_ylim(bottom=LOWEST)
        clip = record.levels * record.step
        axes.axvline(clip, color=FINAL, linewidth=1.4)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        right = max(clip, record.maximum)
        left = min(-clip, record.minimum) if record.signed else 0
        axes.set_xlim(left * 1.02, right * 1.02)
        if record.signed:
            axes.axvline(-clip, color=FINAL, linewidth=1.4)
        side = "right" if clip > (left + right) / 2 else "left"
        text = f" clips at {clip:.3g} "
        axes.text(clip, 0.97, text, ha=side, va="top", transform=axes.get_xaxis_transform(), color=FINAL)
        axes.set_yticks([])
        axes.minorticks_off()
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("value (log count)")
        axes.set_title(shortened(record.name))

    return _svg(draw, SMALL, f"Histogram of the values of {record.name} with how far its codes reach")


def shortened(name: str) -> str:
    """A name that fits a plot; the middle of a long one is left out."""
    if len(name) <= LABEL_CHARACTERS:
        return name
    half = (LABEL_CHARACTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _identity(x: Any) -> Any:
    return x


def _signed_log(x: Any) -> Any:
    """Spaces powers of two evenly, 0 in the middle."""
    return np.sign(x) * np.log2(1 + np.abs(x))


def _diagonal(axes: Axes) -> None:
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color=FINAL, linewidth=1, zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)


def _svg(draw: Callable[[Axes], None], panel: Panel, description: str) -> str:
    _import_quietly()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=panel.size, layout=None if panel.axes else "constrained")
        draw(figure.add_axes(panel.axes) if panel.axes else figure.add_subplot())
        return _inline(figure, description)


def _import_quietly() -> None:
    """Import matplotlib without warnings where it finds no folder to keep things in.

    It and fontconfig, which it calls, then get a temporary one for the moment; the fonts that they look for
    are not needed.
    """
    if "matplotlib" in sys.modules or (_is_there("CACHE", "~/.cache") and _is_there("CONFIG", "~/.config")):
        return
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="labelfree-") as folder:
        os.environ.update(MPLCONFIGDIR=folder, XDG_CACHE_HOME=folder)
        try:
            import matplotlib.font_manager  # noqa: F401
        finally:
            os.environ.clear()
            os.environ.update(before)


def _is_there(kind: str, usual: str) -> bool:
    """Whether the user has a folder ``$XDG_kind_HOME`` that can be written; it is made if need be."""
    path = os.environ.get(f"XDG_{kind}_HOME") or os.path.expanduser(usual)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK)


def _inline(figure: Figure, description: str) -> str:
    """The figure as an <svg> element without fixed colors, fonts, sizes or repeated ids."""
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    for drawn, shown in COLORS.items():
        text = text.replace(drawn, shown)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    head = f'<svg role="img" aria-label="{escape(description)}" {view[0]}>'
    return head + text[text.index(">") + 1 :]
