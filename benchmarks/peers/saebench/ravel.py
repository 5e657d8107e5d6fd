"""SAEBench's RAVEL on the inputs of saebench_ravel_problem.py."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sae_bench.custom_saes.identity_sae import IdentitySAE
from sae_bench.evals.ravel import instance, intervention, main, mdbm
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.ravel.validation import evaluate_completion
from saebench.shared import Recorder, make_sae, read_result
from torch import Tensor

SETTINGS: dict[str, Any] = {
    "entity_attribute_selection": {"town": ["Land", "Tongue", "Tint"], "sage": ["Field", "Home"]},
    "top_n_entities": 13, "num_pairs_per_attribute": 32, "learning_rate": 0.05, "num_epochs": 3,
    "n_generated_tokens": 3, "llm_dtype": "float32", "llm_batch_size": 8,
}  # fmt: skip
KINDS = ("relu", "topk", "jumprelu", "identity")
# Questions, values and answers; SAEBench judges all their combinations.
TEXTS = ("the country is", "the language is", "the latitude is", "the longitude, in coordinates:", "the land of")
VALUES = (
    "France", "North America", "United States", "the United Kingdom", "South Korea", "Mandarin", "Mandarin Chinese",
    "English,French", "Arabic", "-33.9", "48", "", "Fra",
)  # fmt: skip
ANSWERS = (
    " France", "Fra", "", ' "', " france, a", "French", " the United States of", "United Kingdom", "England and",
    "the England", "korea", " South Korea", "North America", "na", "America", "in north america", "chinese", "mandarin",
    "Chinese, a", "english", "french and", "48.2", "-47", "51", "about 34 degrees", "33", 'France" is', 'a\\/b',
    " Arabic",
)  # fmt: skip


def run_ravel(folder: Path, record: Recorder) -> None:
    """Evaluate every SAE, and record masks, pairs, answers and scores."""
    base = Path("artifacts/ravel/base")
    shutil.copytree(folder / "adamkarvonen" / "ravel_prompts", base)
    model_folder = Path("facts-gemma")  # SAEBench chooses the kind of attention by this name
    model_folder.symlink_to(folder)
    record.json["settings"] = SETTINGS
    record_judgements(record)
    about = json.loads((folder / "problem.json").read_text())
    with patch.dict(main.LLM_NAME_MAP, {"facts": str(model_folder)}), recording_answers(record):
        for kind in KINDS:
            sae = identity(about["layer"]) if kind == "identity" else make_sae(folder, kind, about)
            with recording_masks(record, kind):
                main.run_eval(
                    RAVELEvalConfig(model_name="facts", **SETTINGS), [(kind, sae)], "cpu", "results",
                    artifacts_path="artifacts",
                )  # fmt: skip
            result = read_result(Path(f"results/{kind}_custom_sae_eval_results.json"))
            record.json.setdefault("scores", {})[kind] = {
                name: result[name] for name in ("eval_result_metrics", "eval_result_unstructured")
            }


def identity(layer: int) -> Any:
    return IdentitySAE(32, "facts", layer, torch.device("cpu"), torch.float32).requires_grad_(False)


def record_judgements(record: Recorder) -> None:
    """Whether each answer is right, in the order of the nested loops."""
    record.json["judged"] = {"texts": TEXTS, "values": VALUES, "answers": ANSWERS}
    right = [evaluate_completion(text, value, said) for text in TEXTS for value in VALUES for said in ANSWERS]
    record.tensors["judged"] = torch.tensor(right)


@contextlib.contextmanager
def recording_answers(record: Recorder) -> Iterator[None]:
    """Record which questions are answered correctly and which entities are kept."""
    judge, keep = instance.RAVELInstance.evaluate_correctness, instance.RAVELInstance.filter_top_entities

    def evaluate_correctness(self: Any) -> None:
        judge(self)
        name = self.config["entity_type"]
        record.tensors[f"{name}.right"] = torch.tensor([prompt.is_correct for prompt in self.prompts])
        record.tensors[f"{name}.first"] = torch.tensor([prompt.first_generated_token_id for prompt in self.prompts])
        record.tensors[f"{name}.position"] = torch.tensor([prompt.final_entity_token_pos for prompt in self.prompts])

    def filter_top_entities(self: Any, top: int) -> None:
        order = {(prompt.text, prompt.attribute_type): i for i, prompt in enumerate(self.prompts)}
        keep(self, top)
        kept = [order[prompt.text, prompt.attribute_type] for prompt in self.prompts]
        record.tensors[f"{self.config['entity_type']}.kept"] = torch.tensor(kept)

    with patch.multiple(
        instance.RAVELInstance, evaluate_correctness=evaluate_correctness, filter_top_entities=filter_top_entities
    ):
        yield


@contextlib.contextmanager
def recording_masks(record: Recorder, kind: str) -> Iterator[None]:
    """Record the trained mask of every attribute, the wanted tokens, and which answers are right."""
    train, generate, judge = mdbm.train_mdbm, intervention.generate_batched_interventions, evaluate_completion
    attributes = [f"{kind}.{t}.{a}" for t, of in SETTINGS["entity_attribute_selection"].items() for a in of]
    names = iter(attributes)
    right: list[bool] = []

    def train_mdbm(*arguments: Any, train_loader: Any, val_loader: Any, **named: Any) -> Any:
        trained = train(*arguments, train_loader=train_loader, val_loader=val_loader, **named)
        name = next(names)
        record.tensors[f"{name}.mask"] = trained.binary_mask.detach()
        if kind == KINDS[0]:  # the pairs are the same for every SAE
            for part, loader in (("train", train_loader), ("test", val_loader)):
                record.tensors[f"{name.partition('.')[2]}.{part}"] = wanted(loader)
        right.clear()
        trained.name_of_record = name
        return trained

    def generate_batched_interventions(model: Any, trained: Any, *arguments: Any, **named: Any) -> Any:
        found = generate(model, trained, *arguments, **named)
        record.tensors[f"{trained.name_of_record}.right"] = torch.tensor(right)
        return found

    def note(*arguments: Any) -> bool:
        right.append(judge(*arguments))
        return right[-1]

    with (
        patch.object(mdbm, "train_mdbm", train_mdbm),
        patch.object(intervention, "generate_batched_interventions", generate_batched_interventions),
        patch.object(intervention, "evaluate_completion", note),
    ):
        yield


def wanted(loader: Any) -> Tensor:
    """For every pair, shape (N, 2): the first token of the base's answer, and the wanted token."""
    return torch.cat([torch.stack([batch[4], batch[5]], 1) for batch in loader]).to(torch.int16)
