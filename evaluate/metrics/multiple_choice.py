"""Multiple-choice questions, and an instruction-tuned model that answers them (unlearning).

Shape suffixes: N prompts or questions, S positions, V vocabulary, I interventions, R replicates of a bootstrap.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cache.context_format import ContextFormat
from ...common.device import copy_to_device
from ...common.errors import UsageError
from ...common.special_tokens import special_token_ids
from ...harvest.model import LanguageModel
from .probes import make_generator

LETTERS = "ABCD"
PROMPTS_PER_FORWARD = 8  # prompts in one forward pass of the model
REPLICATES = 1000


class Question(NamedTuple):
    text: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    subject: str = ""

    def reorder(self, order: Sequence[int]) -> "Question":
        """The same question with its choices in another order."""
        return self._replace(choices=tuple(self.choices[i] for i in order), answer=order.index(self.answer))


def parse_question(row: dict[str, Any], number: int, name: str) -> Question:
    """Parse row `number` of the dataset `name`. Raises UsageError if the row is invalid."""
    text, choices, answer = row["question"], row["choices"], row["answer"]
    if not (isinstance(text, str) and isinstance(choices, list) and len(choices) == 4 and answer in range(4)):
        raise UsageError(
            f"Row {number} of {name} is not a question. Expected a text, 4 choices and an answer from 0 to "
            f"3. Found {type(text).__name__}, {choices!r:.60} and {answer!r:.20}. Fix or remove the row."
        )
    return Question(text, tuple(map(str, choices)), answer)


class MultipleChoiceModel:
    """An instruction-tuned model that picks A, B, C or D. A prompt is one user turn with the question, then "Answer:
    (".

    Prompts begin with `bos_id`. This token is added here unless the template adds it.

    Raises UsageError if the tokenizer has no chat template or no tokens for the four letters.
    """

    def __init__(self, model: LanguageModel, tokenizer: Any, identity: dict[str, str], bos_id: int | None) -> None:
        self.model, self.tokenizer, self.identity, self.bos_id = model, tokenizer, identity, bos_id
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"{identity['name']} has no chat template, so it is not an instruction-tuned model. Give the "
                "folder or the Hub id of an instruction-tuned model with --set unlearning.model=..."
            )
        letters = [[tokenizer.encode(space + a, add_special_tokens=False) for space in ("", " ")] for a in LETTERS]
        if any(len(plain) != 1 for plain, _ in letters):
            raise UsageError(f"The tokenizer of {identity['name']} has no tokens A, B, C and D to answer with.")
        self.letters = torch.tensor(
            [[plain[0], spaced[0] if len(spaced) == 1 else plain[0]] for plain, spaced in letters]
        )
        skip = {*special_token_ids(tokenizer), *([] if bos_id is None else [bos_id])}
        self.context_format = ContextFormat(bos_id, tuple(sorted(skip)))

    def prompt(self, subject: str, question: Question) -> list[int]:
        """The token ids of a question, with WMDP's wording as SAEBench uses it."""
        choices = "".join(f"\n{a}. {choice}" for a, choice in zip(LETTERS, question.choices, strict=True))
        body = f"The following are multiple choice questions (with answers) about {subject}.\n{question.text}{choices}"
        turns = [{"role": "user", "content": body}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "Answer: ("
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if self.bos_id is None or ids[0] == self.bos_id else [self.bos_id, *ids]

    def batches(self, prompts: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield batches of prompts of similar length: the indices of the prompts, their token ids (N, S), padded on the
        right, and the position of the last token of each (N,)."""
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(longest_first), PROMPTS_PER_FORWARD):
            batch = longest_first[start : start + PROMPTS_PER_FORWARD]
            ids_NS = torch.zeros(len(batch), len(prompts[batch[0]]), dtype=torch.int64)
            for row, i in enumerate(batch):
                ids_NS[row, : len(prompts[i])] = torch.tensor(prompts[i])
            last_N = torch.tensor([len(prompts[i]) - 1 for i in batch])
            device = self.model.device
            yield batch, copy_to_device(ids_NS, device), copy_to_device(last_N, device)

    def pick(self, logits: Tensor) -> Tensor:
        """The choice (...,) whose letter, with or without a leading space, has the largest of the logits (..., V).

        Probabilities are not needed, because softmax preserves the order of logits.
        """
        return logits.float()[..., self.letters.to(logits.device)].amax(-1).argmax(-1)

    def answers(self, prompts: Sequence[list[int]]) -> list[int]:
        """The choice of each prompt."""
        picks = [0] * len(prompts)
        for batch, ids_NS, last_N in self.batches(prompts):
            final_NSD = self.model.forward(ids_NS, []).final
            logits_NV = self.model.unembed(final_NSD[torch.arange(len(last_N)), last_N])
            for i, pick in zip(batch, self.pick(logits_NV).tolist(), strict=True):
                picks[i] = pick
        return picks


def resample_right(right_IN: Tensor, name: str) -> Tensor:
    """Bootstrap the number of right answers (R, I). `right_IN` says which answers are right under each intervention.

    The draws are seeded by `name`, so they are the same for every SAE.
    """
    count = right_IN.shape[1]
    drawn_RN = torch.randint(
        count, (REPLICATES, count), generator=make_generator("paired", "bootstrap", "unlearning", name)
    )
    weight_RN = torch.zeros(drawn_RN.shape, dtype=torch.float64)
    weight_RN.scatter_add_(1, drawn_RN, torch.ones(()).double().expand(drawn_RN.shape))
    return weight_RN @ right_IN.double().T
