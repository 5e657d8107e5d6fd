"""The labeled texts as activations, and which of them SAEBench chose."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.sae_bench_utils import activation_collection, dataset_utils
from saebench.shared import AMAZON, BIOS, Problem, Recorder
from torch import Tensor
from transformer_lens import HookedTransformer


class Texts:
    """The activations of the tables' rows, rounded to float16 for storage; SAEBench computes in float32."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.rows, self.arrays = problem, {}, {}
        for table, splits in problem.tables.items():
            for split, columns in splits.items():
                texts = columns["hard_text" if table == BIOS else "text"]
                ids_NS = self.tokens(texts)
                layer = problem.about["layer"]
                x_NSD = activation_collection.get_llm_activations(
                    ids_NS,
                    problem.model,
                    32,
                    layer,
                    f"blocks.{layer}.hook_resid_post",
                    mask_bos_pad_eos_tokens=True,
                    show_progress=False,
                ).half()
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
        """Replaces SAEBench's pass through the model."""
        return {
            name: torch.stack([self.rows[ids.numpy().tobytes()] for ids in found["input_ids"]])
            for name, found in tokenized.items()
        }


def without_network(problem: Problem, texts: Texts | None) -> contextlib.ExitStack:
    """Replace downloads by the model and the tables. If `texts` is given, its activations replace passes of the
    model."""
    stack = contextlib.ExitStack()
    given = staticmethod(lambda *_, **__: problem.model)
    stack.enter_context(patch.object(HookedTransformer, "from_pretrained_no_processing", given))
    for module in (dataset_utils, dataset_creation):
        stack.enter_context(patch.object(module, "load_dataset", problem.dataset))
    if texts:
        stack.enter_context(patch.object(activation_collection, "get_all_llm_activations", texts.of))
    return stack


def rows_of_texts(problem: Problem, dataset: str, split: str, texts: dict[str, list[str]]) -> dict[str, list[int]]:
    """For each list of texts, the rows of the dataset's table that hold these texts."""
    table = problem.tables[BIOS if dataset.startswith(BIOS) else AMAZON][split]
    row_of = {text: row for row, text in enumerate(table["hard_text" if "hard_text" in table else "text"])}
    return {name: [row_of[text] for text in found] for name, found in texts.items()}


def record_rows(problem: Problem, record: Recorder, name: str) -> Callable[[tuple[Any, ...], Any], None]:
    def callback(arguments: tuple[Any, ...], result: Any) -> None:
        key = "/".join(
            str(part) for part in (arguments[0], *(arguments[5] if len(arguments) > 5 and arguments[5] else ()))
        )
        splits = zip(("train", "test"), result, strict=True)
        record.json.setdefault(name, {})[key] = {s: rows_of_texts(problem, arguments[0], s, t) for s, t in splits}

    return callback
