"""SAEBench's absorption."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import feature_absorption, k_sparse_probing
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from saebench.shared import SEED, Problem, Recorder, load_saes, read_result, record_calls, set_seed, timed
from saebench.texts import without_network
from torch import Tensor
from transformerlens_model import NAME


def run_absorption(problem: Problem, runs: list[str], record: Recorder | None) -> None:
    config = AbsorptionEvalConfig(model_name=NAME, llm_dtype="float32", llm_batch_size=32, random_seed=SEED)
    layer, model, words = problem.about["layer"], problem.model, problem.about["words"]
    probes = Path("probes")
    l1: list[Tensor] = []
    fresh: list[Tensor] = []
    run_with_cache = model.run_with_cache

    def keep(*arguments: Any, **named: Any) -> Any:
        logits, cache = run_with_cache(*arguments, **named)
        fresh.append(cache[f"blocks.{layer}.hook_resid_post"][:, config.prompt_token_pos])
        return logits, cache

    own = partial(absorption.run_k_sparse_probing_experiment, experiment_dir="k_sparse", probes_dir=probes)
    measured = partial(
        absorption.run_feature_absortion_experiment,
        experiment_dir="absorbed", sparse_probing_experiment_dir="k_sparse", probes_dir=probes,
    )  # fmt: skip
    with without_network(problem, None), contextlib.ExitStack() as stack:
        replacements = (
            (absorption, "run_k_sparse_probing_experiment", own),
            (absorption, "run_feature_absortion_experiment", measured),
            (absorption_common, "get_alpha_tokens", lambda _: words),
            (feature_absorption, "get_alpha_tokens", lambda _: words),
        )
        for module, name, other in replacements:
            stack.enter_context(patch.object(module, name, other))
        if record:
            callback = lambda _, probe: l1.append(probe.weights.detach().clone())  # noqa: E731
            stack.enter_context(record_calls(k_sparse_probing, "train_sparse_multi_probe", callback))
            set_seed()
            absorption_common.train_and_save_probes(
                model, [layer], config.prompt_template, config.prompt_token_pos, probes_dir=probes, device="cpu"
            )
            record_absorption_inputs(problem, record, probes / NAME / f"layer_{layer}", config)
        for run, sae in load_saes(problem, runs):
            if record:
                set_seed()
                fresh.clear()
                stack.enter_context(patch.object(model, "run_with_cache", keep))
            with timed(run):
                absorption.run_eval(config, [(run, sae)], "cpu", "results")
            if not Path(f"results/{run}_custom_sae_eval_results.json").exists():
                raise SystemExit("SAEBench stopped: it can read fewer than 20 letters. Give more words per letter.")
            if record:
                record.json[run] = read_result(Path(f"results/{run}_custom_sae_eval_results.json"))
                if run == runs[0]:
                    record.tensors["l1_probe.weight"] = l1[-1]
                assert torch.equal(record.tensors.setdefault("fresh.activations", torch.cat(fresh)), torch.cat(fresh))
                record_absorption_tables(record, run, layer, words)
        if record:
            record_full_absorption(problem, record, fresh)


def record_full_absorption(problem: Problem, record: Recorder, fresh: list[Tensor]) -> None:
    """Measure the words again with an SAE that has two active latents per token.

    For every second letter, the letter's main latent is not the one that is active on its words, so most of these words
    are fully absorbed.
    """
    size, table = problem.about, record.json["relu"]["words"]
    config = AbsorptionEvalConfig()
    sae = problem.sae("topk")
    sae.k.fill_(2)
    sae.W_enc.mul_(3)
    sae.b_enc.mul_(3)
    calculator = feature_absorption.FeatureAbsorptionCalculator(
        problem.model,
        size["words"],
        max_icl_examples=10,
        base_template=config.prompt_template,
        word_token_pos=config.prompt_token_pos,
    )
    fresh.clear()
    found: dict[str, list[Any]] = {name: [] for name in ("letter", "main", "absorption_fraction", "is_full_absorption")}
    for number, letter in enumerate(sorted(set(table["letter"]))):
        words = [word for word, its in zip(table["token"], table["letter"], strict=True) if its == letter]
        main = [number + 26] if number % 2 else [number, number + 26, number + 52]
        direction = record.tensors["probe.weight"].detach()[number]
        result = calculator.calculate_absorption(sae, words, direction, main, size["layer"], show_progress=False)
        for word in result.word_results:
            values = (letter, main, word.absorption_fraction, word.is_full_absorption)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    record.json["full"] = found
    record.tensors["full.activations"] = torch.cat(fresh)


def word_numbers(prompts: list[str], words: list[str]) -> Tensor:
    """(N, 11): the ten examples of each prompt, then its word, as indices into `words`."""
    number, end = {word: i for i, word in enumerate(words)}, " has the first letter:"
    found = [[number[line[: line.index(end)]] for line in prompt.split("\n")[1:]] for prompt in prompts]
    return torch.tensor(found, dtype=torch.int16)


def record_absorption_inputs(problem: Problem, record: Recorder, folder: Path, config: Any) -> None:
    words = problem.about["words"]
    data = np.load(folder / "data.npz")
    for split in ("train", "test"):
        table = pd.read_csv(folder / f"{split}_df.csv", keep_default_na=False, na_values=[""])
        record.tensors[f"{split}.prompts"] = word_numbers(table["prompt"].tolist(), words)
        record.tensors[f"{split}.activations"] = torch.from_numpy(data[f"X_{split}"])
        record.tensors[f"{split}.labels"] = torch.from_numpy(data[f"y_{split}"]).to(torch.int8)
    probe = torch.load(folder / "probe.pth", weights_only=False)
    record.tensors["probe.weight"], record.tensors["probe.bias"] = probe.weights, probe.biases
    prompt = pd.read_csv(folder / "train_df.csv")["prompt"][0]
    tokens = problem.model.to_tokens(prompt)[0]
    record.json["prompt"] = {"text": prompt, "tokens": tokens, "position": config.prompt_token_pos}


def record_absorption_tables(record: Recorder, run: str, layer: int, words: list[str]) -> None:
    metrics = pd.read_parquet(f"k_sparse/{run}_custom_sae/layer_{layer}_{run}_custom_sae_metrics.parquet")
    k_sparse_probing.add_feature_splits_to_metrics_df(metrics, max_k_value=10)
    letters = {}
    for _, row in metrics.iterrows():
        letters[row["letter"]] = {"f1_probe": row["f1_probe"], "split_features": row["split_feats"]} | {
            name: [row[pattern.format(k)] for k in range(1, 11)]
            for name, pattern in {
                "f1": "f1_sparse_sae_{}",
                "latents": "sparse_sae_k_{}_feats",
                "coef": "sparse_sae_k_{}_weights",
                "intercept": "sparse_sae_k_{}_bias",
            }.items()  # fmt: skip
        }
    for letter in letters.values():  # top-k sets are nested: the last has all
        letter["latents"] = letter["latents"][-1]
    record.json[run]["letters"] = letters
    table = pd.read_parquet(f"absorbed/{run}_custom_sae/layer_{layer}_{run}_custom_sae.parquet")
    record.tensors["fresh.prompts"] = word_numbers(table["prompt"].tolist(), words)
    columns = ["letter", "token", "absorption_fraction", "is_full_absorption", "split_feats", "top_projection_feat",
               "top_probe_projection", "top_projection_feat_probe_cos", "num_probe_true_positives"]  # fmt: skip
    record.json[run]["words"] = {name: table[name].tolist() for name in columns}
