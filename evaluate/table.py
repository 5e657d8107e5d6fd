"""Results as tables for a reader: heads with the direction that is better, one line a row."""

from collections.abc import Sequence

from .run import Row

CORE = [
    ("L0", "sparsity", "l0", ".1f"),
    ("KL score ↑", "model_behavior_preservation", "kl_div_score", ".4f"),
    ("KL ↓", "model_behavior_preservation", "kl_div_with_sae", ".4f"),
    ("CE score ↑", "model_performance_preservation", "ce_loss_score", ".4f"),
    ("EV ↑", "reconstruction_quality", "fve", ".4f"),
    ("cosine ↑", "reconstruction_quality", "cossim", ".3f"),
    ("alive ↑", "misc_metrics", "frac_alive", ".3f"),
    ("corr ↓", "correlation", "mean", ".4f"),
    ("corr 99.9% ↓", "correlation", "quantile_99.9", ".3f"),
]


def core_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells; a cell is empty where the row has no such number."""

    def cell(row: Row, category: str, name: str, form: str) -> str:
        value = row.results["core"].metrics.get(category, {}).get(name)
        return "" if value in (None, -1) else format(value, form)

    heads = ["run", *(column[0] for column in CORE)]
    return heads, [[row.name, *(cell(row, *column[1:]) for column in CORE)] for row in rows]
