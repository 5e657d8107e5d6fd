"""An imported SAE is evaluated on contexts with the first token and the length that its files record."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.cache.reader import Cache
from sae.evaluate.inputs import make_context
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.core import Core
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.run import run_evaluation
from sae.evaluate.sae_text import ContextChange, bos_request, change_for
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.plan import TrainConfig, plan_training
from sae.train.run import run_training
from sae.train.sae import load_sae

from ..tokenizer_shapes import make_tokenizer, save_model

ROWS = [[2, 10, 11, 12], [2, 20, 2, 30], [2]]  # the second row holds two documents


def contexts_of(rows: list[list[int]], marks: list[list[int]] | None = None) -> Contexts:
    ids = np.array([row + [0] * (4 - len(row)) for row in rows], np.uint32)
    given = None if marks is None else np.array([row + [0] * (4 - len(row)) for row in marks], bool)
    n = len(rows)
    return Contexts(ids, np.array([*map(len, rows)], np.uint16), np.arange(n, dtype=np.uint32), np.ones(n, bool), given)


def rows_of(contexts: Contexts, values: np.ndarray | None = None) -> list[list[int]]:
    values = contexts.ids if values is None else values
    return [row[:n].tolist() for row, n in zip(values, contexts.length, strict=True)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (ContextChange(), ROWS),
        (ContextChange((2, 5)), [[5, 10, 11, 12], [5, 20, 5, 30], [5]]),
        (ContextChange((2, None)), [[10, 11, 12], [20, 30]]),
        (ContextChange((None, 7)), [[7, 2, 10, 11], [7, 2, 20, 2], [7, 2]]),
        (ContextChange(max_tokens=3), [[2, 10, 11], [2, 20, 2], [2]]),
        (ContextChange((2, None), 2), [[10, 11], [20, 30]]),
    ],
)
def test_contexts_are_begun_again_and_cut(change: ContextChange, expected: list[list[int]]) -> None:
    marks = [[0, 1, 0, 1], [0, 1, 0, 1], [0]]
    changed = change.apply(contexts_of(ROWS, marks))
    assert rows_of(changed) == expected
    marked = {10: 1, 11: 0, 12: 1, 20: 1, 30: 1}  # marks stay with their tokens
    assert rows_of(changed, changed.rows) == [[bool(marked.get(token)) for token in row] for row in expected]


def test_nothing_changes_for_a_run_of_this_package() -> None:
    form, tokenizer = ContextFormat(1, (0, 1, 2)), make_tokenizer("smollm2")
    assert change_for({"context": 4, "bos": 0}, form, 12, tokenizer) == ContextChange()


@pytest.mark.parametrize(
    ("origin", "request_", "first"),
    [
        ({}, "auto", "<|endoftext|>"),
        ({"prepend_bos": True}, "bos-or-eos", "<|im_start|>"),
        ({"prepend_bos": False}, "none", None),
        ({"prepend_bos": True, "bos_token": "<|endoftext|>"}, "<|endoftext|>", "<|endoftext|>"),
        ({"prepend_bos": True, "bos_token": "of another tokenizer"}, "bos-or-eos", "<|im_start|>"),
    ],
)
def test_what_files_say(origin: dict[str, Any], request_: str, first: str | None) -> None:
    tokenizer = make_tokenizer("smollm2")
    number = tokenizer.get_vocab()
    assert bos_request(origin, tokenizer) == request_
    form = ContextFormat(number["<|im_start|>"], (number["<|im_start|>"],))
    change = change_for({"format": "saelens", "context": 99, **origin}, form, 12, tokenizer)
    new = None if first is None else number[first]
    assert change == ContextChange(None if new == form.bos_id else (form.bos_id, new))
    assert change.format(form).bos_id == new
    assert set(change.format(form).skip_ids) == {form.bos_id, *([] if new is None else [new])}


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache, and a run on it. Contexts begin with <|endoftext|>, although the tokenizer's BOS is <|im_start|>."""
    home = tmp_path_factory.mktemp("home")
    model = save_model(home / "model", make_tokenizer("smollm2"))
    words = "the quick brown fox jumps over a lazy dog while seven zebras read".split()
    text = home / "text.jsonl"
    rows = [" ".join(words[(5 * n + i) % len(words)] for i in range(9 + n % 5)) for n in range(60)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    cache = run_harvest(
        plan_harvest(
            HarvestConfig(
                model=str(model), dataset=str(text), layers=(0,), context=12, held_out=0.3, device="cpu", window=128,
                out=home / "cache",
            )
        )
    )  # fmt: skip
    plan = plan_training(
        TrainConfig(
            variants=["topk"], layers=(0,), caches=(cache.folder,), steps=20, batch_size=32, width="32",
            options=["topk.k=4"], out=home / "runs", device="cpu",
        )
    )  # fmt: skip
    run_training(plan)
    return cache.folder, plan.runs[0].folder


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run exported in the format of SAELens."""
    return export_sae(trained[1], "saelens", tmp_path_factory.mktemp("exported") / "saelens").folder


def measured(run: Path) -> tuple[Any, list[str]]:
    """The metrics of core and the printed lines of the plan."""
    plan = plan_evaluation(EvaluateConfig([run], "core", references=False, device="cpu"))
    (row,) = run_evaluation(plan)
    assert not row.errors
    return row.results["core"].metrics, plan.describe()


def test_an_export_says_what_contexts_began_with_and_comes_back_to_the_same_numbers(
    trained: tuple[Path, Path], exported: Path, tmp_path: Path
) -> None:
    cache, run = trained
    number = make_tokenizer("smollm2").get_vocab()
    assert load_sae(run).origin["bos"] == number["<|endoftext|>"]
    metadata = json.loads((exported / "cfg.json").read_text())["metadata"]
    assert metadata["prepend_bos"] is True and metadata["bos_token"] == "<|endoftext|>"
    assert metadata["bos_token_id"] == number["<|endoftext|>"]
    model = json.loads((cache / "harvest.json").read_text())["model"]
    imported = import_sae(exported, model=model, cache=cache, out=tmp_path / "imported")
    assert imported.sae.origin["bos_token"] == "<|endoftext|>"
    original, lines = measured(run)
    again, told = measured(imported.folder)
    assert not any("its files" in line for line in lines)
    assert any(line.endswith("contexts begin with <|endoftext|>, as recorded in its files") for line in told)
    for name in ("kl_div_with_sae", "kl_div_score"):
        before, after = (one["model_behavior_preservation"][name] for one in (original, again))
        assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"prepend_bos": False}, "no special token, as recorded in its files; the contexts of the cache"),
        ({"prepend_bos": True, "bos_token": None}, "begin with <|im_start|>, as recorded in its files; the contexts"),
        ({"prepend_bos": None, "bos_token": None}, "begin with <|endoftext|>, as in a new harvest (its files do"),
        ({"context_size": 6}, "contexts are cut from 12 tokens to 6, as it was trained on"),
        ({"context_size": 1024}, "it was trained on contexts of 1024 tokens; the contexts of the cache have 12 tokens"),
    ],
)  # fmt: skip
def test_an_imported_sae_is_evaluated_on_contexts_like_its_own(
    metadata: dict[str, Any], said: str, trained: tuple[Path, Path], exported: Path, tmp_path: Path
) -> None:
    """The core result equals one on contexts changed by hand."""
    folder, _ = trained
    cache, number = Cache(folder), make_tokenizer("smollm2").get_vocab()
    files = Path(shutil.copytree(exported, tmp_path / "files"))
    config = json.loads((files / "cfg.json").read_text())
    config["metadata"] = {k: v for k, v in (config["metadata"] | metadata).items() if v is not None}
    (files / "cfg.json").write_text(json.dumps(config))
    model = json.loads((folder / "harvest.json").read_text())["model"]
    imported = import_sae(files, model=model, cache=folder, out=tmp_path / "imported")
    result, lines = measured(imported.folder)
    assert any(said in line for line in lines), lines
    held, begin = cache.contexts(held_out=True), number["<|endoftext|>"]
    rows = [row[:n].tolist() for row, n in zip(held.ids, held.length, strict=True)]
    if metadata.get("prepend_bos") is False:
        rows = [row[1:] for row in rows]
    elif metadata.get("prepend_bos"):
        rows = [[number["<|im_start|>"], *row[1:]] for row in rows]
    rows = [row[: metadata.get("context_size", 12)] for row in rows]
    assert all(begin not in row for row in rows) == ("recorded in its files" in said)
    ids = np.array([row + [0] * (12 - len(row)) for row in rows], np.uint32)
    by_hand = replace(held, ids=ids, length=np.array([*map(len, rows)], np.uint16))
    ctx = replace(make_context(cache), contexts=by_hand)
    (expected,) = Core().measure(ctx, [EvalTarget(imported.sae, Hook.from_record(imported.sae.origin))], silent)
    for category in ("model_behavior_preservation", "reconstruction_quality", "sparsity"):
        assert result[category] == pytest.approx(expected.metrics[category], rel=1e-5, nan_ok=True)


def silent(done: int, total: int, note: str = "") -> None:
    pass


def test_imported_saes_that_differ_are_measured_on_contexts_of_their_own(
    trained: tuple[Path, Path], exported: Path, tmp_path: Path
) -> None:
    folder, run = trained
    model = json.loads((folder / "harvest.json").read_text())["model"]
    config = json.loads((exported / "cfg.json").read_text())
    imports = []
    for name, value in (("a", True), ("b", False)):
        copy = Path(shutil.copytree(exported, tmp_path / name))
        config["metadata"]["prepend_bos"] = value
        (copy / "cfg.json").write_text(json.dumps(config))
        imports.append(import_sae(copy, model=model, cache=folder, out=tmp_path / "imported", name=name).folder)
    plan = plan_evaluation(EvaluateConfig([run, *imports], "core", references=True, device="cpu"))
    assert len(plan.groups) == 3
    digests = {json.dumps(group.ctx.text_identity) for group in plan.groups}
    assert len(digests) == 2  # contexts of the first import begin like those of the run
    rows = {row.name: row for row in run_evaluation(plan) if row.folder and not row.is_reference}
    scores = {name: row.results["core"].metrics["model_behavior_preservation"] for name, row in rows.items()}
    kl = {name: score["kl_div_with_sae"] for name, score in scores.items()}
    assert kl["a"] == pytest.approx(kl[run.name], rel=1e-4) != pytest.approx(kl["b"], rel=1e-3)
