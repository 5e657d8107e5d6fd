"""The questions of RAVEL, the model's answers, and the pairs of questions for the interventions.

Nothing here depends on an SAE. Orders and random draws follow SAEBench 0.6.0 (`ravel/instance.py`,
`ravel/intervention.py`), so that the same answers lead to the same pairs.

Shape suffixes: N prompts, S positions, K generated tokens.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...common.device import copy_to_device
from ...common.errors import UsageError
from ...common.files import digest_of
from ...common.tokenizers import is_fast
from ...harvest.model import LanguageModel
from ..context import EvalContext
from ..datasets.ravel import PLACEHOLDER, EntityFacts
from .base import Progress
from .ravel_answers import is_right

PROMPTS_PER_BLOCK = 2048  # prompts whose answers are stored in one file of the artifact cache
PROMPTS_PER_FORWARD = 64


@dataclass(frozen=True)
class FactPrompt:
    """A question about an attribute of an entity.

    Attributes:
        position: the index in `ids` of the entity's last token, counted from the end (negative).
        first_token: the first token of the model's answer; -1 before the model has been asked.
    """

    text: str
    entity: str
    attribute: str
    value: str
    ids: tuple[int, ...]
    position: int
    first_token: int = -1


class FactPair(NamedTuple):
    """Two questions about one attribute. The entity's activations in `base` are replaced by those in `source`.

    `base` and `source` are indices of prompts. The wanted answer is `value`, whose first token is `target`.
    """

    base: int
    source: int
    target: int
    value: str


class PairSplit(NamedTuple):
    """The pairs of one attribute, split into those that train the mask and those that test it."""

    train: list[FactPair]
    test: list[FactPair]


class PaddedPrompts(NamedTuple):
    """Prompts as one batch, padded on one side: ids (N, S), a mask of tokens (N, S), and each entity's position (N,).

    `last_N` has the positions of the last tokens.
    """

    ids_NS: Tensor
    is_token_NS: Tensor
    entity_N: Tensor
    last_N: Tensor


def make_prompts(ctx: EvalContext, facts: EntityFacts, attributes: tuple[str, ...]) -> list[FactPrompt]:
    """Every question about these attributes, entity by entity. Raises UsageError for a token without an embedding."""
    questions = list(facts.questions(attributes))
    fills = [fill(template, entity) for entity, _, template, _ in questions]
    texts = [text for text, _ in fills]
    if not texts:
        return []
    positions = entity_positions(ctx.tokenizer, fills)
    return [
        FactPrompt(text, entity, attribute, value, tuple(ids), position)
        for (entity, attribute, _, value), text, ids, position in zip(
            questions, texts, ctx.encode_texts(texts), positions, strict=True
        )
    ]


def fill(template: str, entity: str) -> tuple[str, int]:
    """The text of a question, and where the entity ends in it. As in Python's format strings, %% is a percent sign."""
    before, after = (part.replace("%%", "%") for part in template.split(PLACEHOLDER))
    return f"{before}{entity}{after}", len(before) + len(entity)


def entity_positions(tokenizer: Any, fills: Sequence[tuple[str, int]]) -> list[int]:
    """The position of the entity's last token in each text, counted from the end.

    This is the last token that begins before the entity ends. SAEBench counts the tokens of the text after the entity,
    which leads to the same position unless one token contains the end of the entity and the beginning of that text.
    """
    texts = [text for text, _ in fills]
    if not is_fast(tokenizer):
        after = tokenizer([text[end:] for text, end in fills], add_special_tokens=False)["input_ids"]
        return [-len(ids) - 1 for ids in after]
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        max(i for i, (start, _) in enumerate(of_text) if start < end) - len(of_text)
        for of_text, (_, end) in zip(offsets, fills, strict=True)
    ]


def pad_id(tokenizer: Any) -> int:
    """The token for padding; nothing attends to it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def pad_prompts(prompts: Sequence[FactPrompt], pad: int, device: torch.device, left: bool = False) -> PaddedPrompts:
    """The prompts as one batch."""
    lengths_N = torch.tensor([len(prompt.ids) for prompt in prompts])
    width = int(lengths_N.max())
    ids_NS = torch.full((len(prompts), width), pad)
    is_token_NS = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt.ids), None) if left else slice(len(prompt.ids))
        ids_NS[row, place] = torch.tensor(prompt.ids)
        is_token_NS[row, place] = True
    end_N = torch.full_like(lengths_N, width) if left else lengths_N
    entity_N = end_N + torch.tensor([prompt.position for prompt in prompts])
    return PaddedPrompts(*(copy_to_device(part, device) for part in (ids_NS, is_token_NS, entity_N, end_N - 1)))


@torch.no_grad()
def generate(model: LanguageModel, batch: PaddedPrompts, tokens: int, pad: int) -> Tensor:
    """The model's most probable continuation of each prompt, (N, K). The batch is padded on the left.

    After an end-of-text token, the continuation is padding.

    Raises UsageError if the model cannot generate.
    """
    if not hasattr(model.model, "generate"):
        raise UsageError(f"{type(model.model).__name__} cannot generate text, which RAVEL needs.")
    found_NL = model.model.generate(
        input_ids=batch.ids_NS, attention_mask=batch.is_token_NS.long(), max_new_tokens=tokens, do_sample=False,
        pad_token_id=pad,
    )  # fmt: skip
    found_NK = found_NL[:, batch.ids_NS.shape[1] :]
    return torch.nn.functional.pad(found_NK, (0, tokens - found_NK.shape[1]), value=pad)


def by_length(prompts: Sequence[FactPrompt], size: int) -> Iterator[list[int]]:
    """The indices of the prompts, in batches of at most `size` prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    yield from (order[start : start + size] for start in range(0, len(order), size))


def ask(ctx: EvalContext, prompts: Sequence[FactPrompt], tokens: int, what: str, progress: Progress) -> Tensor:
    """The first `tokens` tokens of the model's answer to each prompt (N, K), from the artifact cache or generated.

    The cache is filled block by block, so that after a kill, questions of complete blocks are not asked again.
    """
    pad = pad_id(ctx.tokenizer)
    blocks = []
    for start in range(0, len(prompts), PROMPTS_PER_BLOCK):
        block = prompts[start : start + PROMPTS_PER_BLOCK]

        def make(block: Sequence[FactPrompt] = block, start: int = start) -> dict[str, Tensor]:
            answer_NK = torch.zeros(len(block), tokens, dtype=torch.int64)
            done = start
            for chosen in by_length(block, PROMPTS_PER_FORWARD):
                batch = pad_prompts([block[i] for i in chosen], pad, ctx.model.device, left=True)
                answer_NK[chosen] = generate(ctx.model, batch, tokens, pad).cpu()
                done += len(chosen)
                progress(done, len(prompts), f"questions about a {what}")
            return {"answer": answer_NK}

        depends = {**ctx.model_identity, "tokens": tokens, "prompts": digest_of([prompt.ids for prompt in block])}
        blocks.append(ctx.artifacts.get_or_compute("ravel-answers", depends, make)["answer"])
    return torch.cat(blocks) if blocks else torch.zeros(0, tokens, dtype=torch.int64)


def known_prompts(
    prompts: Sequence[FactPrompt], answer_NK: Tensor, tokenizer: Any, top_entities: int
) -> list[FactPrompt]:
    """The prompts that the model answers right, for the entities with the most such prompts."""
    answers = tokenizer.batch_decode(answer_NK)
    known = [
        replace(prompt, first_token=first)
        for prompt, answer, first in zip(prompts, answers, answer_NK[:, 0].tolist(), strict=True)
        if is_right(prompt.text, prompt.value, answer)
    ]
    right = Counter(prompt.entity for prompt in known)
    kept = set(sorted(right, key=lambda entity: -right[entity])[:top_entities])
    return [prompt for prompt in known if prompt.entity in kept]


def entity_rows(
    ctx: EvalContext, prompts: Sequence[FactPrompt], hooks: Sequence[Hook], progress: Progress
) -> dict[Hook, Tensor]:
    """The activations at the entity's last token of every prompt (N, d), from the artifact cache or one pass."""
    depends = {**ctx.model_identity, "prompts": digest_of([[prompt.ids, prompt.position] for prompt in prompts])}
    made: dict[Hook, Tensor] = {}

    def make(hook: Hook) -> dict[str, Tensor]:
        if not made:
            made.update(capture_rows(ctx, prompts, hooks, progress))
        return {"x": made.pop(hook)}

    read = ctx.artifacts.get_or_compute
    with ctx.artifacts.claim("ravel-rows", ({**depends, **hook.record} for hook in hooks)):
        return {
            hook: read("ravel-rows", {**depends, **hook.record}, partial(make, hook), ctx.device)["x"] for hook in hooks
        }


def capture_rows(
    ctx: EvalContext, prompts: Sequence[FactPrompt], hooks: Sequence[Hook], progress: Progress
) -> dict[Hook, Tensor]:
    rows: dict[Hook, Tensor] = {}
    done = 0
    for chosen in by_length(prompts, PROMPTS_PER_FORWARD):
        batch = pad_prompts([prompts[i] for i in chosen], pad_id(ctx.tokenizer), ctx.model.device)
        for hook, x_NSD in ctx.model.capture_hooks(batch.ids_NS, hooks).items():
            x_ND = x_NSD[torch.arange(len(chosen)), batch.entity_N].cpu()
            rows.setdefault(hook, x_ND.new_zeros(len(prompts), x_ND.shape[1]))[chosen] = x_ND
        done += len(chosen)
        progress(done, len(prompts), "activations of entities")
    return rows


def draw_pairs(
    prompts: Sequence[FactPrompt], attributes: Sequence[str], changed: str, count: int, share: float, rng: random.Random
) -> PairSplit:
    """The pairs for changing one attribute while the others stay the same.

    At most `count` pairs are about the attribute `changed`. For these, the model should give the answer to the source
    question. The pairs about all other attributes together are at most as many as those about `changed`. For these, the
    model should still give the answer to the base question. A `share` of all pairs is for training.

    The random draws equal those of SAEBench 0.6.0, in the same order.
    """
    causes = [
        FactPair(base, source, prompts[source].first_token, prompts[source].value)
        for base, source in sample_pairs(prompts, changed, count, rng)
    ]
    others = [pair for other in attributes if other != changed for pair in sample_pairs(prompts, other, count, rng)]
    rng.shuffle(others)
    keeps = [
        FactPair(base, source, prompts[base].first_token, prompts[base].value) for base, source in others[: len(causes)]
    ]
    pairs = causes + keeps
    rng.shuffle(pairs)
    train = int(len(pairs) * share)
    return PairSplit(pairs[:train], pairs[train:])


def sample_pairs(
    prompts: Sequence[FactPrompt], attribute: str, count: int, rng: random.Random
) -> list[tuple[int, int]]:
    """Pairs (base, source) of prompts about one attribute, with different values of it."""
    own = [i for i, prompt in enumerate(prompts) if prompt.attribute == attribute]
    bases = own if len(own) < count else rng.sample(own, count)
    others = {
        value: [i for i in own if prompts[i].value != value] for value in dict.fromkeys(prompts[i].value for i in own)
    }
    return [(base, rng.choice(others[prompts[base].value])) for base in bases]


def whole_batches(pairs: Sequence[FactPair], size: int) -> list[Sequence[FactPair]]:
    """Batches of `size` pairs; the last is left out if it is smaller, as in SAEBench."""
    return [pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size)]
