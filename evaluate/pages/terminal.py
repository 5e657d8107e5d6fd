"""What `sae inspect` prints: the numbers of the dashboard, for a terminal.

Texts become rich's Text, whose markup is never read, through `visible`, which leaves no control character in them.
"""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..latents.inspection import InspectedRun, encode_prompt
from ..latents.stats import BEFORE, LatentStats, Passage, RankedEntries, quantile_passages
from .page import make_visible

STRONGEST = 5  # latents of a token of a prompt
PLAIN_WIDTH = 200  # of what is no terminal
BLOCKS = " ▁▂▃▄▅▆▇█"
PALE, FULL = (255, 244, 214), (230, 159, 0)  # of the background of a token, from hardly to most active


def console() -> Console:
    found = Console()
    return found if found.is_terminal else Console(width=PLAIN_WIDTH)


def print_blocks(what: Sequence[Any]) -> None:
    own = console()
    for one in what:
        own.print(one)
        own.print()


def highlight_tokens(look: InspectedRun, ids: Sequence[int], values: Sequence[float], peak: float) -> Text:
    """Tokens, those that are active on a background; between << and >> where there are no colours."""
    plain = console().color_system is None or console().no_color
    text = Text()
    for token, value in zip(ids, values, strict=True):
        word = make_visible(look.words.display(token))
        share = min(1.0, value / peak) if value > 0 else 0.0
        if not share:
            text.append(word)
        elif plain:
            text.append(f"<<{word}>>")
        else:
            shade = [round(pale + share * (full - pale)) for pale, full in zip(PALE, FULL, strict=True)]
            text.append(word, Style(color="black", bgcolor="#{:02x}{:02x}{:02x}".format(*shade)))
    return text


def passage_text(look: InspectedRun, passage: Passage, peak: float) -> Text:
    contexts = look.ctx.contexts
    start = max(0, passage.position - BEFORE)
    end = min(int(contexts.length[passage.context]), passage.position - BEFORE + len(passage.values))
    values = passage.values[start - (passage.position - BEFORE) :][: end - start]
    return highlight_tokens(look, contexts.ids[passage.context, start:end].tolist(), values.tolist(), peak)


def text_histogram(counts: Sequence[int]) -> str:
    """A character a bin, up to the last one with anything in it; the tallest is full, and none that is not empty is blank."""
    last = max((i for i, count in enumerate(counts) if count), default=-1)
    most = max(counts)
    return "".join(BLOCKS[math.ceil(count * (len(BLOCKS) - 1) / most)] for count in counts[: last + 1])


def latent_summary(look: InspectedRun, found: LatentStats, place: int) -> Group:
    """One latent: how often it fires, where, what it pushes, and what is near it."""
    firings = found.activation_stats
    latent, peak = int(firings.latents_K[place]), float(firings.peak_K[place])
    density = float(found.density[latent])
    label = "; ".join(look.labels.get(latent, ()))
    parts: list[Any] = [Text(f"latent {latent}   {make_visible(label)}".rstrip(), "bold")]
    if density == 0:
        parts.append(Text(f"fires at none of {len(firings.l0):,} tokens, so there are no passages"))
    else:
        counts, width = firings.histogram.count_KB[place].tolist(), float(firings.histogram.width[place])
        drawn = text_histogram(counts)
        parts += [
            Text(
                f"fires at {density:.2%} of {len(firings.l0):,} tokens, {float(found.mean[place]):.3g} in the mean and {peak:.3g} at most"
            ),
            Text(f"0 {drawn} {len(drawn) * width:.3g}   activation"),
        ]
        for title, passages in (
            ("largest activations", firings.top.of(place)),
            ("quantiles, 90 to 10 %", quantile_passages(firings.sample, place)),
        ):
            rows = Table.grid(padding=(0, 2))
            rows.add_column(justify="right", no_wrap=True)
            rows.add_column(overflow="fold")
            for passage in passages:
                rows.add_row(f"{passage.value:.3g}", passage_text(look, passage, peak))
            parts += [Text(title, "bold"), rows]

    lists = Table.grid(padding=(0, 2))
    lists.add_column(style="bold", no_wrap=True)
    lists.add_column(overflow="fold")
    for title, tokens in (("raises", found.up), ("lowers", found.down)):
        if tokens:
            lists.add_row(title, token_list(look, tokens, place))
    lists.add_row("neighbours", Text(latent_list(look, found.near.of(place))))
    shares = [f" ({share:.2f})" for share in found.jaccard[place].tolist()]
    lists.add_row("fires with", Text(latent_list(look, found.together.of(place), shares)))
    return Group(*parts, lists)


def token_list(look: InspectedRun, listed: RankedEntries, place: int) -> Text:
    return Text(
        "   ".join(
            f"{make_visible(look.words.display(token)).replace(' ', '·')} {value:.3g}"
            for token, value in listed.of(place)
        )
    )


def latent_list(look: InspectedRun, found: Sequence[tuple[int, float]], beside: Sequence[str] = ()) -> str:
    notes = [*beside, *[""] * len(found)]
    return (
        "   ".join(f"{latent} {value:.3g}{note}" for (latent, value), note in zip(found, notes, strict=False)) or "none"
    )


def prompt_table(look: InspectedRun, prompt: str, latents: Sequence[int] = ()) -> Table:
    """The tokens of a prompt, and at each its most active latents, of all or of some."""
    ids, f_SF = encode_prompt(look, prompt)
    names = list(latents) or range(look.sae.d_sae)
    chosen_SK = f_SF[:, list(latents)] if latents else f_SF
    table = Table(box=None, pad_edge=False)
    table.add_column("token", no_wrap=True)
    table.add_column("L0", justify="right")
    table.add_column("activations of latents", overflow="fold")
    for token, all_F, own_K in zip(ids, f_SF, chosen_SK, strict=True):
        word = make_visible(look.words.display(token)).replace(" ", "·")
        if token in look.ctx.special_ids:
            table.add_row(Text(word, "dim"), "", Text("a special token: not read", "dim"))
            continue
        value, at = own_K.topk(min(STRONGEST, len(own_K)))
        active = [(names[i], v) for i, v in zip(at.tolist(), value.tolist(), strict=True) if v > 0]
        shown = [
            f"{latent} {value:.3g}"
            + (f" {make_visible('; '.join(look.labels[latent]))}" if latent in look.labels else "")
            for latent, value in active
        ]
        table.add_row(Text(word), str(int((all_F > 0).sum())), Text("   ".join(shown) or "none"))
    return table
