"""`sae dashboard`: one self-contained HTML file with a run's numbers and every latent. It needs no server.

The page contains compressed JSON: the text (once), the columns of the table of latents, and blocks of latents. A block
is decompressed when one of its latents is opened.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from ...common.errors import UsageError
from ...common.escaping import make_visible
from ...common.formatting import format_bytes
from ..charts import Chart, Series
from ..compare_charts import read_metrics_log
from ..latents.inspection import InspectedRun, describe_outliers, training_record
from ..latents.passages import DEFAULT_WINDOW, Passage, PassageWindow, quantile_passages
from ..latents.stats import BYTES_PER_PASSAGE_TOKEN, SAMPLED_PASSAGES, LatentStats, RankedEntries, latent_stats
from ..metrics.base import Progress
from ..metrics.registry import caveats
from ..tables import tables
from .page import render_page
from .summary import summary_section
from .svg import CHART_SIZE, draw_svg

LATENTS_PER_BLOCK = 64
LEVELS = 255  # an activation in a passage is stored as n / LEVELS of the latent's largest activation
MAX_DEAD_LINKS = 200
BYTES_PER_LATENT, BYTES_PER_PASSAGE, BYTES_PER_TOKEN = 900, 3, 3  # approximate sizes in a page
MAX_WINDOW_BYTES = 4 * 2**30  # memory limit for the activations in passages
CURVE_TITLES = {  # scalar in metrics.jsonl -> title
    "loss": "loss",
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead": "share of dead latents",
}
DENSITY_BINS_PER_DECADE, MAX_L0_BINS = 8, 40


def compress_json(value: Any) -> str:
    """The value as JSON, compressed with gzip and encoded in base64. Equal values produce equal text."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def round_digits(value: float) -> float:
    """Round to four significant digits, more than a page shows."""
    return float(f"{value:.4g}")


class TokenIndex:
    """Assigns an index to each distinct token text, in the order of first use. `words` lists the texts."""

    def __init__(self, run: InspectedRun) -> None:
        self.run, self.places = run, dict[str, int]()
        self.words: list[str] = []

    def __call__(self, token: int) -> int:
        """For a token that is shown without its neighbours, the index of its text in `words`."""
        return self._number(self.run.token_text.display(token))

    def text(self, tokens: Sequence[int]) -> list[int]:
        """For each of several successive tokens, the index of its text in `words`. Several tokens can share one
        character."""
        return [self._number(text) for text in self.run.token_text.display_text(tokens)]

    def _number(self, text: str) -> int:
        if text not in self.places:
            self.places[text] = len(self.words)
            self.words.append(make_visible(text))
        return self.places[text]


def check_page_path(path: Path) -> Path:
    """Return the path if a page can be written there; raise UsageError otherwise."""
    if path.suffix != ".html" or path.is_dir():
        raise UsageError(f"--out {path}: expected a file name that ends in .html.")
    return path


def sample_latents(d_sae: int, count: int | None) -> Tensor:
    """All latents, or `count` of them drawn at random, in ascending order (K,)."""
    if count is not None and count <= 0:
        raise UsageError(f"--latents {count}: expected a positive number. Omit it to show all latents.")
    if count is None or count >= d_sae:
        return torch.arange(d_sae)
    return torch.randperm(d_sae, generator=torch.Generator().manual_seed(0))[:count].sort().values


def check_window_memory(window: PassageWindow, latents: int) -> PassageWindow:
    """Return the window if the passages of `latents` latents fit into memory; raise UsageError otherwise."""
    if (needed := BYTES_PER_PASSAGE_TOKEN * window.width * latents) > MAX_WINDOW_BYTES:
        raise UsageError(
            f"Passages of {window.width:,} tokens for {latents:,} latents need {format_bytes(needed)} of memory. "
            "Give a smaller --passage, or show fewer latents with --latents."
        )
    return window


def estimate_page_bytes(latents: int, tokens: int, window: PassageWindow = DEFAULT_WINDOW) -> int:
    """The approximate size of a page."""
    return (BYTES_PER_LATENT + BYTES_PER_PASSAGE * window.width) * latents + BYTES_PER_TOKEN * tokens


def dashboard_page(
    run: InspectedRun, latents_K: Tensor, date: str, progress: Progress, window: PassageWindow = DEFAULT_WINDOW
) -> str:
    """The HTML page of a run: its numbers over all latents, and the latents `latents_K` (K,) with their passages."""
    stats = latent_stats(run.ctx, run.sae, run.hook, latents_K, progress, window, run.norm_limit)
    token_index = TokenIndex(run)
    blocks = []
    for start in range(0, len(latents_K), LATENTS_PER_BLOCK):
        places = range(start, min(start + LATENTS_PER_BLOCK, len(latents_K)))
        blocks.append(compress_json([latent_entry(run, stats, place, token_index) for place in places]))
        progress(places.stop, len(latents_K), "latents packed")
    contexts = run.ctx.contexts
    text = [
        token_index.text(ids[:length])
        for ids, length in zip(contexts.ids.tolist(), contexts.length.tolist(), strict=True)
    ]
    columns = table_columns(run, stats, latents_K, token_index)
    packed = {"table": columns, "words": token_index.words, "text": text}
    return render_page(
        "dashboard.html",
        ("dashboard.js", "sort.js"),
        title=run.row.name,
        version=version("sae-pipeline"),
        date=date,
        run=run,
        packed={name: compress_json(value) for name, value in packed.items()},
        blocks=blocks,
        shown=len(latents_K),
        sampled=SAMPLED_PASSAGES,
        on_page=set(latents_K.tolist()),
        **summary_section(run.compared),
        **run_section(run),
        **text_section(run, stats, token_index),
    )


def run_section(run: InspectedRun) -> dict[str, Any]:
    """The part of the page that comes from the run's files: recipe, results and training curves."""
    return {
        "recipe": recipe_settings(run),
        "measured": [
            (title, list(zip(headings[1:], lines[0][1:], strict=True))) for title, headings, lines in tables([run.row])
        ],
        "flags": [
            *(f"{name}: {flag}" for name, result in run.row.results.items() for flag in result.sound.flags),
            *caveats(run.row.results),
            *run.row.notes,
        ],
        "curves": draw_charts(read_training_curves(run.folder)),
    }


def text_section(run: InspectedRun, stats: LatentStats, token_index: TokenIndex) -> dict[str, Any]:
    """The part of the page about all latents on the held-out text: densities, L0, dead latents."""
    density_F, l0_T = stats.density, stats.activations.l0
    special = [token_index.places.get(run.token_text.display(token)) for token in run.ctx.special_ids]
    about = {
        "block": LATENTS_PER_BLOCK, "levels": LEVELS, "tokens": len(l0_T), "d_sae": run.sae.d_sae,
        "special": [word for word in special if word is not None],
    }  # fmt: skip
    return {
        "about": about,
        "tokens": len(l0_T),
        "masked": describe_outliers(run, stats),
        "paired": stats.activations.pair_tokens,
        "dead": (density_F == 0).nonzero().flatten().tolist(),
        "dead_listed": MAX_DEAD_LINKS,
        "l0": float(l0_T.double().mean()) if len(l0_T) else 0.0,
        "histograms": draw_charts([density_chart(density_F), l0_chart(l0_T)]),
    }


def draw_charts(charts: Sequence[Chart]) -> list[tuple[Chart, Markup]]:
    return [(chart, draw_svg(chart, True, *CHART_SIZE)) for chart in charts]


def recipe_settings(run: InspectedRun) -> dict[str, str]:
    """How the SAE was trained, as name -> text; empty for an imported SAE without run.json."""
    record = training_record(run)
    shown = {name: record[name] for name in ("variant", "paper", "seed", "steps", "batch_size") if name in record}
    shown |= record.get("resolved") or {}
    return {name: describe_setting(value) for name, value in shown.items() if value is not None}


def describe_setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_columns(run: InspectedRun, stats: LatentStats, latents_K: Tensor, token_index: TokenIndex) -> dict[str, Any]:
    """The columns of the table of latents."""
    latents = latents_K.tolist()
    return {
        "latent": latents,
        "density": [round_digits(value) for value in stats.density[latents_K].tolist()],
        "mean": [round_digits(value) for value in stats.mean.tolist()],
        "max": [round_digits(value) for value in stats.activations.peak_K.tolist()],
        "tokens": [
            [token_index(token) for token in top_tokens(run, stats.activations.top.passages(place))]
            for place in range(len(latents))
        ],
        "labels": [make_visible("; ".join(run.labels.get(latent, ()))) for latent in latents],
    }


def top_tokens(run: InspectedRun, passages: Sequence[Passage], count: int = 3) -> list[int]:
    """The distinct tokens at which a latent fires most strongly."""
    return list(dict.fromkeys(int(run.ctx.contexts.ids[p.context, p.position]) for p in passages))[:count]


def latent_entry(run: InspectedRun, stats: LatentStats, place: int, token_index: TokenIndex) -> dict[str, Any]:
    """The page's entry for one latent, in addition to its row in the table."""
    activations = stats.activations
    peak, length_N = float(activations.peak_K[place]), run.ctx.contexts.length

    def passages(chosen: Sequence[Passage]) -> list[Any]:
        values = [one.inside(int(length_N[one.context])) for one in chosen]
        levels = [np.ceil(LEVELS * (some / peak)).astype(int).tolist() for some in values]
        return [
            [one.context, one.start, one.position, round_digits(one.value), level]
            for one, level in zip(chosen, levels, strict=True)
        ]

    def tokens(listed: RankedEntries | None) -> list[Any]:
        return [[token_index(token), round_digits(value)] for token, value in listed.entries(place)] if listed else []

    histogram = activations.histogram
    return {
        "bins": histogram.count_KB[place].tolist(),
        "width": float(histogram.width[place]),
        "top": passages(activations.top.passages(place)),
        "quantiles": passages(quantile_passages(activations.sample, place)),
        "raised": tokens(stats.raised),
        "lowered": tokens(stats.lowered),
        "nearest": [[latent, round_digits(value)] for latent, value in stats.nearest.entries(place)],
        "coactive": [
            [latent, round_digits(value), round_digits(float(share))]
            for (latent, value), share in zip(stats.coactive.entries(place), stats.jaccard[place], strict=False)
        ],
    }


def read_training_curves(folder: Path) -> list[Chart]:
    """Charts of the values logged during training; empty if there is no metrics.jsonl."""
    charts, steps = [], read_metrics_log(folder)
    for name, title in CURVE_TITLES.items():
        points = [(step["tokens"], step[name]) for step in steps if "tokens" in step and name in step]
        if points:
            x, y = zip(*points, strict=True)
            charts.append(Chart(f"{title}, in training", "tokens", title, [Series(title, x, y, "line")]))
    return charts


def density_chart(density_F: Tensor) -> Chart:
    """Histogram of the densities of latents that fire, on a logarithmic axis with eight bins per decade."""
    decades = density_F[density_F > 0].log10()
    bins, counts = (decades * DENSITY_BINS_PER_DECADE).floor().unique(return_counts=True)
    x, y = 10 ** ((bins + 0.5) / DENSITY_BINS_PER_DECADE), counts
    return bar_chart("density of latents", "share of tokens at which a latent fires", "latents", x, y, x_log=True)


def l0_chart(l0_T: Tensor) -> Chart:
    """Histogram of the number of latents that fire at a token. It has at most MAX_L0_BINS bins, each of which covers
    the same number of integers."""
    low, high = (int(l0_T.min()), int(l0_T.max())) if len(l0_T) else (0, 0)
    width = -(-(high - low + 1) // MAX_L0_BINS)
    bins, counts = ((l0_T - low) // width).unique(return_counts=True)
    return bar_chart(
        "L0 over tokens", "latents that fire at a token", "tokens", low + bins * width + (width - 1) / 2, counts
    )


def bar_chart(title: str, x_title: str, y_title: str, x: Tensor, y: Tensor, x_log: bool = False) -> Chart:
    labels = [f"{at:.3g}: {count:,} {y_title}" for at, count in zip(x.tolist(), y.tolist(), strict=True)]
    return Chart(title, x_title, y_title, [Series(title, x.tolist(), y.tolist(), "bars", labels=labels)], x_log=x_log)
