"""What the five papers claim, counted, and where they contradict themselves: what `docs/claims.md` holds.

python benchmarks/claims_table.py > docs/claims.md
"""

from collections.abc import Iterator

from sae.evaluate.papers.claims import PAPERS, Paper, load_paper
from sae.evaluate.papers.verdict import INTERVAL_TOLERANCE, MEAN_TOLERANCE, MIN_SEEDS, NO_EFFECT

HEAD = f"""# What the five papers claim

Made by `benchmarks/claims_table.py` from `evaluate/claims/*.toml`, in which every number that a paper gives as a result
is an entry: where it stands, the line that holds it, the system and the metric of ours that it is about, and the reading
that was taken. The same number in several places is one claim; two numbers for one thing are two. The rest of a paper's
numbers are there as its setting. `benchmarks/check_quotes.py --papers DIR` finds every quote in the papers' text, and
every number of that text in a quote.

The verdict on a claim (`evaluate/papers/verdict.py`) is `reproduced` on the paper's own model only: {MIN_SEEDS} seeds or more, their mean
within {100 * MEAN_TOLERANCE:.0f} % of the claimed number (or what rounds to it), and the 95 % interval of that mean within {100 * INTERVAL_TOLERANCE:.0f} %. Of two systems
it is `direction only` or `contradicted` by the interval of the differences of runs with the same seed; a difference below
{100 * NO_EFFECT:.0f} % of the claimed one is none, which contradicts. A number by itself is `not comparable` on another model, and
what no metric speaks to, or nobody ran, is `not measured`. Where the paper contradicts a number it is `paper inconsistent`.

| paper | claims | of them differences or changes | with a metric of ours | paper inconsistent | contradictions | measured, not reported |
|---|---|---|---|---|---|---|"""


def line(paper: Paper) -> str:
    claims = paper.claims
    counts = [
        len(claims),
        sum(bool(claim.against) for claim in claims),
        sum(claim.metric != "none" for claim in claims),
        sum(map(paper.inconsistent, claims)),
        len(paper.contradictions),
        len(paper.unreported),
    ]
    return f"| {paper.number} {paper.title.split(':')[0]} | " + " | ".join(map(str, counts)) + " |"


def section(paper: Paper) -> Iterator[str]:
    ran = paper.ran
    yield f"\n## {paper.number}: {paper.title}\n"
    layers = ", ".join(map(str, ran.layers))
    budget = f"{ran.steps:,} steps of {ran.batch_size:,}" if ran.steps else "no step was made"
    peak = (
        ""
        if ran.peak_reached or not ran.steps
        else f", within a warm-up of {ran.warmup:,}: the rate stays below its peak"
    )
    yield f"{ran.model}, layer{'s' * (len(ran.layers) > 1)} {layers}, {ran.d_sae:,} latents; {budget}{peak}.\n"
    yield "Contradictions:\n"
    for one in paper.contradictions:
        touched = f" Judged inconsistent: {', '.join(f'`{name}`' for name in one.claims)}." if one.claims else ""
        yield f"- **{one.what}** " + " / ".join(f"“{quote}”" for quote in one.quotes) + f" {one.follows}{touched}"
    if silent := [claim for claim in paper.claims if claim.metric == "none"]:
        yield "\nNo metric of ours speaks to:\n"
        for claim in silent:
            yield f"- `{claim.id}` ({claim.where}): “{claim.quote}” {claim.why}"
    if paper.unreported:
        yield "\nSaid to be measured, without a number:\n"
        for lack in paper.unreported:
            ours = "no metric of ours" if lack.metric == "none" else f"ours is `{lack.metric}`"
            yield f"- {lack.what}: “{lack.quote}” ({ours})"


def overview() -> str:
    papers = [load_paper(number) for number in PAPERS]
    lines = [HEAD, *map(line, papers), *(text for paper in papers for text in section(paper))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(overview(), end="")
