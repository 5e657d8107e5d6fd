"""The model card of an SAE on the Hub: a description, its metrics, how to load it, and how it was trained."""

import json
from pathlib import Path
from typing import Any

from ...common.errors import DamagedError, warn_left_out
from ...common.escaping import escape_for_markdown
from ...common.evaluation_schemas import RESULT_RECORD
from ...common.files import read_json
from ..sae import read_sae_record, require_result_of
from .export import ExportResult

# (file in evaluations/, category in eval_result_metrics, metric, heading in the card)
CARD_METRICS = (
    ("core", "sparsity", "l0", "L0 (active latents per token)"),
    ("core", "model_behavior_preservation", "kl_div_score", "KL score"),
    ("core", "model_performance_preservation", "ce_loss_score", "CE score"),
    ("core", "reconstruction_quality", "fve", "explained variance"),
    ("core", "misc_metrics", "frac_alive", "fraction of latents alive"),
    ("absorption", "mean", "mean_absorption_fraction_score", "absorption"),
    ("sparse_probing", "sae", "sae_top_1_test_accuracy", "sparse probing, 1 latent"),
    ("unlearning", "unlearning", "unlearning_score", "unlearning"),
)
NOT_MEASURED = -1  # SAEBench's value for a metric that was not measured
RECIPE_KEYS = (
    "variant", "seed", "training_tokens", "dataset_path", "context_size", "model_revision", "cache_digest"
)  # fmt: skip


def model_card(exported: ExportResult, run: Path, repo: str, base_model: str | None) -> str:
    """README.md for a repository with a SAELens export. `base_model` is the Hub id of the model that the SAE reads."""
    metadata = exported.metadata
    config = read_json(exported.folder / "cfg.json")
    title = escape_for_markdown(str(metadata.get("variant") or config["architecture"]))
    where = escape_for_markdown(f"{metadata.get('model_name', 'a language model')}, {metadata.get('hook_name', '')}")
    sections = [
        front_matter(base_model),
        f"# {title} on {where}\n",
        f"A sparse autoencoder with {config['d_sae']:,} latents on activations of width {config['d_in']:,}, made by "
        f"{metadata['created_by']}. Its activation is `{metadata['training_architecture']}`, saved for SAELens as "
        f"`{config['architecture']}`: it reads raw activations, its decoder rows have unit norm, b_dec is folded into "
        "b_enc, and its weights are float32.\n",
        f"Verified before upload: {exported.check}.\n",
    ]
    if "approximation" in metadata:
        sections.append(f"**This is an approximation**: {'; '.join(exported.notes)}.\n")
    if metrics := evaluation_metrics(run):
        sections += [
            "## Metrics\n",
            markdown_table(("metric", "value"), metrics),
            "Measured by `sae evaluate` on held-out text.\n",
        ]
    sections += ["## Loading\n", loading_example(repo)]
    recipe = {key: metadata[key] for key in RECIPE_KEYS if metadata.get(key) is not None}
    recipe |= {k: v for k, v in (metadata.get("training_options") or {}).items() if v is not None}
    sections += ["## Training\n", markdown_table(("option", "value"), [(k, str(v)) for k, v in recipe.items()])]
    return "\n".join(sections)


def front_matter(base_model: str | None) -> str:
    fields: dict[str, Any] = {"library_name": "saelens", "tags": ["sparse-autoencoder", "saelens"]}
    if base_model is not None:
        fields["base_model"] = base_model
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()) + "---\n"


def loading_example(repo: str) -> str:
    return f"""```python
from huggingface_hub import snapshot_download
from sae_lens import SAE

sae = SAE.load_from_disk(snapshot_download("{repo}"))
f = sae.encode(x)
```

```bash
sae import hf://{repo}
```
"""


def evaluation_metrics(run: Path) -> list[tuple[str, str]]:
    """The (heading, value) of each metric in CARD_METRICS that a run's evaluations/ folder contains.

    If a result has values with and without outlier rows, the values without outlier rows are used, as in our tables. If
    a metric was measured on the stand-in dataset (texts from Python's standard library), its heading says so.
    """
    results, metrics = read_metrics(run), []
    for name, category, metric, heading in CARD_METRICS:
        for file, suffix in ((f"{name}.json", ""), (f"{name}_stdlib.json", ", on texts of Python's standard library")):
            categories = results.get(file, {})
            group = categories.get(f"masked_{category}", categories.get(category, {}))
            if (value := group.get(metric)) not in (None, NOT_MEASURED):
                metrics.append((heading + suffix, f"{value:.4g}"))
    return metrics


def read_metrics(run: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """A result's file name -> its `eval_result_metrics`. Warns of results that are damaged or belong to another SAE."""
    results = {}
    for path in sorted((run / "evaluations").glob("*.json")):
        try:
            record = RESULT_RECORD.read(path)
            require_result_of(read_sae_record(run), record, path)
            results[path.name] = record["eval_result_metrics"]
        except DamagedError as error:
            warn_left_out(path, error)
    return results


def markdown_table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {escape_for_markdown(a)} | {escape_for_markdown(b)} |" for a, b in rows]) + "\n"
