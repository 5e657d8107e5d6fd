"""The results of run.py as a page of Markdown."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NUMBERS = (  # heading, category, name, format
    ("L0", "sparsity", "l0", ".1f"),
    ("KL score", "model_behavior_preservation", "kl_div_score", ".3f"),
    ("KL", "model_behavior_preservation", "kl_div_with_sae", ".3f"),
    ("CE score", "model_performance_preservation", "ce_loss_score", ".3f"),
    ("EV", "reconstruction_quality", "fve", ".3f"),
    ("alive", "misc_metrics", "frac_alive", ".3f"),
    ("corr", "correlation", "mean", ".3f"),
    ("corr 99.9 %", "correlation", "quantile_99.9", ".3f"),
)
ABSORPTION = (
    ("absorption fraction", "mean_absorption_fraction_score"),
    ("full absorption", "mean_full_absorption_score"),
)


def markdown(result: dict[str, Any]) -> str:
    """The whole page. Results that were not measured are left out."""
    stages = result["stages"]
    parts = [
        f"# A real model, {result['date']}: {result['model']}\n\n{introduction(result)}",
        section("Time of each stage", times(result["seconds"])),
        section("Against the independent check", check(result)),
        section("Variance of the harvested rows", variances(stages)),
        *(section(f"The {arm} arm: each recipe", recipes(stages, arm)) for arm in ("standing", "sinks")),
        *(section(f"The {arm} arm: the effect of one row", order(stages, arm)) for arm in ("standing", "sinks")),
        section("What a context begins with", beginnings(stages.get("beginnings"))),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def introduction(result: dict[str, Any]) -> str:
    return (
        f"`python benchmarks/real_model/run.py` harvested {result['tokens']} tokens at layers "
        f"{' and '.join(map(str, result['layer']))}. SAEs of layer {result['layer'][0]}, four times as wide as the "
        f"model, were trained with `--l0 {result['l0']}` for {result['steps']:,} steps of 1,024 rows (in the sinks "
        f"arm: {result['sink_tokens']} tokens, {result['sink_steps']:,} steps). They were evaluated on "
        f"{result['eval_tokens'] or 'all'} held-out tokens, and absorption on "
        f"{result.get('absorption_words') or 'all'} words. "
        'Outlier rows are left out ("masked") unless a heading says "not masked". The arms are described in '
        "[benchmarks/real_model](../real_model/README.md). "
        f"Machine: {result['machine']}. {result['note']}".rstrip()
    )


def section(title: str, body: str | None) -> str | None:
    return f"## {title}\n\n{body}" if body else None


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def times(seconds: dict[str, list[float | None]]) -> str:
    order = sorted(seconds.items(), key=lambda item: -(item[1][0] or 0))
    lines = [[name, *(format_number(value, ",.0f") for value in both)] for name, both in order]
    return table(["stage", "seconds", "CPU seconds"], lines)


def check(result: dict[str, Any]) -> str | None:
    """Largest differences between `sae evaluate` and the hooks, and rows that differ from the hidden states."""
    bits = result["stages"].get("bits")
    lines = [[arm, *(f"{value:.1e}" for value in one.values())] for arm, one in result["check"].items()]
    if not lines and not bits:
        return None
    names = list(next(iter(result["check"].values()), {}))
    differing = ", ".join(f"{layer}: {rows}" for layer, rows in (bits or {}).items())
    return (
        "The table shows the largest difference over all runs between the numbers of `sae evaluate` and the same "
        "numbers computed with transformers and forward hooks.\n\n"
        + table(["arm", *names], lines)
        + (
            f"\n\nOf 4,096 stored rows, the number that differ in any bit from transformers' hidden states: "
            f"{differing}."
            if bits
            else ""
        )
    )


def variances(stages: dict[str, Any]) -> str | None:
    lines = []
    for arm in ("standing", "sinks"):
        for layer, one in (stages.get(f"{arm}-variance") or {}).items():
            top = next(value for name, value in one.items() if name.startswith("variance_share_of_top"))
            cells = (
                f"{one['norm_median']:.0f}",
                f"{one['norm_max']:,.0f}",
                f"{one['outlier_rows']:,} of {one['rows']:,}",
            )
            shares = f"{one['variance_share_of_outliers']:.1%}", f"{top:.1%}"
            where = ", ".join(f"{place} ({count})" for place, count in list(one["outlier_positions"].items())[:4])
            tokens = ", ".join(f"`{text!r}` ({count})" for text, count in list(one["outlier_tokens"].items())[:4])
            variance = f"{one['variance_all_rows']:.0f}", f"{one['variance_masked']:.0f}"
            lines.append([arm, layer, *cells, *shares, *variance, where or "none", tokens or "none"])
    headings = "arm, array, median norm, largest norm, outlier rows, outliers' share of the variance".split(", ")
    headings += "share of the top 0.1 % of rows, variance with outliers, variance without outliers".split(", ")
    headings += ["positions of outliers (rows)", "tokens of outliers (rows)"]
    return table(headings, lines) if lines else None


def recipes(stages: dict[str, Any], arm: str) -> str | None:
    core = stages.get(f"{arm}-core")
    if not core:
        return None
    rows, rows_off = stages.get(f"{arm}-rows") or {}, stages.get(f"{arm}-rows-unmasked") or {}
    absorption = stages.get(f"{arm}-absorption") or {}
    lines = []
    for run, result in core.items():
        cells = [format_number(number(result, category, name), form) for _, category, name, form in NUMBERS]
        cells.append(format_number(number(result, "reconstruction_quality", "fve", masked=False)))
        cells.append(format_number(number(result, "correlation", "quantile_99.9", masked=False)))
        cells += [format_number(part.get("training_rows_ev", {}).get(run)) for part in (rows, rows_off)]
        cells += [format_number(part.get("first_example_outliers", {}).get(run)) for part in (rows, rows_off)]
        cells.append(format_number((stages.get(f"{arm}-pages") or {}).get("outliers_first", {}).get(run)))
        if absorption:
            cells += [format_number(number(absorption[run], "mean", name)) for _, name in ABSORPTION]
        lines.append([run.split("-")[0], *cells])
    headings = ["recipe", *(heading for heading, *_ in NUMBERS)]
    headings += ["EV, not masked", "corr 99.9 %, not masked", "EV on training rows"]
    headings += ["EV on training rows, not masked", "share of first examples on outlier rows"]
    headings += ["the same share, not masked", "the same share in the dashboard"]
    headings += [heading for heading, _ in ABSORPTION] if absorption else []
    return table(headings, lines)


def number(result: dict[str, Any], category: str, name: str, masked: bool = True) -> float | None:
    """A number, computed without outlier rows if the text has any and `masked` is set, otherwise over all rows."""
    metrics = result["metrics"]
    found = masked and metrics.get(f"masked_{category}") or metrics.get(category, {})
    value = found.get(name)
    return None if value == -1 else value


def format_number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def order(stages: dict[str, Any], arm: str) -> str | None:
    lines = []
    for title, key in (("masked", f"{arm}-rows"), ("not masked", f"{arm}-rows-unmasked")):
        found = stages.get(key)
        if not found:
            continue
        stable, change = found["order"], max(found["order"]["largest_change_of_ev_by_one_row"].values())
        turned = stable["decided_and_turned_by_one_row"]
        lines.append(
            f"{title}: {found['rows']:,} held-out rows of {found['documents']} documents. Leaving out one row changes "
            f"the explained variance of a run by at most {change:.4f}. Of {stable['pairs']} differences between two "
            f"runs in {'a number (EV or KL)' if title == 'masked' else 'EV'}, {stable['decided']} have a paired 95 % "
            f"interval that excludes zero; leaving out one row reverses the sign of {len(turned)} of these"
            f"{': ' + '; '.join(map(say_pair, turned)) if turned else ''}. Differences "
            f"whose interval includes zero: {'; '.join(map(say_pair, stable['near_ties'])) or 'none'}."
        )
    return "\n\n".join(lines) or None


def say_pair(pair: dict[str, Any]) -> str:
    names = f"{pair['a'].split('-')[0]} minus {pair['b'].split('-')[0]}"
    rows = pair["rows_that_turn_it"]
    turned = f", reversed by {'one row' if rows == 1 else f'any of {rows} rows'}" if rows else ""
    return f"{names}, {pair['number']} {pair['difference']:+.4f} ±{pair['half_interval']:.4f}{turned}"


def beginnings(found: dict[str, Any] | None) -> str | None:
    if not found:
        return None
    layers = list(next(iter(found.values()))["outlier_rows"])
    lines = [
        [name, f"{one['ce']:.4f}", f"{one['predictions']:,}", *(f"{one['outlier_rows'][layer]:,}" for layer in layers)]
        for name, one in found.items()
    ]
    headings = [
        "begins with",
        "CE from token 20 on",
        "predictions",
        *(f"rows with norms over 10 medians, layer {n}" for n in layers),
    ]
    return table(headings, lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
