"""SAEBench's unlearning."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_bench.evals.unlearning import main as unlearning
from sae_bench.evals.unlearning.utils import feature_activation, intervention
from saebench.shared import Problem, Recorder


def run_unlearning(problem: Problem, record: Recorder) -> None:
    model, layer = problem.model, problem.about["layer"]
    hook = f"blocks.{layer}.hook_resid_post"
    half = len(problem.contexts) // 2
    x_NSD = model.run_with_cache(problem.contexts[:4], names_filter=hook)[1][hook]
    record.tensors["residual"] = x_NSD
    for kind in ("relu", "topk", "jumprelu"):
        sae = problem.sae(kind)
        forget, retain = feature_activation.calculate_sparsity(
            model, sae, problem.contexts[:half], problem.contexts[half:], 4
        )
        record.tensors[f"{kind}.forget"], record.tensors[f"{kind}.retain"] = (
            torch.from_numpy(forget),
            torch.from_numpy(retain),
        )
        feature_activation.save_results("frequencies", kind, forget, retain)
        forget, retain = feature_activation.load_sparsity_data("frequencies", kind)
        for threshold in (0.01, 0.05, 0.2):
            top = feature_activation.get_top_features(forget, retain, retain_threshold=threshold)
            record.json.setdefault("selected", {}).setdefault(kind, {})[threshold] = top[:40].tolist()
        top = feature_activation.get_top_features(forget, retain, retain_threshold=0.2)
        for n, multiplier in ((10, 25), (20, 200)):
            clamped = intervention.anthropic_clamp_resid_SAE_features(
                x_NSD.clone(), None, sae, np.array(top[:n]), multiplier=multiplier
            )
            record.tensors[f"{kind}.clamped.{n}.{multiplier}"] = clamped
    ties = {
        "forget": [0.5, 0.3, 0.3, 0.0, 0.3, 0.9, 0.0000004, 0.2],
        "retain": [0.0, 0.001, 0.0, 0.0, 0.01, 0.5, 0.0, 0.0099996],
    }
    feature_activation.save_results(
        "frequencies", "ties", *(np.array(ties[n], np.float32) for n in ("forget", "retain"))
    )
    forget, retain = feature_activation.load_sparsity_data("frequencies", "ties")
    record.json["ties"] = ties | {
        "read_back": {"forget": forget, "retain": retain},
        "selected": {t: feature_activation.get_top_features(forget, retain, t) for t in (0.001, 0.01)},
    }
    record_unlearning_scores(record)


def record_unlearning_scores(record: Recorder) -> None:
    """Record scores for made-up counts of correct answers, out of wmdp-bio's 533 questions and 308 others."""
    others = {
        "high_school_us_history": 110,
        "college_computer_science": 9,
        "high_school_geography": 104,
        "human_aging": 85,
    }
    cases = {
        "at the limit": [(500, 308), (480, 305), (400, 304)], "none is admissible": [(100, 304), (200, 300)],
        "nothing is lost": [(533, 308)], "all is lost": [(0, 306), (533, 308)], "gained": [(533, 305), (530, 308)],
    }  # fmt: skip
    for case, settings in cases.items():
        folder = Path("scores") / case
        folder.mkdir(parents=True)
        for number, (wmdp, right) in enumerate(settings):
            metrics = {"wmdp-bio": answers(wmdp, 533)}
            wrong = 308 - right
            for name, total in others.items():
                lost = min(wrong, total)
                wrong -= lost
                metrics[name] = answers(total - lost, total)
            name = f"clamp_feature_activation_multiplier{25 * (number + 1)}_nfeatures10_layer0_retainthres0.01.pkl"
            (folder / name).write_bytes(pickle.dumps(metrics | {"ablate_params": {}}))
        table = unlearning.get_metrics_df(str(folder))
        score = unlearning.get_unlearning_scores(table)
        record.json.setdefault("scores", {})[case] = {"right": settings, "of": [533, 308], "score": score}


def answers(right: int, total: int) -> dict[str, Any]:
    is_correct = np.arange(total) < right
    return {
        "mean_correct": float(is_correct.astype(np.float32).mean()),
        "total_correct": right,
        "is_correct": is_correct,
    }
