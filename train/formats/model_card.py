"""The model card of an SAE that goes to the Hub: what it is, its numbers, how to load it, how it was trained."""

import contextlib
import json
from pathlib import Path
from typing import Any

from ...common.errors import SaeError
from ...common.files import read_json
from .export import ExportResult

# file of evaluations/, category, name, heading
CARD_METRICS = (
    ("core", "sparsity", "l0", "L0, latents a token"),
    ("core", "model_behavior_preservation", "kl_div_score", "KL score"),
    ("core", "model_performance_preservation", "ce_loss_score", "CE score"),
    ("core", "reconstruction_quality", "explained_variance", "explained variance"),
    ("core", "misc_metrics", "frac_alive", "share of latents alive"),
    ("absorption", "mean", "mean_absorption_fraction_score", "absorption"),
    ("sparse_probing", "sae", "sae_top_1_test_accuracy", "sparse probing, one latent"),
    ("scr", "scr_metrics", "scr_metric_threshold_20", "SCR, 20 latents"),
    ("tpp", "tpp_metrics", "tpp_threshold_20_total_metric", "TPP, 20 latents"),
    ("unlearning", "unlearning", "unlearning_score", "unlearning"),
)


def model_card(made: ExportResult, run: Path, repo: str, base: str | None) -> str:
    """README.md of a repository with a SAELens directory. `base`: the model's id on the Hub."""
    about = made.about
    head = {"library_name": "saelens", "tags": ["sparse-autoencoder", "saelens"]}
    if base is not None:
        head["base_model"] = base
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    config = read_json(made.folder / "cfg.json")
    lines = [
        f"---\n{front}---\n",
        f"# {about.get('variant') or config['architecture']} on {about.get('model_name', 'a language model')}, {about.get('hook_name', '')}\n",
        f"A sparse autoencoder of {config['d_sae']:,} latents on activations of width {config['d_in']:,}, made by {about['created_by']}. "
        f"Its activation is `{about['training_architecture']}`; saved for SAELens as `{config['architecture']}`, with raw activations in, "
        "unit decoder rows, b_dec inside b_enc and float32 weights.\n",
        f"Checked before it was uploaded: {made.check}.\n",
    ]
    if "approximation" in about:
        lines.append(f"**An approximation**: {'; '.join(made.notes)}.\n")
    if numbers := evaluation_numbers(run):
        lines += [
            "## Numbers\n",
            markdown_table(("metric", "value"), numbers),
            "By `sae evaluate`, on held-out text.\n",
        ]
    lines += [
        "## Loading\n",
        f'```python\nfrom huggingface_hub import snapshot_download\nfrom sae_lens import SAE\n\nsae = SAE.load_from_disk(snapshot_download("{repo}"))\nf = sae.encode(x)\n```\n',
        f"```bash\nsae import hf://{repo}\n```\n",
    ]
    recipe = {k: about[k] for k in ("variant", "seed", "training_tokens", "dataset_path", "context_size", "model_revision", "cache_digest") if about.get(k) is not None}  # fmt: skip
    recipe |= {k: v for k, v in (about.get("training_options") or {}).items() if v is not None}
    lines += ["## Training\n", markdown_table(("option", "value"), [(k, str(v)) for k, v in recipe.items()])]
    return "\n".join(lines)


def evaluation_numbers(run: Path) -> list[tuple[str, str]]:
    """What evaluations/ of a run says, of the numbers above; a stand-in's data set is called so."""
    found = []
    for name, category, number, heading in CARD_METRICS:
        for path, aside in ((f"{name}.json", ""), (f"{name}_stdlib.json", ", on texts of Python's standard library")):
            with contextlib.suppress(SaeError, KeyError, TypeError, ValueError):
                metrics: Any = read_json(run / "evaluations" / path)["eval_result_metrics"]
                if (value := float(metrics[category][number])) != -1:  # SAEBench's mark of what was not measured
                    found.append((heading + aside, f"{value:.4g}"))
    return found


def markdown_table(heads: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    text = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join(text + [f"| {a} | {b.replace('|', chr(92) + '|')} |" for a, b in rows]) + "\n"
