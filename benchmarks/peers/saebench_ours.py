"""Our side of `saebench_reference.py --time`: `python saebench_ours.py FOLDER METRIC ACTIVATION ...`.

FOLDER is a problem written by saebench_problem.py, read in the same way as on SAEBench's side: the same model,
contexts, tables and words, the same sizes, and SAEBench's random numbers if a metric has an option for that. Prints one
line of JSON in the worker's form: the time of each SAE, its metrics, and the peak memory.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from saebench_problem import AMAZON, BIOS, BOS, EOS, PAD
from safetensors.numpy import load_file

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets import labeled
from sae.evaluate.metrics import first_letter
from sae.evaluate.metrics.absorption import Absorption
from sae.evaluate.metrics.base import EvalTarget, Metric, MetricResult
from sae.evaluate.metrics.core import Core
from sae.evaluate.metrics.scr import Scr
from sae.evaluate.metrics.sparse_probing import SparseProbing
from sae.evaluate.metrics.tpp import Tpp
from sae.harvest.model import find_model, load_model, load_tokenizer
from sae.train.sae import load_sae

CLASSES, SENTIMENT = f"{BIOS}_class_set1", f"{AMAZON}_sentiment"
PAIRS = {CLASSES: (21, 13), AMAZON: (24, 26)}  # the tables hold one pair each


def metrics_of(about: dict[str, Any]) -> dict[str, Metric]:
    """Our metrics with SAEBench's settings, at the sizes of this problem."""
    batches = (about["contexts_per_batch"], about["reconstruction_batches"], about["sparsity_batches"])
    sizes = {"train_set_size": about["train"], "test_set_size": about["test"], "context": about["context"]}
    return {
        "core": Core(*batches),
        "sparse_probing": SparseProbing((CLASSES, SENTIMENT), **sizes, rng="saebench"),
        "scr": Scr((CLASSES, AMAZON), **sizes, rng="saebench"),
        "tpp": Tpp((CLASSES, AMAZON), **sizes, rng="saebench"),
        "absorption": Absorption(),
    }


def make_context(folder: Path, work: Path) -> EvalContext:
    """The evaluation's context, with the tables written as dataset files and an empty artifact cache."""
    for name, splits in json.loads((folder / "tables.json").read_text()).items():
        for split, columns in splits.items():
            path = work / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = zip(*columns.values(), strict=True)
            path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    ids = load_file(folder / "contexts.safetensors")["tokens"].astype(np.uint32)
    n, length = ids.shape
    contexts = Contexts(ids, np.full(n, length, np.uint16), np.arange(n, dtype=np.uint32), np.ones(n, bool))
    source, config = find_model(str(folder))
    model = load_model(source, config, dtype="float32", device="cpu")
    return EvalContext(
        lambda: model,
        load_tokenizer(source),
        contexts,
        ContextFormat(BOS, (PAD, EOS, BOS)),
        "0.6.0",
        {},
        {},
        ArtifactCache(work / "shelf"),
        work,
    )


@contextlib.contextmanager
def same_inputs(about: dict[str, Any], ctx: EvalContext) -> Any:
    """Use one pair of classes for SCR, and the problem's words instead of the vocabulary."""
    known = {
        word.text: word
        for word in first_letter.vocabulary_words(
            ctx.tokenizer, ctx.tokenizer("\n", add_special_tokens=False)["input_ids"]
        )
    }
    words = sorted(known[text] for text in about["words"])
    tables = {name: replace(labeled.DATASETS[name], pairs=(pair,)) for name, pair in PAIRS.items()}
    with patch.object(first_letter, "vocabulary_words", lambda *_: words), patch.dict(labeled.DATASETS, tables):
        yield


def timed(metric: Metric, ctx: EvalContext, targets: list[EvalTarget]) -> tuple[list[MetricResult], float, float]:
    """Results, seconds, and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    results = metric.measure(ctx, targets, lambda done, total, note="": None)
    spent = time.perf_counter() - wall, time.process_time() - processor
    for result in results:
        if not isinstance(result, MetricResult):
            raise result
    return results, *spent


def measure(metric: Metric, ctx: EvalContext, targets: list[EvalTarget]) -> list[dict[str, Any]]:
    """Measure the first SAE alone, then the others in one call, as a user does.

    When the others are measured, everything that does not depend on an SAE is cached, except the original model's
    logits in core. For core, the first SAE is measured once more, then all SAEs at once, and the cost of a further SAE
    follows from the difference between the two.
    """
    (first,), *spent = timed(metric, ctx, targets[:1])
    again = 1 if metric.name == "core" else 0
    _, *one_more = timed(metric, ctx, targets[:1]) if again else (None, 0.0, 0.0)
    others, *more = timed(metric, ctx, targets if again else targets[1:])
    each = [(total - one) / (len(targets) - 1) for one, total in zip(one_more, more, strict=True)]
    costs = [spent] + [each] * (len(targets) - 1)
    return [
        {"wall": wall, "processor": processor, "numbers": result.metrics}
        for (wall, processor), result in zip(costs, [first, *others[again:]], strict=True)
    ]


def main() -> None:
    folder, name, *kinds = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    about = json.loads((Path(folder) / "problem.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        ctx = make_context(Path(folder), Path(work))
        targets = [EvalTarget(load_sae(Path(folder) / "saes" / kind), Hook(about["layer"])) for kind in kinds]
        with same_inputs(about, ctx):
            saes = measure(metrics_of(about)[name], ctx, targets)
    print(json.dumps({"saes": saes, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))


if __name__ == "__main__":
    main()
