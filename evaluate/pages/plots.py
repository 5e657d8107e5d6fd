"""Draw charts with matplotlib, as files for a paper."""

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...common.errors import UsageError
from ...common.escaping import make_visible
from ...common.files import atomic_write, make_folder, os_error
from ...common.packages import import_extra
from ..charts import COLORS, DASHES, Chart, Series, marker_of, thin_out

LINE_STYLES = ("-", "--", ":", "-.")  # matplotlib's names for `charts.DASHES`


def save_charts(charts: Sequence[Chart], folder: Path) -> None:
    """Save each chart as .svg and .png, named after its title."""
    try:
        make_folder(folder)
    except OSError as error:
        raise os_error(error, folder) from error
    for chart in charts:
        stem = "-".join("".join(c if c.isalnum() else " " for c in chart.title.lower()).split())
        for suffix in (".svg", ".png"):
            save_chart(chart, folder / f"{stem}{suffix}")


def save_chart(chart: Chart, path: Path) -> None:
    """Draw a chart to a file; the suffix decides the format (.svg, .png, .pdf).

    Raises UnavailableError if matplotlib is not installed or the file cannot be written, and UsageError for a format
    that matplotlib cannot write. The file is written completely or not at all.
    """
    import_extra("plots", "A plot", "matplotlib.figure")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Makes equal charts produce equal bytes, and prevents a $ in a name from beginning a formula.
    with rc_context({"svg.hashsalt": "sae", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.add_subplot(
            title=make_visible(chart.title), xlabel=make_visible(chart.x_title), ylabel=make_visible(chart.y_title),
            xscale="log" if chart.x_log else "linear", yscale="log" if chart.y_log else "linear",
        )  # fmt: skip
        for place, series in enumerate(map(thin_out, chart.series)):
            draw_series(axes, chart, series, place if series.style is None else series.style)
        if chart.categories:
            axes.set_xticks(range(len(chart.categories)), list(map(make_visible, chart.categories)))
            if chart.slanted(400):
                for label in axes.get_xticklabels():
                    label.set(rotation=45, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.5, len(chart.categories) - 0.5)
        axes.grid(alpha=0.25)
        if len(chart.series) > 1:
            axes.legend(fontsize=7, ncols=1 + len(chart.series) // 12)
        kind = path.suffix.removeprefix(".")
        if kind not in figure.canvas.get_supported_filetypes():
            raise UsageError(
                f"{path}: matplotlib cannot write {path.suffix or 'a file without a suffix'}. Use .svg, .png or .pdf."
            )
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    atomic_write(path, image.getbuffer())


def draw_series(axes: Any, chart: Chart, series: Series, style: int) -> None:
    color, marker, x = COLORS[style % len(COLORS)], marker_of(style), chart.dodged(series)
    name = make_visible(series.name)
    name = f" {name}" if name.startswith("_") else name  # matplotlib leaves names with an underscore out of legends
    if series.kind == "bars":
        step = min((b - a for a, b in pairwise(series.x)), default=1.0)
        axes.bar(x, series.y, 0.9 * step, color=color, label=name)
        return
    banded = series.kind == "line" and any(series.spread)
    if banded:
        low, high = zip(*((y - s, y + s) for y, s in zip(series.y, series.spread, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    line_style = LINE_STYLES[style // len(COLORS) % len(DASHES)] if series.kind != "points" else "none"
    axes.errorbar(
        x, series.y, yerr=None if banded else series.spread or None, label=name, color=color, ls=line_style,
        marker=marker if series.kind != "line" else "none", ms=5, lw=1.4,
    )  # fmt: skip
