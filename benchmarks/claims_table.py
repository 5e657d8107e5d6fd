"""A table of the five papers' claims, and of where the papers contradict themselves.

python benchmarks/claims_table.py > docs/explanation/claims.md
"""

from collections.abc import Iterator

from sae.evaluate.papers.claims import PAPERS, SAME_NUMBER, Paper
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.verdict import LIKE_L0, MEANINGS, NO_EFFECT

COLUMNS = (
    "paper", "claims", "of them about two systems", "without a number", "restatements or copies",
    "with a metric of ours", "paper inconsistent", "contradictions", "measured, not reported",
)  # fmt: skip
MEANING_LINES = "\n".join(f"- *{verdict}*: {meaning}." for verdict, meaning in MEANINGS.items())
SHARES = {"l0": f"{LIKE_L0 - 1:.0%}", "effect": f"{NO_EFFECT:.0%}", "same": f"{SAME_NUMBER:.0%}"}
HEAD = f"""# What the five papers claim

Made by `benchmarks/claims_table.py` from `evaluate/papers/*.toml`. These files have an entry for every number that a
paper gives as a result: where it is, the line that contains it, which of our systems and metrics it is about, and how
we read it. If a number is in several places of the paper, it is one claim; if the paper has two numbers for one
quantity, they are two claims. The paper's other numbers are recorded as its setting. `benchmarks/check_quotes.py
--papers DIR` checks that every quote is in the paper's text, and that every number of that text is in a quote.

Papers leave things open, so that each can be trained in several *readings* (`sae reproduce --reading`). Every claim
gets a verdict in each reading (`evaluate/papers/verdict.py`):

{MEANING_LINES}

On another model than the paper's, two systems can be compared if their L0 differ by at most {SHARES["l0"]}, or if the
paper itself compares them at L0 that differ in the same direction. There, the size of a difference contradicts nothing.
On the paper's model, a difference below {SHARES["effect"]} of the claimed one counts as no effect and contradicts the
claim. Two numbers of a paper that differ by at most {SHARES["same"]} do not contradict each other. If the numbers
printed for two systems are only one unit of their last digit apart, the claim has no direction. A claim that restates
another gets a verdict but is not counted again. Claims about the time of a training step are compared with
`evaluate/papers/step_times.json`.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}"""


def table_row(paper: Paper) -> str:
    claims = paper.claims
    counts = [
        len(claims),
        sum(bool(claim.against) for claim in claims),
        sum(bool(claim.says) for claim in claims),
        sum(not paper.is_counted(claim) for claim in claims),
        sum(claim.metric != "none" for claim in claims),
        sum(map(paper.inconsistent, claims)),
        len(paper.contradictions),
        len(paper.unreported),
    ]
    return f"| {paper.number} {paper.title.split(':')[0]} | " + " | ".join(map(str, counts)) + " |"


def section(paper: Paper) -> Iterator[str]:
    ran = paper.setup
    yield f"\n## {paper.number}: {paper.title}\n"
    layers = ", ".join(map(str, ran.layers))
    budget = f"{ran.steps:,} steps of {ran.batch_size:,}" if ran.steps else "no training step"
    peak = (
        ""
        if ran.peak_reached or not ran.steps
        else f", fewer than the {ran.warmup:,} of the warm-up, so that the learning rate stays below its peak"
    )
    yield f"{ran.model}, layer{'s' * (len(ran.layers) > 1)} {layers}, {ran.d_sae:,} latents; {budget}{peak}.\n"
    yield "Contradictions:\n"
    for one in paper.contradictions:
        touched = f" Judged inconsistent: {', '.join(f'`{name}`' for name in one.claims)}." if one.claims else ""
        yield f"- **{one.what}** " + " / ".join(f"“{quote}”" for quote in one.quotes) + f" {one.follows}{touched}"
    if substituted := [(reading, one) for reading in paper.readings for one in reading.substitutes]:
        yield "\nNot as printed in some readings, where the claims can be neither reproduced nor contradicted:\n"
        for one in dict.fromkeys(one for _, one in substituted):
            names = ", ".join(reading.name for reading, other in substituted if other == one)
            yield f"- {names}: {one.what}. {one.why} Claims: {', '.join(f'`{name}`' for name in one.claims)}."
    if silent := [claim for claim in paper.claims if claim.metric == "none"]:
        yield "\nClaims for which we have no metric:\n"
        for claim in silent:
            yield f"- `{claim.id}` ({claim.where}): “{claim.quote}” {claim.why}"
    if paper.unreported:
        yield "\nThe paper says that it measures these, and reports no number:\n"
        for lack in paper.unreported:
            ours = "no metric of ours" if lack.metric == "none" else f"ours is `{lack.metric}`"
            yield f"- {lack.what}: “{lack.quote}” ({ours})"


def overview() -> str:
    papers = [load_paper(number) for number in PAPERS]
    lines = [HEAD, *map(table_row, papers), *(text for paper in papers for text in section(paper))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(overview(), end="")
