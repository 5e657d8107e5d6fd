"""Draw a chart with matplotlib, as a file for a paper."""

from itertools import pairwise
from pathlib import Path

from ...common.errors import UnavailableError, UsageError
from ..charts import COLOURS, DASHES, Chart, marker_of


def save_chart(chart: Chart, path: Path) -> None:
    """Draw the chart with matplotlib; the file's ending decides the format (.svg, .png, .pdf).

    Raises OutsideError without matplotlib, UsageError for an ending that it does not write.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnavailableError("Plots for papers need matplotlib: pip install 'sae-pipeline[plots]'.") from error
    with rc_context({"svg.hashsalt": "sae", "svg.fonttype": "none"}):  # the same chart, the same bytes
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.add_subplot(
            title=chart.title, xlabel=chart.x_title, ylabel=chart.y_title,
            xscale="log" if chart.x_log else "linear", yscale="log" if chart.y_log else "linear",
        )  # fmt: skip
        for place, series in enumerate(chart.series):
            number = place if series.look is None else series.look
            colour, marker, x = COLOURS[number % len(COLOURS)], marker_of(number), chart.dodged(series)
            if series.kind == "bars":
                step = min((b - a for a, b in pairwise(series.x)), default=1.0)
                axes.bar(x, series.y, 0.9 * step, color=colour, label=series.name)
                continue
            banded = series.kind == "line" and any(series.spread)
            if banded:
                low, high = zip(*((y - s, y + s) for y, s in zip(series.y, series.spread, strict=True)), strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            dashes = ("-", "--", ":", "-.")[number // len(COLOURS) % len(DASHES)] if series.kind != "points" else "none"
            axes.errorbar(
                x, series.y, yerr=None if banded else series.spread or None, label=series.name, color=colour, ls=dashes,
                marker=marker if series.kind != "line" else "none", ms=5, lw=1.4,
            )  # fmt: skip
        if chart.categories:
            turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if chart.slanted(400) else {}
            axes.set_xticks(range(len(chart.categories)), chart.categories, **turned)
            axes.set_xlim(-0.5, len(chart.categories) - 0.5)
        axes.grid(alpha=0.25)
        if len(chart.series) > 1:
            axes.legend(fontsize=7, ncols=1 + len(chart.series) // 12)
        try:
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        except ValueError as error:
            raise UsageError(
                f"{path}: matplotlib writes no {path.suffix or 'file without an ending'}. Give .svg, .png or .pdf."
            ) from error
