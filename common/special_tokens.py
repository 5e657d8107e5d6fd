"""Special tokens of a tokenizer: which one begins a context, and which ones begin or end a chat turn."""

from typing import Any, NamedTuple

from .errors import UsageError, did_you_mean

ENDOFTEXT = "<|endoftext|>"  # separated documents in the pretraining of GPT-2, Pythia, Qwen, SmolLM2 and others
BOS_OR_EOS = "bos-or-eos"  # first token of contexts in earlier versions: the tokenizer's BOS, or EOS without a BOS
TURN_MARKERS = frozenset(
    {
        "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|start_header_id|>",
        "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|user|>", "<|assistant|>",
        "<|system|>", "<|end|>", "<|start|>", "<|message|>", "<|return|>", "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>", "[INST]", "[/INST]", "<|end_of_role|>", "<|start_of_role|>",
    }
)  # fmt: skip  # of widely used chat templates; a tokenizer without a template can have them too


class BosChoice(NamedTuple):
    """The token that contexts begin with, and why it was chosen."""

    id: int | None
    reason: str


def special_token_ids(tokenizer: Any) -> list[int]:
    """The ids of pad, EOS and BOS, sorted: tokens whose rows are neither harvested nor evaluated."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return sorted({i for i in ids if i is not None})


def bos_or_eos_id(tokenizer: Any) -> int | None:
    """The tokenizer's BOS, else its EOS, else None: the first token of contexts in earlier versions."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def choose_bos(tokenizer: Any, request: str = "auto") -> BosChoice:
    """The token that contexts begin with, for a value of `--bos`: "auto", "none", or a token as text or id.

    "auto" is the first of these that exists: the token that the tokenizer itself puts before a text; `<|endoftext|>`,
    if it is a special token of the vocabulary; bos_token or eos_token, unless it begins or ends a chat turn. If none of
    these tokens exists, contexts begin with the first token of their text. A turn marker at the beginning of ordinary
    text is unlike the model's training data, and causes attention sinks.

    Raises UsageError for a token that the vocabulary does not have.
    """
    if request == "none":
        return BosChoice(None, "--bos none")
    if request.lower() in ("auto", "none") and request != "auto":
        number = tokenizer.get_vocab().get(request)
        token = "" if number is None else f", or {number} for the token of that text"
        raise UsageError(f"--bos {request}: write {request.lower()}{token}.")
    if request == BOS_OR_EOS:
        return BosChoice(bos_or_eos_id(tokenizer), "the tokenizer's bos_token, else its eos_token")
    if request != "auto":
        return BosChoice(find_token(tokenizer, request, "--bos"), f"--bos {request}")
    if (added := added_bos_id(tokenizer)) is not None:
        return BosChoice(added, "the tokenizer puts it before a text")
    if ENDOFTEXT in special_tokens(tokenizer):
        return BosChoice(special_tokens(tokenizer)[ENDOFTEXT], "in the vocabulary; the tokenizer adds none")
    markers = turn_markers(tokenizer)
    for name in ("bos_token", "eos_token"):
        token = getattr(tokenizer, name)
        if token is not None and token not in markers:
            return BosChoice(getattr(tokenizer, f"{name}_id"), f"the tokenizer's {name}; the tokenizer adds none")
    bounds = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token in markers]
    why = f"{' and '.join(dict.fromkeys(bounds))} would begin or end a chat turn" if bounds else "it has none"
    return BosChoice(None, f"the tokenizer adds none, and {why}")


def added_bos_id(tokenizer: Any) -> int | None:
    """The id that the tokenizer itself puts before a text. If the tokenizer puts several ids there: the id of bos_token
    if it is among them, otherwise the last id.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    prefix = whole[: starts[0]] if bare and starts else []
    if not prefix:
        return None
    return tokenizer.bos_token_id if tokenizer.bos_token_id in prefix else prefix[-1]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """{text: id} of the special tokens. Each of them is matched in a text as one unit, and skipped when decoding."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def turn_markers(tokenizer: Any) -> set[str]:
    """The special tokens that begin or end a chat turn: well-known ones, and those found in a rendered conversation."""
    conversation = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    known = {token for token in special_tokens(tokenizer) if token in TURN_MARKERS}
    if not getattr(tokenizer, "chat_template", None):
        return known
    try:
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception:  # a template can raise its own errors, for example about roles
        return known
    return known | {token for token in special_tokens(tokenizer) if rendered.find(token, 1) > 0}


def find_token(tokenizer: Any, token: str, flag: str) -> int:
    """The id of the token that `token` specifies, which is the token's text or its id in decimal digits.

    Raises UsageError if the vocabulary lacks the token.
    """
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    if token.isascii() and token.isdigit():
        if int(token) < len(tokenizer):
            return int(token)
        raise UsageError(f"{flag} {token}: the tokenizer has the ids 0 to {len(tokenizer) - 1:,}.")
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids) == token:
        return ids[0]  # text that is spelled differently in the vocabulary, such as a newline
    known = dict.fromkeys([*special_tokens(tokenizer), *tokenizer.get_added_vocab()])
    raise UsageError(f"{flag} {token!r} is not one token of this tokenizer{did_you_mean(token, list(known)[:400])}")


def token_text(tokenizer: Any, token: int) -> str:
    """The spelling of a token in the vocabulary, for messages."""
    return str(tokenizer.convert_ids_to_tokens(token))
