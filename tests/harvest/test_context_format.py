"""The tokens that contexts begin with, and those left out: in the cache, at evaluation, in memory, in the identity."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sae.cache.context_format import ContextFormat
from sae.cache.layout import fingerprint_of
from sae.cache.opening import concat_caches
from sae.cache.reader import Cache
from sae.common.cache_schemas import HARVEST_RECORD
from sae.common.errors import UsageError
from sae.evaluate.inputs import make_context
from sae.harvest.description import describe_source
from sae.harvest.in_memory import activations
from sae.harvest.plan import HarvestConfig, HarvestPlan, plan_harvest
from sae.harvest.repair import repair
from sae.harvest.run import run_harvest

from ..tokenizer_shapes import make_tokenizer, save_model

WORDS = "the quick brown fox jumps over a lazy dog while seven zebras quietly read their yellow books in june".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents of several lines."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    rows = [
        " ".join(WORDS[(7 * n + i) % len(WORDS)] for i in range(5 + n % 9)) + f"\n{WORDS[n % 19]}" for n in range(40)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shapes = ("smollm2", "qwen-chat", "gemma", "chatml-only", "nothing")
    return {shape: save_model(folder / shape, make_tokenizer(shape)) for shape in shapes}


def planned(model: Path, text: Path, **options: Any) -> HarvestPlan:
    settings = {"layers": (0,), "context": 12, "held_out": 0.3, "device": "cpu", "window": 128, "batch_contexts": 8}
    return plan_harvest(HarvestConfig(model=str(model), dataset=str(text), **settings | options))


# shape, options, first token, tokens left out
CASES: list[tuple[str, dict[str, Any], str | None, set[str]]] = [
    ("smollm2", {}, "<|endoftext|>", {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}),
    ("smollm2", {"bos": "none"}, None, {"<|im_start|>", "<|im_end|>"}),
    ("smollm2", {"bos": "<|im_start|>"}, "<|im_start|>", {"<|im_start|>", "<|im_end|>"}),
    ("smollm2", {"keep_special": True}, "<|endoftext|>", set()),
    ("smollm2", {"skip_positions": 4, "pack": True}, "<|endoftext|>", {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}),
    ("qwen-chat", {"skip_tokens": ("\n",)}, "<|endoftext|>", {"<|endoftext|>", "<|im_end|>", "Ċ"}),
    ("gemma", {"skip_positions": 2}, "<bos>", {"<pad>", "<eos>", "<bos>"}),
    ("chatml-only", {}, None, {"<|im_start|>", "<|im_end|>"}),
]


@pytest.mark.parametrize(
    ("shape", "options", "first", "left_out"), CASES, ids=[f"{shape}-{options}" for shape, options, *_ in CASES]
)
def test_rows_are_those_of_a_mask_made_by_hand(
    shape: str, options: dict, first: str | None, left_out: set[str], models: dict[str, Path], text: Path, home: Path
) -> None:
    plan = planned(models[shape], text, **options)
    cache, tokenizer = run_harvest(plan), make_tokenizer(shape)
    from_position = options.get("skip_positions", 0)
    expected, harvested = Counter[tuple[int, int]](), cache.contexts(held_out=False)
    for number, (ids, length) in enumerate(zip(harvested.ids, harvested.length, strict=True)):
        tokens = tokenizer.convert_ids_to_tokens(ids[:length].tolist())
        assert first is None or tokens[0] == first
        # no other special token is inserted
        assert not {*tokens[1:]} & {*tokenizer.all_special_tokens} or options.get("pack")
        expected.update(
            (number, place) for place, token in enumerate(tokens) if place >= from_position and token not in left_out
        )
    assert all(count == 1 for count in expected.values())
    windows = range(cache.layout.n_windows)
    ctx, pos = (np.concatenate([cache.read_chunk(name, w) for w in windows]) for name in ("row_ctx", "row_pos"))
    assert Counter(zip(ctx.tolist(), pos.tolist(), strict=True)) == expected and cache.rows == len(ctx)
    rows = torch.from_numpy(np.concatenate([cache.read_chunk("layer_00", n) for n in range(len(cache.chunk_rows))]))
    model = AutoModelForCausalLM.from_pretrained(models[shape])
    for context in range(0, len(harvested), 9):  # the model saw exactly these tokens
        ids = torch.from_numpy(harvested.ids[context, : harvested.length[context]].astype(np.int64))
        x_SD = model(ids[None], output_hidden_states=True).hidden_states[1][0]
        mine = np.flatnonzero(ctx == context)
        own = rows[mine].view(torch.bfloat16).float()
        torch.testing.assert_close(own, x_SD[pos[mine].astype(np.int64)].float(), rtol=2**-7, atol=1e-4)
    evaluated, held = make_context(cache), cache.contexts(held_out=True)
    (batch,) = evaluated.batches(1000, 1)
    special = {*map(str, tokenizer.all_special_tokens), *([first] if first else [])} - {"<unk>"}
    for ids, counted, length in zip(batch.ids, batch.counted, held.length, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids[:length].tolist())
        skipped = special if options.get("keep_special") else left_out  # evaluation never counts special tokens
        assert counted.tolist() == [
            place < length and place >= from_position and tokens[place] not in skipped for place in range(len(ids))
        ]


def test_a_packed_cache_without_a_first_token_is_the_text_itself(models: dict, text: Path, home: Path) -> None:
    cache = run_harvest(planned(models["smollm2"], text, bos="none", pack=True, context=64))
    tokenizer = make_tokenizer("smollm2")
    found = Counter[int]()
    for held_out in (False, True):
        contexts = cache.contexts(held_out=held_out)
        for ids, length in zip(contexts.ids, contexts.length, strict=True):
            found.update(ids[:length].tolist())
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert found == Counter(token for ids in tokenizer(texts)["input_ids"] for token in ids)


# --- the identity ---------------------------------------------------------------------------------------------------


def test_entries_are_added_only_where_they_differ_from_earlier_versions(models: dict, text: Path) -> None:
    added = {"bos", "skip_positions", "special_tokens", "chat"}
    number = make_tokenizer("smollm2").get_vocab()
    old = {"skip": sorted((number["<|im_start|>"], number["<|im_end|>"]))}
    identity = planned(models["smollm2"], text, bos="<|im_start|>").identity
    assert {key: identity[key] for key in old} == old and not added & identity.keys()
    gemma = planned(models["gemma"], text).identity
    assert gemma["skip"] == [0, 1, 2] and not added & gemma.keys()
    new = planned(models["smollm2"], text, skip_positions=3).identity
    assert new["bos"] == number["<|endoftext|>"] and new["skip_positions"] == 3
    prints = {
        fingerprint_of(planned(models["smollm2"], text, **options).identity)
        for options in ({}, {"bos": "none"}, {"bos": "<|im_start|>"}, {"skip_positions": 1}, {"skip_tokens": ("\n",)})
    }
    assert len(prints) == 5


def test_gemma_2_mini_has_the_fingerprint_of_earlier_versions() -> None:
    """The fingerprint is recomputed from the entries that commit 9a9a639 wrote."""
    plan = plan_harvest(HarvestConfig(model="gemma-2-mini", layers=(5,), device="cpu"))
    old = {
        "format", "model", "dtype", "attention", "tokenizer", "data", "tokens", "context", "held_out", "skip", "pack",
        "seed", "window_rows", "chunk_rows", "storage_dtype", "compress",
    }  # fmt: skip
    assert plan.identity.keys() == old and plan.identity["skip"] == [0, 1, 2]
    assert describe_source(plan)[-1] == "bos      <bos> (id 2): the tokenizer puts it before a text"


def test_the_plan_says_what_contexts_begin_with_and_what_is_left_out(models: dict, text: Path) -> None:
    lines = describe_source(planned(models["smollm2"], text, skip_positions=2, skip_tokens=("\n",)))
    number = make_tokenizer("smollm2").get_vocab()["<|endoftext|>"]
    assert lines[-2] == f"bos      <|endoftext|> (id {number}): in the vocabulary; the tokenizer adds none"
    assert lines[-1].startswith("left out the first 2 positions of each context; ") and "'Ċ'" in lines[-1]
    assert describe_source(planned(models["smollm2"], text, bos="none"))[-1] == "bos      none: --bos none"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"skip_positions": -1}, "invalid --skip-positions -1: expected 0 or more"),
        ({"skip_positions": 12}, "invalid --skip-positions 12: .* fewer than the 12 tokens of a context"),
        ({"skip_tokens": ("no such token",)}, "--skip-token 'no such token' is not one token"),
        ({"bos": "None"}, "--bos None: write none"),
        ({"bos": "AUTO"}, "--bos AUTO: write auto"),
        ({"bos": ""}, "--bos '' is not one token"),
        ({"bos": "<|endoftxt|>"}, r"--bos '<\|endoftxt\|>' is not one token of this tokenizer; did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict, sentence: str, models: dict, text: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        planned(models["smollm2"], text, **options)


def test_caches_that_begin_differently_are_not_combined(models: dict, text: Path, home: Path) -> None:
    folders = [run_harvest(planned(models["smollm2"], text, bos=bos)).folder for bos in ("auto", "none")]
    with pytest.raises(UsageError, match="cannot be combined: they differ in skip, bos"):
        concat_caches(folders)


# --- caches of earlier versions -------------------------------------------------------------------------------------


def begun_by_an_earlier_version(plan: HarvestPlan, folder: Path | None = None) -> Cache:
    """Write a cache as an earlier version did.

    Special tokens in the text are special, and harvest.json lacks the options for BOS, skipped tokens and chats.
    """
    identity = {key: value for key, value in plan.identity.items() if key != "special_tokens"}
    name = plan.folder.name.rsplit("--", 1)[0]
    folder = folder or plan.folder.with_name(f"{name}--{fingerprint_of(identity)[:8]}")
    cache = run_harvest(replace(plan, identity=identity, folder=folder))
    record = HARVEST_RECORD.read(folder / "harvest.json")
    for added in ("bos", "bos_token", "skip_positions", "skip_tokens", "chat_column", "roles"):
        record.pop(added, None)
    HARVEST_RECORD.write(folder / "harvest.json", record)
    return cache


@pytest.fixture
def spelled(tmp_path: Path) -> Path:
    path = tmp_path / "spelled.jsonl"
    path.write_text("".join(json.dumps({"text": f"fox <|im_end|> {word} jumps"}) + "\n" for word in WORDS))
    return path


def test_special_tokens_in_a_document_are_rows_and_another_harvest(models: dict, spelled: Path, home: Path) -> None:
    plan = planned(models["smollm2"], spelled)
    end = make_tokenizer("smollm2").get_vocab()["<|im_end|>"]
    assert plan.identity["special_tokens"] == "text"
    new, old = run_harvest(plan), begun_by_an_earlier_version(plan)
    assert new.fingerprint != old.fingerprint and new.rows > old.rows
    inside = [
        {*contexts.ids[i, :n].tolist()}
        for cache in (new, old)
        for contexts in [cache.contexts(held_out=False)]
        for i, n in enumerate(contexts.length)
    ]
    assert not any(end in ids for ids in inside[: len(new.contexts(held_out=False))])
    assert all(end in ids for ids in inside[len(new.contexts(held_out=False)) :])


@pytest.mark.parametrize("out", [False, True])
def test_a_cache_of_an_earlier_version_is_continued_as_it_was_begun(
    out: bool, models: dict, spelled: Path, tmp_path: Path, home: Path
) -> None:
    folder = tmp_path / "own" if out else None
    old = begun_by_an_earlier_version(planned(models["smollm2"], spelled, bos="<|im_start|>"), folder)
    for file in (old.folder / "commits").glob("000000*"):
        file.unlink()  # half written
    plan = planned(models["smollm2"], spelled, bos="<|im_start|>", out=folder)
    assert plan.folder == old.folder and "special_tokens" not in plan.identity
    assert not plan.encoder.literals_are_text
    again = run_harvest(plan)
    assert again.fingerprint == old.fingerprint and again.rows == old.rows


def test_a_cache_of_an_earlier_version_is_repaired(models: dict, spelled: Path, home: Path) -> None:
    old = begun_by_an_earlier_version(planned(models["smollm2"], spelled, bos="<|im_start|>"))
    ids = old.folder / "tokens" / "ids" / "c.0.0"
    before = ids.read_bytes()
    ids.write_bytes(bytes(len(before)))
    assert repair(old.folder) == ["tokens/ids/c.0.0 was missing or damaged; tokenized again"]
    assert ids.read_bytes() == before


def test_an_old_cache_is_evaluated_with_what_it_began_with(models: dict, text: Path, home: Path) -> None:
    cache = begun_by_an_earlier_version(planned(models["smollm2"], text, bos="<|im_start|>"))
    number = make_tokenizer("smollm2").get_vocab()
    expected = ContextFormat(number["<|im_start|>"], (number["<|im_start|>"], number["<|im_end|>"]))
    assert make_context(cache).context_format == expected


# --- in memory and prompts ------------------------------------------------------------------------------------------


def test_activations_in_memory_have_the_rows_of_a_harvest(models: dict) -> None:
    tokenizer = make_tokenizer("smollm2")
    plain = activations(["fox jumps\nfox"], model=str(models["smollm2"]), layer=1, device="cpu")
    assert plain.position.tolist()[0] == 1 and "".join(plain.tokens) == "fox jumps\nfox"
    none = activations(["fox jumps\nfox"], model=str(models["smollm2"]), layer=1, device="cpu", bos="none")
    assert none.position.tolist()[0] == 0 and not torch.allclose(none.x, plain.x)
    few = activations(
        ["fox jumps\nfox"], model=str(models["smollm2"]), layer=1, device="cpu", skip_positions=3, skip_tokens=["\n"]
    )
    kept = (plain.position >= 3) & (plain.ids != tokenizer("\n")["input_ids"][0])
    assert torch.equal(few.x, plain.x[kept])
    spelled = activations(["<|im_end|>"], model=str(models["smollm2"]), layer=1, device="cpu")
    assert len(spelled.tokens) > 1 and "".join(spelled.tokens) == "<|im_end|>"
    with pytest.raises(UsageError, match="invalid skip_positions=-1"):
        activations(["fox"], model=str(models["smollm2"]), layer=1, skip_positions=-1)


def test_texts_and_prompts_of_metrics_begin_like_the_contexts(models: dict, text: Path, home: Path) -> None:
    number = make_tokenizer("smollm2").get_vocab()
    for bos, first in (("auto", "<|endoftext|>"), ("none", None), ("<|im_start|>", "<|im_start|>")):
        ctx = make_context(run_harvest(planned(models["smollm2"], text, bos=bos)))
        begin = [] if first is None else [number[first]]
        bare = ctx.tokenizer(["fox", "seven zebras read"])["input_ids"]
        assert ctx.encode_texts(["fox", "seven zebras read"]) == [[*begin, *ids] for ids in bare]
        assert ctx.encode_texts(["seven zebras read"], 2)[0] == [*begin, *bare[1]][:2]
        assert ("bos" in ctx.prompt_settings) == (bos != "<|im_start|>")  # earlier results stay valid
    gemma = make_context(run_harvest(planned(models["gemma"], text)))
    assert gemma.encode_texts(["fox"])[0][0] == 2 and gemma.text_settings == gemma.prompt_settings == {}
