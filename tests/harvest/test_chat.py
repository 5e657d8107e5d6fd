"""The model sees all tokens that the chat template renders; the rows are exactly what the chosen roles wrote."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.cache.reader import Cache
from sae.common.errors import UsageError
from sae.evaluate.inputs import make_context
from sae.harvest.chat import ChatEncoder
from sae.harvest.description import describe_source, summarize_harvest
from sae.harvest.documents import Conversation, parse_messages
from sae.harvest.encode import TemplateRefusal
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest

from ..tokenizer_shapes import make_tokenizer, save_model

TALK = [
    {"role": "user", "content": "seven zebras"},
    {"role": "assistant", "content": "read their books"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "quietly in june"},
]


def written(tokenizer: Any, messages: list[dict[str, Any]], role: str) -> list[str]:
    """The text that the encoder marks, one string for each run of marked tokens."""
    ids, marks = ChatEncoder(tokenizer, (role,)).encode(Conversation(messages))
    edges = np.flatnonzero(np.diff([0, *marks, 0]))
    return [tokenizer.decode(ids[first:last]) for first, last in zip(edges[::2], edges[1::2], strict=True)]


ENDS = {"marked": "<|im_end|>", "smollm2": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize(("shape", "end"), ENDS.items())
def test_the_assistant_wrote_its_content_and_the_end_of_its_turn(shape: str, end: str) -> None:
    """The tokens are found by generation marks ("marked"), or by rendering beginnings of the conversation."""
    tokenizer = make_tokenizer(shape)
    assert written(tokenizer, TALK, "assistant") == [f"read their books{end}", f"quietly in june{end}"]
    assert written(tokenizer, TALK, "user") == ["seven zebras", "assistant"]


def test_a_template_without_a_generation_prompt() -> None:
    tokenizer = make_tokenizer("llama-2")
    assert [text.strip() for text in written(tokenizer, TALK, "assistant")] == ["read their books", "quietly in june"]


@pytest.mark.parametrize("shape", ["marked", "smollm2", "llama-3", "gemma", "llama-2"])
def test_ids_are_those_of_the_rendered_text(shape: str) -> None:
    tokenizer = make_tokenizer(shape)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    for roles in ((), ("assistant",), ("user", "assistant")):
        ids, marks = ChatEncoder(tokenizer, roles).encode(Conversation(TALK))
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(marks) == (len(ids) if roles else 0)


def test_special_tokens_that_a_message_spells_are_text() -> None:
    tokenizer = make_tokenizer("smollm2")
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    talk = [
        {"role": "user", "content": "fox<|im_end|>\n<|im_start|>assistant\nfox"},
        {"role": "assistant", "content": "<|im_end|>!"},
    ]
    ids, marks = ChatEncoder(tokenizer, ("assistant",)).encode(Conversation(talk))
    assert ids.count(special) == 2 and len(marks) == len(ids)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(talk, tokenize=False)
    assert written(tokenizer, talk, "assistant") == ["<|im_end|>!<|im_end|>"]


def test_tool_calls_are_what_the_assistant_wrote() -> None:
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
        "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "jump"}]}]
    assert written(tokenizer, talk, "assistant") == ['[{"name": "jump"}]<|im_end|>']


def test_the_date_of_a_template_is_always_the_same() -> None:
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }} {{ messages[0]['content'] }}"
    ids, _ = ChatEncoder(tokenizer).encode(Conversation(TALK))
    assert tokenizer.decode(ids) == "26 July 2024 seven zebras"


def test_a_template_whose_beginnings_are_no_prefixes_is_refused() -> None:
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UsageError, match="does not render the first 1 messages.* Use a tokenizer whose template has"):
        ChatEncoder(tokenizer, ("assistant",)).encode(Conversation(TALK))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(UsageError, match="changes the content of a message with the role 'assistant'"):
        ChatEncoder(tokenizer, ("assistant",)).encode(Conversation(TALK))


def test_a_conversation_that_the_template_refuses() -> None:
    with pytest.raises(TemplateRefusal, match="System role not supported"):
        ChatEncoder(make_tokenizer("gemma")).encode(Conversation([{"role": "system", "content": "fox"}, *TALK]))


def test_messages_are_lists_of_dictionaries_or_the_other_way_round() -> None:
    assert parse_messages(TALK) == Conversation(TALK)
    assert parse_messages({name: [one[name] for one in TALK] for name in ("role", "content")}) == Conversation(TALK)
    assert parse_messages({"role": ["user"], "content": [None]}) == Conversation([{"role": "user", "content": None}])
    for wrong in (
        "text", 3, {}, ["fox"], [{"from": "human", "value": "x"}], [{"role": "user"}], [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 1}], {"role": "user", "content": "fox"}, {"role": ["user"], "content": []},
    ):  # fmt: skip
        assert parse_messages(wrong) is None


def test_a_list_of_parts_that_a_template_would_print_is_refused() -> None:
    parts = [{"type": "text", "text": "seven zebras"}]
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = "{% for one in messages %}{{ one.role }}: {{ one.content | trim }}\n{% endfor %}"
    with pytest.raises(TemplateRefusal, match="the content of a message is a list of parts"):
        ChatEncoder(tokenizer).encode(Conversation([{"role": "user", "content": parts}]))
    tokenizer.chat_template = "{% for one in messages %}{{ one.content[0].text }}{% endfor %}"
    ids, _ = ChatEncoder(tokenizer).encode(Conversation([{"role": "user", "content": parts}]))
    assert tokenizer.decode(ids) == "seven zebras"


def test_a_template_that_is_not_valid_is_refused_at_once() -> None:
    tokenizer = make_tokenizer("smollm2")
    tokenizer.chat_template = "{% for one in messages %}{{ one.role }"
    with pytest.raises(UsageError, match="chat template of this tokenizer is not valid Jinja: .*Correct it"):
        ChatEncoder(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('Begin with a system message') }}"
    assert ChatEncoder(tokenizer).template == tokenizer.chat_template  # the template can render other conversations


# --- whole harvests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations, one of which has a system message, and an empty conversation."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    words = "the quick brown fox jumps over a lazy dog while seven zebras read".split()
    rows = []
    for number in range(40):
        say = lambda shift: " ".join(words[(number * 3 + shift * 5 + n) % len(words)] for n in range(4 + shift))  # noqa: E731,B023
        rows.append([{"role": ("user", "assistant")[turn % 2], "content": say(turn)} for turn in range(4)])
    rows[7] = [{"role": "system", "content": "fox"}, *rows[7]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [*rows, []]))
    return path


def harvest(model: Path, talks: Path, out: Path, **options: Any) -> tuple[Cache, Any]:
    plan = plan_harvest(
        HarvestConfig(
            model=str(model), dataset=str(talks), chat_column="messages", layers=(0,), context=24, held_out=0.3,
            device="cpu", window=256, batch_contexts=8, out=out, **options,
        )
    )  # fmt: skip
    return run_harvest(plan), plan


@pytest.mark.parametrize(
    ("shape", "pack"),
    [
        pytest.param(shape, pack, marks=pytest.mark.slow if pack == (shape in ("marked", "llama-3")) else ())
        for shape in ("marked", "smollm2", "llama-3", "gemma")
        for pack in (False, True)
    ],
)
def test_rows_of_a_cache_are_the_tokens_of_the_assistant(shape: str, pack: bool, talks: Path, tmp_path: Path) -> None:
    """The rows are compared with conversations that are rendered by hand, message by message."""
    tokenizer = make_tokenizer(shape)
    model = save_model(tmp_path / "model", tokenizer)
    cache, plan = harvest(model, talks, tmp_path / "cache", roles=("assistant",), pack=pack)
    turns = {
        "llama-3": "<|start_header_id|>{}<|end_header_id|>\n\n", "gemma": "<start_of_turn>{}\n",
    }.get(shape, "<|im_start|>{}\n")  # fmt: skip
    end = {"llama-3": "<|eot_id|>", "gemma": "<end_of_turn>\n"}.get(shape, "<|im_end|>\n")
    own: Counter[str] = Counter()  # every token of an assistant, harvested or held out
    total = 0
    for line in talks.read_text().splitlines():
        messages = json.loads(line)["messages"]
        if not messages or (shape == "gemma" and messages[0]["role"] == "system"):
            continue
        for message in messages:
            role = "model" if shape == "gemma" and message["role"] == "assistant" else message["role"]
            header, body = turns.format(role), message["content"]
            ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (header, body, end)]
            total += sum(map(len, ids))
            if message["role"] == "assistant":
                own.update(map(str, ids[1]))
                if shape == "gemma":  # its <end_of_turn> is neither EOS nor BOS nor pad, so it is a row
                    own.update([str(ids[2][0])])

    found: Counter[str] = Counter()
    fed = 0
    for held_out in (False, True):
        contexts = cache.contexts(held_out=held_out)
        mask = plan.context_format.row_mask(contexts)
        found.update(map(str, contexts.ids[mask].tolist()))
        inside = np.arange(contexts.ids.shape[1]) < contexts.length[:, None]
        fed += int((inside & (contexts.ids != plan.context_format.bos_id)).sum())
        assert (contexts.ids[:, 0] == plan.context_format.bos_id).all()
        assert contexts.rows is not None and not contexts.rows[~inside].any()
    assert found == own and fed == total
    harvested = cache.contexts(held_out=False)
    kept = Counter(map(tuple, np.argwhere(plan.context_format.row_mask(harvested)).tolist()))
    ctx, pos = (cache.read_chunk(name, 0) for name in ("row_ctx", "row_pos"))
    assert cache.layout.n_windows == 1 or cache.rows > 256
    if cache.layout.n_windows == 1:
        assert Counter(zip(ctx.tolist(), pos.tolist(), strict=True)) == kept
    assert cache.rows == sum(kept.values())
    evaluated = make_context(cache)
    (batch,) = evaluated.batches(1000, 1)
    held = cache.contexts(held_out=True)
    assert np.array_equal(batch.counted.numpy(), plan.context_format.row_mask(held)[:, : batch.counted.shape[1]])


def test_the_whole_conversation_is_harvested_without_roles(talks: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_tokenizer("smollm2"))
    cache, plan = harvest(model, talks, tmp_path / "cache")
    contexts = cache.contexts(held_out=False)
    assert contexts.rows is None and not (cache.folder / "tokens" / "rows").exists()
    assert cache.rows == (~np.isin(contexts.ids, [*plan.context_format.skip_ids])).sum()
    assert plan.identity["chat"]["roles"] == []


def test_a_cache_says_what_its_contexts_begin_with_and_which_tokens_are_rows(talks: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_tokenizer("smollm2"))
    cache, plan = harvest(model, talks, tmp_path / "all")
    assert f"bos      token id {plan.context_format.bos_id}" in cache.describe()
    assert " special tokens left out" in summarize_harvest(plan, cache, 0)[-1]
    cache, plan = harvest(model, talks, tmp_path / "some", roles=("assistant",), bos="none", skip_positions=2)
    lines = cache.describe()
    assert "bos      none; the first 2 positions of each context are left out" in lines
    assert "chat     rows are the tokens written by assistant" in lines
    assert (
        " tokens left out" in summarize_harvest(plan, cache, 0)[-1]
        and "special" not in summarize_harvest(plan, cache, 0)[-1]
    )


def test_a_chat_harvest_continues_and_is_repaired(talks: Path, tmp_path: Path) -> None:
    from sae.harvest.repair import repair

    model = save_model(tmp_path / "model", make_tokenizer("marked"))
    cache, _ = harvest(model, talks, tmp_path / "cache", roles=("assistant",))
    marks = cache.folder / "tokens" / "rows" / "c.0.0"
    before = marks.read_bytes()
    marks.write_bytes(before[:-8] + bytes(8))
    (line,) = repair(cache.folder)
    assert line.startswith("tokens/rows/c.0.0 was missing or damaged") and marks.read_bytes() == before
    again, _ = harvest(model, talks, tmp_path / "cache", roles=("assistant",))
    assert again.fingerprint == cache.fingerprint


def test_refused_conversations_are_counted_and_explained_once(talks: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_tokenizer("gemma"))
    said: list[str] = []
    config = HarvestConfig(
        model=str(model), dataset=str(talks), chat_column="messages", layers=(0,), device="cpu", window=256,
        out=tmp_path / "cache",
    )  # fmt: skip
    plan = plan_harvest(config, said.append)
    cache = run_harvest(plan)
    refused = "The chat template rejects a conversation of talks: System role not supported."
    assert said == [f"{refused} Conversations that it rejects are skipped."]
    assert "special tokens left out" in summarize_harvest(plan, cache, 0)[-1]
    assert "1 empty documents skipped, 1 untemplated documents skipped" in summarize_harvest(plan, cache, 0)[-1]
    assert "chat     messages, rendered with the tokenizer's template; rows are all tokens" in describe_source(plan)


@pytest.mark.parametrize(
    ("options", "cell", "sentence"),
    [
        ({"roles": ("assistant",)}, TALK, "--roles selects parts of conversations: name their column with --chat"),
        ({"chat_column": "chat"}, TALK, "has no column 'chat'; its columns are 'messages'. Choose one with --chat-col"),
        ({"chat_column": "messages"}, "fox", "has 'fox' in the column 'messages'; expected a list of messages"),
        ({"chat_column": "messages"}, [{"from": "x", "value": "y"}], "a message with the keys from, value in the col"),
        ({"chat_column": "messages"}, {"role": "user", "content": "x"}, "has {'role': 'user', 'content': 'x'} in"),
        ({"chat_column": "messages"}, [{"role": "user", "content": 3}], "has a message with the content 3 in"),
        ({"chat_column": "messages"}, [{"role": None, "content": "x"}], "has a message with the role None in"),
        ({"chat_column": ""}, TALK, "--chat-column cannot be empty"),
        ({"chat_column": "messages", "roles": ("",)}, TALK, "--roles cannot be empty"),
        ({"chat_column": "messages", "text_column": "body"}, TALK, "--text-column body and --chat-column m"),
        ({"chat_column": "messages", "dataset": "python-stdlib"}, TALK, "python-stdlib is plain text without columns"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_chat_harvest(options: dict, cell: Any, sentence: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_tokenizer("smollm2"))
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"messages": cell}))
    config = HarvestConfig(**{"model": str(model), "dataset": str(text), "layers": (0,), "device": "cpu"} | options)
    with pytest.raises(UsageError, match=sentence):
        run_harvest(plan_harvest(config))


def test_roles_that_nobody_has(talks: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_tokenizer("smollm2"))
    absent = "No message of the first 40 conversations has the role 'tool'; their roles are assistant, system, user."
    with pytest.raises(UsageError, match=f"Every token of the text talks is left out or held out. {absent} Check --sk"):
        harvest(model, talks, tmp_path / "cache", roles=("tool",))
    said: list[str] = []
    config = HarvestConfig(
        model=str(model), dataset=str(talks), chat_column="messages", layers=(0,), device="cpu", window=256,
        roles=("assistant", "tool"), out=tmp_path / "both",
    )  # fmt: skip
    plan = plan_harvest(config, said.append)
    cache = run_harvest(plan)
    assert said == [absent]
    fed = int(cache.contexts(held_out=False).length.sum())
    assert f"({fed - cache.rows:,} tokens left out" in summarize_harvest(plan, cache, 0)[-1]


def test_a_tokenizer_without_a_template_is_refused(talks: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a tokenizer with a chat template.* or name a column of plain text"):
        ChatEncoder(make_tokenizer("gpt-2"))
