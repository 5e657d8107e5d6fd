"""The output of `sae inspect`: the numbers of the dashboard, shown in a terminal.

Text from datasets passes through `make_visible`, which leaves no control characters. The text is shown as rich's Text,
which does not interpret markup.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ...common.escaping import make_visible
from ..latents.inspection import InspectedRun, encode_prompt
from ..latents.passages import Passage, quantile_passages
from ..latents.stats import LatentStats, RankedEntries

STRONGEST = 5  # latents shown for each token of a prompt
PLAIN_WIDTH = 200  # width of output that is not sent to a terminal
LONGEST_WORD, BEGINNING = 40, 16  # characters of a token that are shown
BLOCKS = " ▁▂▃▄▅▆▇█"
PALE, FULL = (255, 244, 214), (230, 159, 0)  # RGB background of the least and the most active tokens


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def print_blocks(blocks: Sequence[Any]) -> None:
    """Print renderables with a blank line after each."""
    console = make_console()
    for block in blocks:
        console.print(block)
        console.print()


def highlight_tokens(words: Sequence[str], values: Sequence[float], peak: float) -> Text:
    """The texts of tokens. Active tokens have a colored background or, without colors, are between << and >>."""
    console = make_console()
    plain = console.color_system is None or console.no_color
    text = Text()
    for text_of_token, value in zip(words, values, strict=True):
        word = shorten(make_visible(text_of_token))
        share = min(1.0, value / peak) if value > 0 else 0.0
        if not share:
            text.append(word)
        elif plain:
            text.append(f"<<{word}>>")
        else:
            shade = [round(pale + share * (full - pale)) for pale, full in zip(PALE, FULL, strict=True)]
            text.append(word, Style(color="black", bgcolor="#{:02x}{:02x}{:02x}".format(*shade)))
    return text


def passage_text(run: InspectedRun, passage: Passage, peak: float) -> Text:
    contexts = run.ctx.contexts
    length = int(contexts.length[passage.context])
    values = passage.inside(length)
    words = run.token_text.display_text(contexts.ids[passage.context, :length].tolist())
    return highlight_tokens(words[passage.start :][: len(values)], values.tolist(), peak)


def shorten(word: str) -> str:
    """The text of a token. Of a long text, such as a line of hyphens, only the beginning and the length are shown."""
    return word if len(word) <= LONGEST_WORD else f"{word[:BEGINNING]}…×{len(word)}"


def text_histogram(counts: Sequence[int]) -> str:
    """One block character per bin, up to the last non-empty bin. The largest bin gets a full block; only empty bins are
    blank."""
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    most = max(counts)
    return "".join(BLOCKS[math.ceil(count * (len(BLOCKS) - 1) / most)] for count in counts[: last + 1])


def latent_summary(run: InspectedRun, stats: LatentStats, place: int) -> Group:
    """One latent: how often and where it fires, its logit effects, and the nearest latents."""
    activations = stats.activations
    latent, peak = int(activations.latents_K[place]), float(activations.peak_K[place])
    density = float(stats.density[latent])
    label = "; ".join(run.labels.get(latent, ()))
    parts: list[Any] = [Text(f"latent {latent}   {make_visible(label)}".rstrip(), "bold")]
    if density == 0:
        parts.append(Text(f"does not fire on any of {len(activations.l0):,} tokens"))
    else:
        counts, width = activations.histogram.count_KB[place].tolist(), float(activations.histogram.width[place])
        drawn = text_histogram(counts)
        parts += [
            Text(
                f"fires at {density:.2%} of {len(activations.l0):,} tokens, "
                f"with mean {float(stats.mean[place]):.3g} and maximum {peak:.3g}"
            ),
            Text(f"0 {drawn} {len(drawn) * width:.3g}   activation"),
        ]
        for title, passages in (
            ("largest activations", activations.top.passages(place)),
            ("quantiles, 90 to 10 %", quantile_passages(activations.sample, place)),
        ):
            rows = Table.grid(padding=(0, 2))
            rows.add_column(justify="right", no_wrap=True)
            rows.add_column(overflow="fold")
            for passage in passages:
                rows.add_row(f"{passage.value:.3g}", passage_text(run, passage, peak))
            parts += [Text(title, "bold"), rows]

    lists = Table.grid(padding=(0, 2))
    lists.add_column(style="bold", no_wrap=True)
    lists.add_column(overflow="fold")
    for title, tokens in (("raises", stats.raised), ("lowers", stats.lowered)):
        if tokens:
            lists.add_row(title, token_list(run, tokens, place))
    lists.add_row("nearest", Text(latent_list(run, stats.nearest.entries(place))))
    shares = [f" ({share:.2f})" for share in stats.jaccard[place].tolist()]
    lists.add_row("fires with", Text(latent_list(run, stats.coactive.entries(place), shares)))
    return Group(*parts, lists)


def token_list(run: InspectedRun, listed: RankedEntries, place: int) -> Text:
    return Text(
        "   ".join(
            f"{shorten(make_visible(run.token_text.display(token))).replace(' ', '·')} {value:.3g}"
            for token, value in listed.entries(place)
        )
    )


def latent_list(run: InspectedRun, entries: Sequence[tuple[int, float]], notes: Sequence[str] = ()) -> str:
    notes = [*notes, *[""] * len(entries)]
    return (
        "   ".join(f"{latent} {value:.3g}{note}" for (latent, value), note in zip(entries, notes, strict=False))
        or "none"
    )


def prompt_table(run: InspectedRun, prompt: str, latents: Sequence[int] = ()) -> Table:
    """The tokens of a prompt, each with its most active latents, chosen from all latents or from `latents`."""
    ids, f_SF, outlier_norm = encode_prompt(run, prompt)
    names = list(latents) or range(run.sae.d_sae)
    chosen_SK = f_SF[:, list(latents)] if latents else f_SF
    table = Table(box=None, pad_edge=False)
    table.add_column("token", no_wrap=True)
    table.add_column("L0", justify="right")
    table.add_column("activations of latents", overflow="fold")
    counted, texts = run.ctx.context_format.counted(torch.tensor(ids)).tolist(), run.token_text.display_text(ids)
    tokens = zip(ids, texts, counted, f_SF, chosen_SK, strict=True)
    for position, (token, text, is_counted, all_F, own_K) in enumerate(tokens):
        word = shorten(make_visible(text)).replace(" ", "·")
        if not is_counted:
            why = "special token" if token in run.ctx.special_ids else "left out of the harvest"
            table.add_row(Text(word, "dim"), "", Text(why, "dim"))
            continue
        if position in outlier_norm:
            note = f"outlier, norm {outlier_norm[position]:.4g} (limit {run.norm_limit:.4g})"
            table.add_row(Text(word, "dim"), "", Text(note, "dim"))
            continue
        value, at = own_K.topk(min(STRONGEST, len(own_K)))
        active = [(names[i], v) for i, v in zip(at.tolist(), value.tolist(), strict=True) if v > 0]
        shown = [
            f"{latent} {value:.3g}"
            + (f" {make_visible('; '.join(run.labels[latent]))}" if latent in run.labels else "")
            for latent, value in active
        ]
        table.add_row(Text(word), str(int((all_F > 0).sum())), Text("   ".join(shown) or "none"))
    return table
