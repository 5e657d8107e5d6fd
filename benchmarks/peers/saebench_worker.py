"""SAEBench's side: `python saebench_worker.py FOLDER METRIC [--time KIND ...]`.

FOLDER is a problem of saebench_problem.py. SAEBench's own functions run on it; only what would come from the network is
put in its place: the model, and the two datasets. What they return, and what they chose on the way, goes to FOLDER/METRIC.
With `--time` nothing is recorded; one line of JSON says what each SAE took, its numbers, and the most memory.
"""

import argparse
import contextlib
import json
import os
import pickle
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from sae_bench.custom_saes.jumprelu_sae import JumpReluSAE
from sae_bench.custom_saes.relu_sae import ReluSAE
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import feature_absorption, k_sparse_probing
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.unlearning import main as unlearning
from sae_bench.evals.unlearning.utils import feature_activation, intervention
from sae_bench.sae_bench_utils import activation_collection, dataset_utils, general_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens import HookedTransformer
from transformerlens_model import NAME, load_model

SEED = 42
BIOS, AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
SETS = {"bios": f"{BIOS}_class_set1", "amazon": AMAZON, "sentiment": f"{AMAZON}_sentiment"}
PAIRS = {SETS["bios"]: [("professor", "nurse")], AMAZON: [("Books", "CDs_and_Vinyl")]}


class Problem:
    """What the folder holds, as SAEBench's objects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = json.loads((folder / "problem.json").read_text())
        self.tables = json.loads((folder / "tables.json").read_text())
        self.contexts = load_file(folder / "contexts.safetensors")["tokens"].long()
        self.model = load_model(folder)

    def sae(self, kind: str) -> Any:
        found = load_file(self.folder / "saes" / kind / "sae.safetensors")
        arrays = {name.removeprefix("activation.0."): tensor for name, tensor in found.items()}
        d_in, d_sae = arrays["W_enc"].shape
        make = {"relu": ReluSAE, "topk": partial(TopKSAE, k=self.about["k"]), "jumprelu": JumpReluSAE}[kind]
        sae = make(
            d_in=d_in, d_sae=d_sae, model_name=NAME, hook_layer=self.about["layer"],
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        if kind == "topk":
            arrays["k"] = sae.k
        sae.load_state_dict(arrays)
        sae.cfg.architecture = kind
        assert sae.check_decoder_norms()
        general_utils._standardize_sae_cfg(sae.cfg)
        return sae.requires_grad_(False)

    def dataset(self, name: str, *_: Any, **__: Any) -> dict[str, dict[str, list[Any]]]:
        return self.tables[name]


class Recorder:
    """Tensors, and what else JSON can hold, under names."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.json: dict[str, Any] = {}

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.tensors:
            save_file({n: t.detach().contiguous() for n, t in self.tensors.items()}, folder / "arrays.safetensors")
        (folder / "results.json").write_text(json.dumps(self.json, default=plain))


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, Tensor)) else str(value)


@contextlib.contextmanager
def listening(module: Any, name: str, heard: Callable[[tuple[Any, ...], Any], None]) -> Iterator[None]:
    """`heard(arguments, result)` after every call of a function of SAEBench by its module."""
    function = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        heard((*arguments, *named.values()), result)
        return result

    with patch.object(module, name, call):
        yield


def result_of(path: Path) -> dict[str, Any]:
    """A result file without what differs from run to run."""
    found = json.loads(path.read_text())
    for name in ("eval_id", "datetime_epoch_millis", "sae_bench_commit_hash"):
        found.pop(name)
    return found


# --- core -----------------------------------------------------------------------------------------------------------


class Store:
    """The contexts in order, batch by batch. SAEBench's own goes on where the reconstruction batches stopped; with
    `rewinds` the sparsity batches begin at the first context again."""

    def __init__(self, contexts: Tensor, size: int, rewinds: bool) -> None:
        self.contexts, self.store_batch_size_prompts, self.rewinds = contexts, size, rewinds
        self.context_size, self.at = contexts.shape[1], 0

    def get_batch_tokens(self, size: int) -> Tensor:
        self.at += size
        return self.contexts[self.at - size : self.at]

    def reset_input_dataset(self) -> None:
        if self.rewinds:
            self.at = 0


def run_core(problem: Problem, kind: str, record: Recorder | None) -> None:
    size, sae = problem.about, problem.sae(kind.split(".")[0])
    variants = {"rewound": (True, True), "continued": (False, True), "everywhere": (True, False)}
    for variant, (rewinds, excludes) in variants.items():
        config = CoreEvalConfig(
            model_name=NAME, batch_size_prompts=size["contexts_per_batch"],
            n_eval_reconstruction_batches=size["reconstruction_batches"],
            n_eval_sparsity_variance_batches=size["sparsity_batches"], context_size=size["context"],
            exclude_special_tokens_from_reconstruction=excludes, compute_kl=True, compute_ce_loss=True, compute_l2_norms=True,
            compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True, llm_dtype="float32",
        )  # fmt: skip
        store = Store(problem.contexts, size["contexts_per_batch"], rewinds)
        specials = {problem.model.tokenizer.pad_token_id, problem.model.tokenizer.eos_token_id}
        specials.add(problem.model.tokenizer.bos_token_id)
        metrics, latents = core.run_evals(sae, store, problem.model, config, ignore_tokens=specials)
        metrics["misc_metrics"] = core.calculate_misc_metrics(latents)
        if record is None:
            Path(f"results/{kind}_custom_sae_eval_results.json").write_text(
                json.dumps({"eval_result_metrics": metrics}, default=plain)
            )
            return
        found = core.replace_nans_with_negative_one({"metrics": metrics, "feature_metrics": latents})
        path = Path("core.json")
        core.save_single_eval_result(
            {**found, "eval_cfg": config, "sae_id": "custom_sae", "sae_set": kind},
            "",
            version("sae-lens"),
            "",
            str(path),
            sae,
        )
        result = result_of(path)
        details = result.pop("eval_result_details")
        counted = ("feature_density", "consistent_activation_heuristic")  # the others are of the weights alone
        for name in details[0]:
            if name in counted or variant == "rewound" and name != "index":
                column = torch.tensor([entry[name] for entry in details], dtype=torch.float64)
                record.tensors[f"{kind}.{variant}.{name}"] = column.float()
        record.json.setdefault(kind, {})[variant] = {**result, "eval_result_details": details[:2]}


def core_inputs(problem: Problem, record: Recorder) -> None:
    layer, model = problem.about["layer"], problem.model
    ids = problem.contexts[:2]
    logits, cache = model.run_with_cache(ids, names_filter=f"blocks.{layer}.hook_resid_post")
    record.tensors["residual"] = cache[f"blocks.{layer}.hook_resid_post"]
    record.tensors["logits"] = logits[:, :, :64]


# --- texts: sparse probing, SCR, TPP --------------------------------------------------------------------------------


class Texts:
    """The rows of the tables as activations, rounded to float16 so that they can be stored; SAEBench computes in float32."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.rows, self.arrays = problem, {}, {}
        for table, splits in problem.tables.items():
            for split, columns in splits.items():
                texts = columns["hard_text" if table == BIOS else "text"]
                ids_NS = self.tokens(texts)
                x_NSD = activation_collection.get_llm_activations(
                    ids_NS, problem.model, 32, problem.about["layer"], f"blocks.{problem.about['layer']}.hook_resid_post",
                    mask_bos_pad_eos_tokens=True, show_progress=False,
                ).half()  # fmt: skip
                kept_NS = activation_collection.get_bos_pad_eos_mask(ids_NS, problem.model.tokenizer)
                assert torch.equal(kept_NS, x_NSD.float().sum(-1) != 0)
                self.rows |= {ids.numpy().tobytes(): x.float() for ids, x in zip(ids_NS, x_NSD, strict=True)}
                name = f"{'bios' if table == BIOS else 'amazon'}.{split}"
                self.arrays[f"{name}.tokens"] = ids_NS.to(torch.int16)
                self.arrays[f"{name}.activations"] = x_NSD[kept_NS]

    def tokens(self, texts: list[str]) -> Tensor:
        length, tokenizer = self.problem.about["context"], self.problem.model.tokenizer
        return dataset_utils.tokenize_data_dictionary({"": texts}, tokenizer, length, "cpu")[""]["input_ids"]

    def of(self, tokenized: dict[str, dict[str, Tensor]], *_: Any, **__: Any) -> dict[str, Tensor]:
        """In place of SAEBench's pass through the model."""
        return {
            name: torch.stack([self.rows[ids.numpy().tobytes()] for ids in found["input_ids"]])
            for name, found in tokenized.items()
        }


def offline(problem: Problem, texts: Texts | None) -> contextlib.ExitStack:
    """The model and the tables instead of the network; with `texts`, their activations instead of the model."""
    stack = contextlib.ExitStack()
    given = staticmethod(lambda *_, **__: problem.model)
    stack.enter_context(patch.object(HookedTransformer, "from_pretrained_no_processing", given))
    for module in (dataset_utils, dataset_creation):
        stack.enter_context(patch.object(module, "load_dataset", problem.dataset))
    if texts:
        stack.enter_context(patch.object(activation_collection, "get_all_llm_activations", texts.of))
    return stack


def chosen(problem: Problem, dataset: str, split: str, texts: dict[str, list[str]]) -> dict[str, list[int]]:
    """Texts as rows of their table."""
    table = problem.tables[BIOS if dataset.startswith(BIOS) else AMAZON][split]
    row_of = {text: row for row, text in enumerate(table["hard_text" if "hard_text" in table else "text"])}
    return {name: [row_of[text] for text in found] for name, found in texts.items()}


def note_choice(problem: Problem, record: Recorder, name: str) -> Callable[[tuple[Any, ...], Any], None]:
    def heard(arguments: tuple[Any, ...], result: Any) -> None:
        key = "/".join(
            str(part) for part in (arguments[0], *(arguments[5] if len(arguments) > 5 and arguments[5] else ()))
        )
        splits = zip(("train", "test"), result, strict=True)
        record.json.setdefault(name, {})[key] = {s: chosen(problem, arguments[0], s, t) for s, t in splits}

    return heard


def sae_list(problem: Problem, kinds: list[str]) -> list[tuple[str, Any]]:
    return [(kind, problem.sae(kind.split(".")[0])) for kind in kinds]


def run_sparse_probing(problem: Problem, runs: list[str], texts: Texts | None, record: Recorder | None) -> None:
    size = problem.about
    config = SparseProbingEvalConfig(
        model_name=NAME, llm_dtype="float32", llm_batch_size=32, random_seed=SEED, context_length=size["context"],
        dataset_names=[SETS["bios"], SETS["sentiment"]], probe_train_set_size=size["train"], probe_test_set_size=size["test"],
    )  # fmt: skip
    probes: list[dict[str, Any]] = []
    latents: list[list[int]] = []
    tested: list[None] = []

    def masked(_: Any, mask: Tensor) -> None:
        latents.append(torch.nonzero(~mask).flatten().tolist())

    def fitted(arguments: tuple[Any, ...], result: Any) -> None:
        probe, accuracy = result
        found = {"coef": probe.coef_[0], "intercept": probe.intercept_[0], "train_labels": bits(arguments[1])}
        probes.append({"latents": latents.pop(), **found, "test_labels": bits(arguments[3]), "accuracy": accuracy})

    def trained(arguments: tuple[Any, ...], result: Any) -> None:
        probe, accuracy = result
        found = {"epochs": len(tested) // 2, "accuracy": accuracy, "train_labels": bits(arguments[1])}
        tested.clear()
        probes.append({"probe": probe, **found, "test_labels": bits(arguments[3])})

    with offline(problem, texts), contextlib.ExitStack() as stack:
        if record:
            for name, heard in (
                ("get_top_k_mean_diff_mask", masked), ("train_sklearn_probe", fitted), ("train_probe_gpu", trained),
                ("test_probe_gpu", lambda *_: tested.append(None)),
            ):  # fmt: skip
                stack.enter_context(listening(probe_training, name, heard))
            note = note_choice(problem, record, "rows")
            stack.enter_context(listening(dataset_utils, "get_multi_label_train_test_data", note))
        for run, sae in sae_list(problem, runs):
            with timed(run):
                sparse_probing.run_eval(config, [(run, sae)], "cpu", "results", artifacts_path="artifacts")
            if record:
                record.json[run] = result_of(Path(f"results/{run}_custom_sae_eval_results.json"))
                record.json[run]["probes"] = named_probes(record, run, probes, config)
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


def bits(labels: Tensor) -> str:
    return "".join(str(int(label)) for label in labels)


def named_probes(record: Recorder, run: str, probes: list[dict[str, Any]], config: Any) -> dict[str, Any]:
    """In the order of SAEBench: dataset by dataset; on the first run the model's own; all latents, then each k."""
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


def run_scr_and_tpp(problem: Problem, runs: list[str], texts: Texts | None, record: Recorder | None, scr: bool) -> None:
    size = problem.about
    config = ScrAndTppEvalConfig(
        model_name=NAME, llm_dtype="float32", llm_batch_size=32, random_seed=SEED, context_length=size["context"],
        perform_scr=scr, train_set_size=size["train"], test_set_size=size["test"], column1_vals_lookup=PAIRS,
    )  # fmt: skip
    artifacts, sets = Path("artifacts"), 6 if scr else 5  # of texts that are ablated for every n
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

    with offline(problem, texts), contextlib.ExitStack() as stack:
        if record:
            for name, heard in (
                ("get_all_node_effects_for_one_sae", effects), ("perform_feature_ablations", accuracies),
                ("select_top_n_features", selected), ("ablated_precomputed_activations", ablated),
            ):  # fmt: skip
                stack.enter_context(listening(scr_and_tpp, name, heard))
            stack.enter_context(
                listening(dataset_creation, "get_train_test_data", note_choice(problem, record, "rows"))
            )
        for run, sae in sae_list(problem, runs):
            with timed(run):
                scr_and_tpp.run_eval(config, [(run, sae)], "cpu", "results", artifacts_path=str(artifacts))
            if record:
                folder = "scr" if scr else "tpp"
                record.json[run] = result_of(Path(f"results/{folder}/{run}_custom_sae_eval_results.json"))
                if run.endswith(".first"):
                    steps.clear()
                for task, step in zip(tasks(scr), steps, strict=not run.endswith(".first")):
                    record.json[run].setdefault("steps", {})[task] = {n: step[n] for n in ("selected", "accuracies")}
                    for name, effect in step["effects"].items():
                        record.tensors[f"{run}/{task}/effects/{name}"] = effect
                    evaluated = list(record.json["rows"][task]["test"]) if scr else list(step["effects"])
                    # at the third n of the first ablated class
                    for name, x_ND in zip(evaluated, step["ablated"][2 * sets :], strict=True):
                        record.tensors[f"{run}/{task}/ablated/{name}"] = x_ND[:8].clone()
                steps.clear()
    if record:
        for task in tasks(scr):
            stem = task.replace("/", "_") if not scr else "_".join(task.rsplit("/", 2)).replace("/", "_")
            path = artifacts / ("scr" if scr else "tpp") / NAME / f"blocks.{size['layer']}.hook_resid_post"
            with (path / f"{stem}_probes.pkl").open("rb") as file:
                probes = pickle.load(file)
            record.json.setdefault("clean_accuracies", {})[task] = probes["llm_test_accuracies"]
            for name, probe in probes["llm_probes"].items():
                record.tensors[f"{task}/probe/{name}/weight"] = probe.net.weight[0]
                record.tensors[f"{task}/probe/{name}/bias"] = probe.net.bias


def tasks(scr: bool) -> list[str]:
    """As the rows are named: a dataset, or a dataset and its pair of classes."""
    return ["/".join((d, *pair)) for d, pairs in PAIRS.items() for pair in pairs] if scr else list(PAIRS)


def scr_edges(record: Recorder) -> None:
    """SCR's scores from made-up accuracies: a direction that has no room, a tie, and neither; and TPP's."""
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


# --- absorption -----------------------------------------------------------------------------------------------------


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
    with offline(problem, None), contextlib.ExitStack() as stack:
        for module, name, other in (
            (absorption, "run_k_sparse_probing_experiment", own), (absorption, "run_feature_absortion_experiment", measured),
            (absorption_common, "get_alpha_tokens", lambda _: words), (feature_absorption, "get_alpha_tokens", lambda _: words),
        ):  # fmt: skip
            stack.enter_context(patch.object(module, name, other))
        if record:
            heard = lambda _, probe: l1.append(probe.weights.detach().clone())  # noqa: E731
            stack.enter_context(listening(k_sparse_probing, "train_sparse_multi_probe", heard))
            seed()
            absorption_common.train_and_save_probes(
                model, [layer], config.prompt_template, config.prompt_token_pos, probes_dir=probes, device="cpu"
            )
            absorption_inputs(problem, record, probes / NAME / f"layer_{layer}", config)
        for run, sae in sae_list(problem, runs):
            if record:
                seed()
                fresh.clear()
                stack.enter_context(patch.object(model, "run_with_cache", keep))
            with timed(run):
                absorption.run_eval(config, [(run, sae)], "cpu", "results")
            if not Path(f"results/{run}_custom_sae_eval_results.json").exists():
                raise SystemExit("SAEBench gave up: fewer than 20 letters can be read. Give it more words a letter.")
            if record:
                record.json[run] = result_of(Path(f"results/{run}_custom_sae_eval_results.json"))
                if run == runs[0]:
                    record.tensors["l1_probe.weight"] = l1[-1]
                assert torch.equal(record.tensors.setdefault("fresh.activations", torch.cat(fresh)), torch.cat(fresh))
                absorption_tables(record, run, layer, words)
        if record:
            full_absorption(problem, record, fresh)


def full_absorption(problem: Problem, record: Recorder, fresh: list[Tensor]) -> None:
    """The measured words once more, through an SAE of two latents a token. Every second letter's main latent is not the
    one that fires for it: most of those words are fully absorbed."""
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


def seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def indices(prompts: list[str], words: list[str]) -> Tensor:
    """(N, 11): the ten examples of each prompt, then its word, as numbers of `words`."""
    number, end = {word: i for i, word in enumerate(words)}, " has the first letter:"
    found = [[number[line[: line.index(end)]] for line in prompt.split("\n")[1:]] for prompt in prompts]
    return torch.tensor(found, dtype=torch.int16)


def absorption_inputs(problem: Problem, record: Recorder, folder: Path, config: Any) -> None:
    words = problem.about["words"]
    data = np.load(folder / "data.npz")
    for split in ("train", "test"):
        table = pd.read_csv(folder / f"{split}_df.csv", keep_default_na=False, na_values=[""])
        record.tensors[f"{split}.prompts"] = indices(table["prompt"].tolist(), words)
        record.tensors[f"{split}.activations"] = torch.from_numpy(data[f"X_{split}"])
        record.tensors[f"{split}.labels"] = torch.from_numpy(data[f"y_{split}"]).to(torch.int8)
    probe = torch.load(folder / "probe.pth", weights_only=False)
    record.tensors["probe.weight"], record.tensors["probe.bias"] = probe.weights, probe.biases
    prompt = pd.read_csv(folder / "train_df.csv")["prompt"][0]
    tokens = problem.model.to_tokens(prompt)[0]
    record.json["prompt"] = {"text": prompt, "tokens": tokens, "position": config.prompt_token_pos}


def absorption_tables(record: Recorder, run: str, layer: int, words: list[str]) -> None:
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
    record.tensors["fresh.prompts"] = indices(table["prompt"].tolist(), words)
    columns = ["letter", "token", "absorption_fraction", "is_full_absorption", "split_feats", "top_projection_feat",
               "top_probe_projection", "top_projection_feat_probe_cos", "num_probe_true_positives"]  # fmt: skip
    record.json[run]["words"] = {name: table[name].tolist() for name in columns}


# --- unlearning -----------------------------------------------------------------------------------------------------


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
        "forget": [0.5, 0.3, 0.3, 0.0, 0.3, 0.9, 0.0000004, 0.2], "retain": [0.0, 0.001, 0.0, 0.0, 0.01, 0.5, 0.0, 0.0099996]
    }  # fmt: skip
    feature_activation.save_results(
        "frequencies", "ties", *(np.array(ties[n], np.float32) for n in ("forget", "retain"))
    )
    forget, retain = feature_activation.load_sparsity_data("frequencies", "ties")
    record.json["ties"] = ties | {
        "read_back": {"forget": forget, "retain": retain},
        "selected": {t: feature_activation.get_top_features(forget, retain, t) for t in (0.001, 0.01)},
    }
    unlearning_scores(record)


def unlearning_scores(record: Recorder) -> None:
    """The score from made-up numbers of right answers: of wmdp-bio's 533 and of the 308 others, one setting a file."""
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
            metrics = {"wmdp-bio": counted(wmdp, 533)}
            wrong = 308 - right
            for name, total in others.items():
                lost = min(wrong, total)
                wrong -= lost
                metrics[name] = counted(total - lost, total)
            name = f"clamp_feature_activation_multiplier{25 * (number + 1)}_nfeatures10_layer0_retainthres0.01.pkl"
            (folder / name).write_bytes(pickle.dumps(metrics | {"ablate_params": {}}))
        table = unlearning.get_metrics_df(str(folder))
        score = unlearning.get_unlearning_scores(table)
        record.json.setdefault("scores", {})[case] = {"right": settings, "of": [533, 308], "score": score}


def counted(right: int, total: int) -> dict[str, Any]:
    is_correct = np.arange(total) < right
    return {
        "mean_correct": float(is_correct.astype(np.float32).mean()),
        "total_correct": right,
        "is_correct": is_correct,
    }


# --- the rest -------------------------------------------------------------------------------------------------------

spent: dict[str, dict[str, Any]] = {}  # of each run: seconds, processor seconds, and its numbers


@contextlib.contextmanager
def timed(run: str) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    spent[run] = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def run(problem: Problem, metric: str, kinds: list[str], record: Recorder | None) -> None:
    texts = Texts(problem) if record and metric in ("texts", "sparse_probing", "scr", "tpp") else None
    numbered = [f"{kind}.{number}" for number, kind in enumerate(kinds)]  # SAEBench passes over a name that it has seen
    runs = [f"{kinds[0]}.first", *kinds] if record else numbered
    if metric == "core":
        for kind in kinds if record else numbered:
            with timed(kind):
                run_core(problem, kind, record)
        if record:
            core_inputs(problem, record)
    elif metric == "texts":
        assert texts and record
        record.tensors = texts.arrays
    elif metric == "sparse_probing":
        run_sparse_probing(problem, runs, texts, record)
    elif metric in ("scr", "tpp"):
        run_scr_and_tpp(problem, runs, texts, record, metric == "scr")
        if record and metric == "scr":
            scr_edges(record)
    elif metric == "absorption":
        run_absorption(problem, kinds if record else numbered, record)
    elif metric == "unlearning" and record:
        run_unlearning(problem, record)
    else:
        raise SystemExit(f"{metric} cannot be run so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("metric")
    parser.add_argument("--time", nargs="+", metavar="KIND", help="the kinds of SAE to time, one after the other")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = asked.folder.resolve()
    problem = Problem(folder)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        Path("results").mkdir()
        record = None if asked.time else Recorder()
        if record:
            seed()
        run(problem, asked.metric, asked.time or ["relu", "topk", "jumprelu"], record)
        for name, found in spent.items() if asked.time else ():
            (path,) = Path("results").rglob(f"{name}_custom_sae_eval_results.json")
            found["numbers"] = json.loads(path.read_text())["eval_result_metrics"]
    if record:
        names = (
            "sae-bench",
            "sae-lens",
            "transformer-lens",
            "transformers",
            "torch",
            "numpy",
            "scikit-learn",
            "pandas",
        )
        record.json["versions"] = {name: version(name) for name in names}
        record.write(folder / asked.metric)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps({"saes": list(spent.values()), "peak_mb": peak}))


if __name__ == "__main__":
    main()
