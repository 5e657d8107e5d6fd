"""Unusual tokenizers: with tokens that the model has no embedding for, or written in Python."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, CTRLTokenizer, LlamaConfig, LlamaForCausalLM

from sae.cache.reader import Cache
from sae.common.errors import UsageError
from sae.common.special_tokens import special_tokens
from sae.common.tokenizers import tokenizer_digest, tokens_without_embedding
from sae.evaluate.inputs import make_context
from sae.evaluate.metrics.activation_examples import TokenText
from sae.harvest.chat import ChatEncoder
from sae.harvest.config import HarvestConfig
from sae.harvest.description import describe_harvest
from sae.harvest.encode import encode_as_text
from sae.harvest.in_memory import activations
from sae.harvest.plan import HarvestPlan, plan_harvest
from sae.harvest.run import harvest_activations, run_harvest

pytestmark = pytest.mark.usefixtures("one_thread")


def lines(path: Path, *texts: Any, column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def plan(model: Path, text: Path, **more: Any) -> HarvestPlan:
    options = {"layers": (1,), "tokens": 100, "device": "cpu", "context": 32, "held_out": 0.0} | more
    return plan_harvest(HarvestConfig(str(model), dataset=str(text), **options))


# --- tokens beyond the embedding --------------------------------------------------------------------------------------


@pytest.fixture
def enlarged(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with two added tokens and a pad token, for which its embedding has no rows."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "enlarged"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<zzz>", "<yyy>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


def test_the_plan_names_tokens_without_an_embedding(enlarged: Path, sentences: Path, tiny_model: Path) -> None:
    (line,) = [one for one in describe_harvest(plan(enlarged, sentences)) if one.startswith("unknown")]
    assert "'<zzz>' (id 8,192), '<yyy>' (id 8,193), '[PAD]' (id 8,194)" in line
    assert "beyond the 8,192 rows of the model's embedding; a text that contains one is rejected" in line
    assert not [one for one in describe_harvest(plan(tiny_model, sentences)) if one.startswith("unknown")]


def test_a_text_with_such_a_token_is_refused_at_its_first_document(enlarged: Path, tmp_path: Path) -> None:
    text = lines(tmp_path / "text.jsonl", *["the quick brown fox " * 3] * 5, "a fox <yyy> and a dog", "<zzz>")
    refused = (
        r"Document 5 \(counted from 0\) of the text text, which begins 'a fox <yyy> and a dog', contains the token "
    )
    with pytest.raises(UsageError, match=refused + r"'<yyy>' \(id 8,193\), but the model's embedding has only 8,192"):
        run_harvest(plan(enlarged, text))
    with pytest.raises(UsageError, match=r"texts\[1\] contains the token '<zzz>'"):
        activations(["fine", "not <zzz>"], model=str(enlarged), layer=0, device="cpu")
    ids = lines(tmp_path / "ids.jsonl", [5, 6, 7], [8, 8193])
    with pytest.raises(UsageError, match=r"Document 1 .* contains the token '<yyy>'"):
        run_harvest(plan(enlarged, ids))


def test_a_text_without_such_tokens_is_harvested_as_ever(enlarged: Path, tiny_model: Path, sentences: Path) -> None:
    """Although the pad token has no embedding, contexts of different lengths can be padded, with another token."""
    whole, own = (harvest_activations(str(m), layers=1, dataset=sentences, **SMALL) for m in (tiny_model, enlarged))
    assert_same_rows(whole, own)
    texts = ["the fox", "a lazy dog reads the yellow books", "call [PAD] here"]
    one, other = (activations(texts, model=str(model), layer=1, device="cpu") for model in (tiny_model, enlarged))
    assert torch.equal(one.x, other.x) and one.ids.tolist() == other.ids.tolist()
    context = make_context(own)
    assert context.encode_texts(texts[:2]) == make_context(whole).encode_texts(texts[:2])
    with pytest.raises(UsageError, match=r"Text 1 of 2 contains the token '<zzz>' .* has only 8,192 rows"):
        context.encode_texts(["fine", "not <zzz>"])


SMALL = {"tokens": 1500, "context": 32, "window": 512, "held_out": 0.2, "device": "cpu"}


def layer_bits(cache: Cache) -> np.ndarray:
    """(rows, d_in) uint16"""
    return np.concatenate([cache.read_chunk(cache.require_array(1), n) for n in range(len(cache.chunk_rows))])


def assert_same_rows(one: Cache, other: Cache) -> None:
    assert one.rows == other.rows == SMALL["tokens"]
    assert np.array_equal(layer_bits(one), layer_bits(other))


def test_a_bos_without_an_embedding_is_refused(enlarged: Path, sentences: Path) -> None:
    with pytest.raises(
        UsageError, match=r"The token sequence that begins each context \(--bos\) contains the token '<zzz>'"
    ):
        plan(enlarged, sentences, bos="<zzz>")


def test_an_embedding_with_more_rows_than_tokens_is_usual(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokens_without_embedding(tokenizer, 8192) == tokens_without_embedding(tokenizer, 9000) == {}
    assert list(tokens_without_embedding(tokenizer, 8190)) == [8190, 8191]


# --- tokenizers written in Python -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks with ByT5's tokenizer, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(bos_token="</s>").save_pretrained(folder)
    return folder


def test_a_tokenizer_written_in_python_is_harvested(bytes_model: Path, tmp_path: Path) -> None:
    """The rows are those of sae.activations, and special tokens spelled in a text are text."""
    texts = [f"row {number} of </s> text" for number in range(60)]
    cache = harvest_activations(
        str(bytes_model), layers=1, dataset=lines(tmp_path / "t.jsonl", *texts), bos="</s>",
        **SMALL | {"tokens": 900, "held_out": 0.0},
    )  # fmt: skip
    expected = activations(texts, model=str(bytes_model), layer=1, context=32, bos="</s>", device="cpu")
    contexts, bits = cache.contexts(held_out=False), layer_bits(cache)
    windows = range(cache.layout.n_windows)
    row_ctx, row_pos = (np.concatenate([cache.read_chunk(name, w) for w in windows]) for name in ("row_ctx", "row_pos"))
    found = dict(zip(zip(contexts.document[row_ctx].tolist(), row_pos.tolist(), strict=True), bits, strict=True))
    x = expected.x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    places = zip(expected.text.tolist(), expected.position.tolist(), strict=True)
    same = [np.array_equal(found[place], row) for place, row in zip(places, x, strict=True) if place in found]
    assert len(same) == cache.rows and np.mean(same) > 0.98, "passes of other shapes can round differently"
    first = contexts.ids[list(contexts.document).index(0)]
    assert bytes(int(number) - 3 for number in first[1:19]).decode() == "row 0 of </s> text"


def test_tokens_beyond_the_vocabulary_have_no_text() -> None:
    """Such a model's embedding has more rows than there are tokens, and ByT5's tokenizer cannot decode the rest."""
    with pytest.raises(ValueError, match="bytes"):
        ByT5Tokenizer().decode([390])
    assert TokenText(ByT5Tokenizer()).text(390) == "" and TokenText(ByT5Tokenizer()).text(100) == "a"


def ctrl(folder: Path, merges: str = "h e\n") -> Any:
    folder.mkdir(parents=True)
    words = ["hello", "hel", "lo</w>", "l", "o</w>", "<unk>", "<end>", "h", "e@@", "h@@", "w"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text(f"#version\n{merges}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return CTRLTokenizer.from_pretrained(folder)


def test_the_digest_of_a_python_tokenizer_is_that_of_what_it_computes(tmp_path: Path) -> None:
    one = ctrl(tmp_path / "one")
    digests = {
        "one": tokenizer_digest(one),
        "elsewhere": tokenizer_digest(ctrl(tmp_path / "some" / "where" / "else")),
        "other merges": tokenizer_digest(ctrl(tmp_path / "merges", "e l\n")),
        "bytes": tokenizer_digest(ByT5Tokenizer()),
        "other bytes": tokenizer_digest(ByT5Tokenizer(extra_ids=3)),
    }
    assert digests["one"] == digests["elsewhere"]
    assert len(set(digests.values())) == 4
    one.add_tokens(["more"])
    assert tokenizer_digest(one) != digests["one"]
    used = ByT5Tokenizer()
    used(["some text"], truncation=True, max_length=3)
    assert tokenizer_digest(used) == digests["bytes"]


def test_special_tokens_in_a_text_are_cut_before_a_python_tokenizer_sees_them() -> None:
    class Greedy(ByT5Tokenizer):
        """A tokenizer that finds special tokens in a text even when it is told not to."""

        def __call__(self, texts: Any, split_special_tokens: bool = False, **more: Any) -> Any:
            return super().__call__(texts, split_special_tokens=False, **more)

    text = "a </s> b <pad></s>"
    (ids,) = encode_as_text(Greedy(), [text])
    assert set(special_tokens(Greedy()).values()).isdisjoint(ids)
    assert bytes(number - 3 for number in ids).decode() == text


def test_conversations_need_to_know_where_tokens_stand() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(UsageError, match=r"\(ByT5Tokenizer\) is written in Python and does not. Convert"):
        ChatEncoder(tokenizer)
