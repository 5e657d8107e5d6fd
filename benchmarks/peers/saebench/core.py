"""SAEBench's core."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from saebench.shared import Problem, Recorder, read_result, to_json
from torch import Tensor
from transformerlens_model import NAME


class Store:
    """The contexts in order, batch by batch.

    SAEBench's own store continues where the reconstruction batches stopped; if `rewinds` is set, the sparsity batches
    start at the first context again.
    """

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
            model_name=NAME,
            batch_size_prompts=size["contexts_per_batch"],
            n_eval_reconstruction_batches=size["reconstruction_batches"],
            n_eval_sparsity_variance_batches=size["sparsity_batches"],
            context_size=size["context"],
            exclude_special_tokens_from_reconstruction=excludes,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            llm_dtype="float32",
        )
        store = Store(problem.contexts, size["contexts_per_batch"], rewinds)
        specials = {problem.model.tokenizer.pad_token_id, problem.model.tokenizer.eos_token_id}
        specials.add(problem.model.tokenizer.bos_token_id)
        metrics, latents = core.run_evals(sae, store, problem.model, config, ignore_tokens=specials)
        metrics["misc_metrics"] = core.calculate_misc_metrics(latents)
        if record is None:
            Path(f"results/{kind}_custom_sae_eval_results.json").write_text(
                json.dumps({"eval_result_metrics": metrics}, default=to_json)
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
        result = read_result(path)
        details = result.pop("eval_result_details")
        counted = ("feature_density", "consistent_activation_heuristic")  # the others depend on the weights only
        for name in details[0]:
            if name in counted or variant == "rewound" and name != "index":
                column = torch.tensor([entry[name] for entry in details], dtype=torch.float64)
                record.tensors[f"{kind}.{variant}.{name}"] = column.float()
        record.json.setdefault(kind, {})[variant] = {**result, "eval_result_details": details[:2]}


def record_core_inputs(problem: Problem, record: Recorder) -> None:
    layer, model = problem.about["layer"], problem.model
    ids = problem.contexts[:2]
    logits, cache = model.run_with_cache(ids, names_filter=f"blocks.{layer}.hook_resid_post")
    record.tensors["residual"] = cache[f"blocks.{layer}.hook_resid_post"]
    record.tensors["logits"] = logits[:, :, :64]
