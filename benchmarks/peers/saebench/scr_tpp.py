"""SAEBench's SCR and TPP."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from saebench.shared import PAIRS, SEED, Problem, Recorder, load_saes, read_result, record_calls, timed
from saebench.texts import Texts, record_rows, without_network
from torch import Tensor
from transformerlens_model import NAME


def run_scr_and_tpp(problem: Problem, runs: list[str], texts: Texts | None, record: Recorder | None, scr: bool) -> None:
    size = problem.about
    config = ScrAndTppEvalConfig(
        model_name=NAME, llm_dtype="float32", llm_batch_size=32, random_seed=SEED, context_length=size["context"],
        perform_scr=scr, train_set_size=size["train"], test_set_size=size["test"], column1_vals_lookup=PAIRS,
    )  # fmt: skip
    artifacts, sets = Path("artifacts"), 6 if scr else 5  # sets of texts for which latents are ablated, for every n
    steps: list[dict[str, Any]] = []

    def effects(_: Any, result: Any) -> None:
        steps.append({"effects": result})

    def accuracies(arguments: tuple[Any, ...], result: Any) -> None:
        steps[-1]["accuracies"] = result

    def selected(arguments: tuple[Any, ...], result: Tensor) -> None:
        _, n, name = arguments
        if n > 50:
            return
        steps[-1].setdefault("selected", {}).setdefault(name, {})[n] = torch.nonzero(result).flatten().tolist()

    def ablated(_: Any, result: Tensor) -> None:
        kept = steps[-1].setdefault("ablated", [])
        if len(kept) < 3 * sets:
            kept.append(result)

    with without_network(problem, texts), contextlib.ExitStack() as stack:
        if record:
            for name, callback in (
                ("get_all_node_effects_for_one_sae", effects), ("perform_feature_ablations", accuracies),
                ("select_top_n_features", selected), ("ablated_precomputed_activations", ablated),
            ):  # fmt: skip
                stack.enter_context(record_calls(scr_and_tpp, name, callback))
            stack.enter_context(
                record_calls(dataset_creation, "get_train_test_data", record_rows(problem, record, "rows"))
            )
        for run, sae in load_saes(problem, runs):
            with timed(run):
                scr_and_tpp.run_eval(config, [(run, sae)], "cpu", "results", artifacts_path=str(artifacts))
            if record:
                folder = "scr" if scr else "tpp"
                record.json[run] = read_result(Path(f"results/{folder}/{run}_custom_sae_eval_results.json"))
                if run.endswith(".first"):
                    steps.clear()
                for task, step in zip(task_names(scr), steps, strict=not run.endswith(".first")):
                    record.json[run].setdefault("steps", {})[task] = {n: step[n] for n in ("selected", "accuracies")}
                    for name, effect in step["effects"].items():
                        record.tensors[f"{run}/{task}/effects/{name}"] = effect
                    evaluated = list(record.json["rows"][task]["test"]) if scr else list(step["effects"])
                    # at the third n of the first ablated class
                    for name, x_ND in zip(evaluated, step["ablated"][2 * sets :], strict=True):
                        record.tensors[f"{run}/{task}/ablated/{name}"] = x_ND[:8].clone()
                steps.clear()
    if record:
        for task in task_names(scr):
            stem = task.replace("/", "_") if not scr else "_".join(task.rsplit("/", 2)).replace("/", "_")
            path = artifacts / ("scr" if scr else "tpp") / NAME / f"blocks.{size['layer']}.hook_resid_post"
            with (path / f"{stem}_probes.pkl").open("rb") as file:
                probes = pickle.load(file)
            record.json.setdefault("clean_accuracies", {})[task] = probes["llm_test_accuracies"]
            for name, probe in probes["llm_probes"].items():
                record.tensors[f"{task}/probe/{name}/weight"] = probe.net.weight[0]
                record.tensors[f"{task}/probe/{name}/bias"] = probe.net.bias


def task_names(scr: bool) -> list[str]:
    """The names of the rows: a dataset, or a dataset and its pair of classes."""
    return ["/".join((d, *pair)) for d, pairs in PAIRS.items() for pair in pairs] if scr else list(PAIRS)


def record_scr_edge_cases(record: Recorder) -> None:
    """Record SCR's scores for made-up accuracies (including a tie, and a direction in which accuracy cannot rise), and
    which latents are selected."""
    biased = "male_professor / female_nurse"
    for name, (first, second, clean) in {
        "first is worse": (0.6, 0.7, 0.9), "second is worse": (0.7, 0.6, 0.9), "equal": (0.65, 0.65, 0.9),
        "no room": (0.8995, 0.95, 0.9), "less than no room": (0.95, 0.99, 0.9),
    }.items():  # fmt: skip
        on = {"professor / nurse": first, "male / female": second}
        clean_of = {"male / female": clean, "professor / nurse": clean, biased: 0.99}
        clean_of |= {f"{biased} probe on {task} data": accuracy for task, accuracy in on.items()}
        after = {
            ablated: {
                n: {f"{biased} probe on {task} data": on[task] + change for task in on}
                for n, change in ((2, 0.05), (10, -0.1))
            }
            for ablated in ("male / female", "professor / nurse")
        }
        found = scr_and_tpp.get_scr_plotting_dict(after, clean_of)
        record.json.setdefault("edges", {})[name] = {"clean": clean_of, "ablated": after, "scores": found}
    effects = torch.tensor([0.0, -0.5, 0.2, 0.0, 0.7, -0.1])
    record.json["selection"] = [
        {
            "effects": effects,
            "n": n,
            "selected": torch.nonzero(scr_and_tpp.select_top_n_features(effects, n, "")).flatten(),
        }
        for n in (1, 2, 3, 4, 5, 6)
    ]
    try:
        scr_and_tpp.select_top_n_features(effects, 7, "")
    except AssertionError as error:
        record.json["selection_of_too_many"] = str(error)
