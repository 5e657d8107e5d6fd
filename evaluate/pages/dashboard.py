"""`sae dashboard`: one run as a page, its numbers and every latent, in one file that needs no server.

The page holds JSON, packed: the text once, all latents' columns of the table, and blocks of BLOCK latents, which are
unpacked when one of them is looked at.
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
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from ..charts import Chart, Series
from ..latents.inspection import InspectedRun, training_record
from ..latents.stats import (
    BEFORE,
    SAMPLED_PASSAGES,
    LatentStats,
    Passage,
    RankedEntries,
    latent_stats,
    quantile_passages,
)
from ..metrics.base import Progress
from ..tables import tables
from .page import make_visible, render_page
from .svg import draw_svg

BLOCK = 64
LEVELS = 255  # of a colour; a page holds activations in a passage as shares of the latent's largest
DEAD_LISTED = 200
CURVES = {
    "loss": "loss",
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead": "share of dead latents",
}
DENSITY_BINS, L0_BINS = 8, 40  # in a decade, at most


def compress_json(value: Any) -> str:
    """JSON, gzip, base64: the same value, the same text."""
    return base64.b64encode(
        gzip.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    ).decode()


def round_digits(value: float) -> float:
    """Four digits, which is more than a page shows."""
    return float(f"{value:.4g}")


class TokenIndex:
    """Tokens by the order in which a page first needs them; `words` is what is shown of each."""

    def __init__(self, look: InspectedRun) -> None:
        self.look, self.places = look, dict[int, int]()
        self.words: list[str] = []

    def __call__(self, token: int) -> int:
        if token not in self.places:
            self.places[token] = len(self.words)
            self.words.append(make_visible(self.look.words.display(token)))
        return self.places[token]


def check_page_path(path: Path) -> Path:
    """UsageError for a path that no page should be written to."""
    if path.suffix != ".html" or path.is_dir():
        raise UsageError(f"--out {path}: a page is a file whose name ends in .html.")
    return path


def sample_latents(d_sae: int, count: int | None) -> Tensor:
    """All latents, or so many of them, drawn at random, in their order (K,)."""
    if count is not None and count <= 0:
        raise UsageError(f"--latents {count} is not positive. Give how many the page holds, or leave it out for all.")
    if count is None or count >= d_sae:
        return torch.arange(d_sae)
    return torch.randperm(d_sae, generator=torch.Generator().manual_seed(0))[:count].sort().values


def dashboard_page(look: InspectedRun, latents_K: Tensor, date: str, progress: Progress) -> str:
    """The page of a run, with the latents `latents_K` (K,) in it and the run's numbers over all of them."""
    found = latent_stats(look.ctx, look.sae, look.hook, latents_K, progress)
    vocabulary = TokenIndex(look)
    blocks = []
    for start in range(0, len(latents_K), BLOCK):
        places = range(start, min(start + BLOCK, len(latents_K)))
        blocks.append(compress_json([latent_entry(look, found, place, vocabulary) for place in places]))
        progress(places.stop, len(latents_K), "latents packed")
    contexts = look.ctx.contexts
    text = [
        [vocabulary(token) for token in ids[:length]]
        for ids, length in zip(contexts.ids.tolist(), contexts.length.tolist(), strict=True)
    ]
    columns = table_columns(look, found, latents_K, vocabulary)
    density_F = found.density
    return render_page(
        "dashboard.html", "dashboard.js",
        title=look.row.name, version=version("sae-pipeline"), date=date, look=look, recipe=recipe_settings(look),
        tokens=len(found.activation_stats.l0), paired=found.activation_stats.paired_tokens, directions=found.up is not None,
        shown=len(latents_K), dead=(density_F == 0).nonzero().flatten().tolist(), dead_listed=DEAD_LISTED,
        l0=float(found.activation_stats.l0.double().mean()) if len(found.activation_stats.l0) else 0.0,
        measured=[(title, list(zip(heads[1:], lines[0][1:], strict=True))) for title, heads, lines in tables([look.row])],
        flags=[f"{name}: {flag}" for name, result in look.row.results.items() for flag in result.flags],
        curves=[draw_svg(chart) for chart in read_training_curves(look.folder)],
        histograms=[draw_svg(density_chart(density_F)), draw_svg(l0_chart(found.activation_stats.l0))],
        sampled=SAMPLED_PASSAGES, about={"block": BLOCK, "before": BEFORE, "levels": LEVELS, "tokens": len(found.activation_stats.l0), "d_sae": look.sae.d_sae},
        packed={"table": compress_json(columns), "words": compress_json(vocabulary.words), "text": compress_json(text)}, blocks=blocks,
    )  # fmt: skip


def recipe_settings(look: InspectedRun) -> dict[str, str]:
    """How it was trained, as names and texts; nothing for an SAE that came without a run.json."""
    run = training_record(look)
    shown = {name: run[name] for name in ("variant", "paper", "seed", "steps", "batch_size") if name in run}
    shown |= run.get("resolved") or {}
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in shown.items()}


def table_columns(look: InspectedRun, found: LatentStats, latents_K: Tensor, vocabulary: TokenIndex) -> dict[str, Any]:
    """A column each for what the table of latents shows."""
    latents = latents_K.tolist()
    return {
        "latent": latents,
        "density": [round_digits(value) for value in found.density[latents_K].tolist()],
        "mean": [round_digits(value) for value in found.mean.tolist()],
        "max": [round_digits(value) for value in found.activation_stats.peak_K.tolist()],
        "tokens": [
            [vocabulary(token) for token in top_tokens(look, found.activation_stats.top.of(place))]
            for place in range(len(latents))
        ],
        "labels": [make_visible("; ".join(look.labels.get(latent, ()))) for latent in latents],
    }


def top_tokens(look: InspectedRun, passages: Sequence[Passage], count: int = 3) -> list[int]:
    """The tokens at which a latent fires most strongly, each once."""
    return list(dict.fromkeys(int(look.ctx.contexts.ids[p.context, p.position]) for p in passages))[:count]


def latent_entry(look: InspectedRun, found: LatentStats, place: int, vocabulary: TokenIndex) -> dict[str, Any]:
    """All that the page shows of one latent, beside its row of the table."""
    peak = float(found.activation_stats.peak_K[place])

    def passages(chosen: Sequence[Passage]) -> list[Any]:
        return [
            [
                one.context,
                one.position,
                round_digits(one.value),
                np.ceil(LEVELS * (one.values / peak)).astype(int).tolist(),
            ]
            for one in chosen
        ]

    def tokens(listed: RankedEntries | None) -> list[Any]:
        return [[vocabulary(token), round_digits(value)] for token, value in listed.of(place)] if listed else []

    histogram = found.activation_stats.histogram
    return {
        "bins": histogram.count_KB[place].tolist(),
        "width": float(histogram.width[place]),
        "top": passages(found.activation_stats.top.of(place)),
        "quantiles": passages(quantile_passages(found.activation_stats.sample, place)),
        "up": tokens(found.up),
        "down": tokens(found.down),
        "near": [[latent, round_digits(value)] for latent, value in found.near.of(place)],
        "together": [
            [latent, round_digits(value), round_digits(float(share))]
            for (latent, value), share in zip(found.together.of(place), found.jaccard[place], strict=False)
        ],
    }


def read_training_curves(folder: Path) -> list[Chart]:
    """What training logged; nothing where no metrics.jsonl is, or one that cannot be read."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        points = {name: [(step["tokens"], step[name]) for step in steps if name in step] for name in CURVES}
        return [
            Chart(f"{title}, in training", "tokens", title, [Series(title, *zip(*points[name], strict=True), "line")])  # type: ignore[arg-type]
            for name, title in CURVES.items()
            if points[name]
        ]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DamagedError(f"{path} cannot be read ({error}). Remove it: the page then has no curves.") from error


def density_chart(density_F: Tensor) -> Chart:
    """How many of the latents that fire have each density, on a logarithmic axis; bins of an eighth of a decade."""
    decades = density_F[density_F > 0].log10()
    bins, counts = (decades * DENSITY_BINS).floor().unique(return_counts=True)
    x, y = 10 ** ((bins + 0.5) / DENSITY_BINS), counts
    return bar_chart("density of latents", "share of tokens at which a latent fires", "latents", x, y, x_log=True)


def l0_chart(l0_T: Tensor) -> Chart:
    """How many tokens have each number of latents, in L0_BINS bins at most, of as many whole numbers each."""
    low, high = (int(l0_T.min()), int(l0_T.max())) if len(l0_T) else (0, 0)
    width = -(-(high - low + 1) // L0_BINS)
    bins, counts = ((l0_T - low) // width).unique(return_counts=True)
    return bar_chart(
        "L0 over tokens", "latents that fire at a token", "tokens", low + bins * width + (width - 1) / 2, counts
    )


def bar_chart(title: str, x_title: str, y_title: str, x: Tensor, y: Tensor, x_log: bool = False) -> Chart:
    labels = [f"{at:.3g}: {count:,} {y_title}" for at, count in zip(x.tolist(), y.tolist(), strict=True)]
    return Chart(title, x_title, y_title, [Series(title, x.tolist(), y.tolist(), "bars", labels=labels)], x_log=x_log)
