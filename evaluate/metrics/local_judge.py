"""A judge on this machine: a chat model of transformers, for users without an API key."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...common.errors import UsageError
from ...common.files import digest_of
from ...harvest.model import find_model, load_tokenizer, load_whole_model
from .llm_judge import MAX_ANSWER_TOKENS, KeepAnswer, Message

TOKENS_PER_BATCH = 8192  # tokens of the questions that are answered together, including padding and answers


class LocalJudge:
    """A chat model, named by its Hub id or its folder. The model is loaded when the first question is asked. No code
    from the model's repository is run.

    Decoding is greedy. Questions of similar length are answered together. Rounding depends on the batch, so an answer
    can change where two tokens are almost equally likely. The same questions on the same machine get the same answers.

    Memory: the weights, and the keys and values of TOKENS_PER_BATCH tokens (0.2 GB for SmolLM2-135M in float32, 1 GB
    for Llama 3 8B in bfloat16).

    Raises UsageError for a model without a chat template, and the errors of `sae harvest` for a model that cannot be
    loaded.
    """

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self.device, self.dtype = device, dtype
        if model.startswith((".", "/", "~")) and not Path(model).is_dir():
            raise UsageError(
                f"autointerp.judge_model={model}: there is no such folder. Give the Hub id or the folder of a chat "
                "model."
            )
        self.source, self.config = find_model(model)
        self.tokenizer: Any = load_tokenizer(self.source)
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"autointerp.judge_model={model} has no chat template, so it cannot answer questions. Name a "
                "model that was trained to answer, such as one whose name ends with Instruct or -it."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, other than the questions, that affect the judge's answers."""
        # If the model is a folder, its revision is a digest of its files that leaves out chat_template.jinja.
        template = digest_of(self.tokenizer.chat_template)[:16]
        return {"judge_revision": self.source.revision, "judge_dtype": self.dtype, "judge_template": template}

    @cached_property
    def model(self) -> Any:
        return load_whole_model(self.source, self.config, dtype=self.dtype, device=self.device, attention=None)

    def answer_all(self, questions: Sequence[Sequence[Message]], keep: KeepAnswer) -> None:
        """Answer all questions, the longest first, and call `keep(index, answer)` after each batch."""
        ids = [self.encode(messages) for messages in questions]
        for batch in batches([len(one) for one in ids], TOKENS_PER_BATCH):
            for index, answer in zip(batch, self.generate([ids[index] for index in batch]), strict=True):
                keep(index, answer)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a question. If the template accepts no system message, the text of the system message is put at
        the beginning of the user's message."""
        from jinja2 import TemplateError

        def render(conversation: list[Message]) -> list[int]:
            text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        try:
            return render(list(messages))
        except TemplateError:
            return render([{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}])

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]]) -> list[str]:
        """The answers to prompts that are run as one batch, padded on the left."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids_BS = torch.full((len(prompts), width), pad or 0)
        mask_BS = torch.zeros_like(ids_BS)
        for row, prompt in enumerate(prompts):
            ids_BS[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BS[row, width - len(prompt) :] = 1
        answer_BS = self.model.generate(
            ids_BS.to(self.device), attention_mask=mask_BS.to(self.device), do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, max_new_tokens=MAX_ANSWER_TOKENS, pad_token_id=pad or 0,
        )[:, width:]  # fmt: skip
        return self.tokenizer.batch_decode(answer_BS, skip_special_tokens=True)


def batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Sort prompts by length, the longest first, and yield the indices of the prompts of each batch.

    `lengths` are the lengths of the prompts. A batch has at most `limit` tokens, including padding and answers, but a
    prompt that exceeds `limit` by itself forms a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and (len(batch) + 1) * (longest + MAX_ANSWER_TOKENS) > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
