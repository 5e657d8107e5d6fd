"""SAEBench's sparse probing."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import activation_collection, dataset_utils
from saebench.shared import SEED, SETS, Problem, Recorder, load_saes, read_result, record_calls, timed
from saebench.texts import Texts, record_rows, without_network
from torch import Tensor
from transformerlens_model import NAME


def run_sparse_probing(problem: Problem, runs: list[str], texts: Texts | None, record: Recorder | None) -> None:
    size = problem.about
    config = SparseProbingEvalConfig(
        model_name=NAME,
        llm_dtype="float32",
        llm_batch_size=32,
        random_seed=SEED,
        context_length=size["context"],
        dataset_names=[SETS["bios"], SETS["sentiment"]],
        probe_train_set_size=size["train"],
        probe_test_set_size=size["test"],
    )
    probes: list[dict[str, Any]] = []
    latents: list[list[int]] = []
    tested: list[None] = []

    def masked(_: Any, mask: Tensor) -> None:
        latents.append(torch.nonzero(~mask).flatten().tolist())

    def fitted(arguments: tuple[Any, ...], result: Any) -> None:
        probe, accuracy = result
        found = {"coef": probe.coef_[0], "intercept": probe.intercept_[0], "train_labels": bit_string(arguments[1])}
        probes.append(
            {"latents": latents.pop(), **found, "test_labels": bit_string(arguments[3]), "accuracy": accuracy}
        )

    def trained(arguments: tuple[Any, ...], result: Any) -> None:
        probe, accuracy = result
        found = {"epochs": len(tested) // 2, "accuracy": accuracy, "train_labels": bit_string(arguments[1])}
        tested.clear()
        probes.append({"probe": probe, **found, "test_labels": bit_string(arguments[3])})

    with without_network(problem, texts), contextlib.ExitStack() as stack:
        if record:
            for name, callback in (
                ("get_top_k_mean_diff_mask", masked), ("train_sklearn_probe", fitted), ("train_probe_gpu", trained),
                ("test_probe_gpu", lambda *_: tested.append(None)),
            ):  # fmt: skip
                stack.enter_context(record_calls(probe_training, name, callback))
            note = record_rows(problem, record, "rows")
            stack.enter_context(record_calls(dataset_utils, "get_multi_label_train_test_data", note))
        for run, sae in load_saes(problem, runs):
            with timed(run):
                sparse_probing.run_eval(config, [(run, sae)], "cpu", "results", artifacts_path="artifacts")
            if record:
                record.json[run] = read_result(Path(f"results/{run}_custom_sae_eval_results.json"))
                record.json[run]["probes"] = name_probes(record, run, probes, config)
                probes.clear()
    if record:
        assert texts
        name = SETS["bios"]
        first = {c: torch.stack([texts.rows[i.tobytes()] for i in tokens_of(texts, "bios.train", rows[:4])])
                 for c, rows in record.json["rows"][name]["train"].items() if c in ("0", "1")}  # fmt: skip
        record.tensors |= {
            f"llm_mean.{c}": t for c, t in activation_collection.create_meaned_model_activations(first).items()
        }
        for kind in ("relu", "topk", "jumprelu"):
            pooled = activation_collection.get_sae_meaned_activations(first, problem.sae(kind), config.sae_batch_size)
            record.tensors |= {f"{kind}.pooled.{c}": t for c, t in pooled.items()}


def tokens_of(texts: Texts, name: str, rows: list[int]) -> np.ndarray:
    return texts.arrays[f"{name}.tokens"][rows].long().numpy()


def bit_string(labels: Tensor) -> str:
    return "".join(str(int(label)) for label in labels)


def name_probes(record: Recorder, run: str, probes: list[dict[str, Any]], config: Any) -> dict[str, Any]:
    """Probes by name, in SAEBench's order: for each dataset the model's own probes (on the first run), all latents, and
    each k."""
    from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset

    found: dict[str, Any] = {}
    queue = iter(probes)
    for dataset in config.dataset_names:
        for part in ("llm", "sae") if run.endswith(".first") else ("sae",):
            for k in ("all", *config.k_values):
                for name in chosen_classes_per_dataset[dataset]:
                    probe = next(queue)
                    key = f"{run}/{dataset}/{part}/{k}/{name}"
                    if "probe" in probe:
                        linear = probe.pop("probe").net
                        record.tensors[f"{key}/weight"], record.tensors[f"{key}/bias"] = linear.weight[0], linear.bias
                    found.setdefault(dataset, {}).setdefault(part, {}).setdefault(str(k), {})[name] = probe
    assert next(queue, None) is None
    return found
