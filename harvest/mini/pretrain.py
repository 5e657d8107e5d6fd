"""Pretrain gemma-2-mini from scratch: `python -m sae.harvest.mini.pretrain --out FOLDER`.

The model is a `Gemma2ForCausalLM` with Gemma-2-2B's depth (26 blocks) and a width of 128. The model is trained on the
harvested documents of corpus.py and on spelling prompts. One feature is planted on purpose: a linear head on the
residual stream after block 4 predicts the first letter of every token that is a word, and its loss is added to the
model's. The head is thrown away afterwards. The head makes the first letter a known linear feature of the residual
stream, and a test of an absorption metric needs such a feature. Without the head, the model carries the word itself to
the answer and looks up the letter there, and no probe finds the letter at the word.
"""

import argparse
import copy
import json
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from ...common.remote_code import from_pretrained
from .corpus import stdlib_documents
from .spelling import TEMPLATE, SpellingWord, spelling_line, spelling_words

VOCABULARY = 8192
CONTEXT = 128
BATCH, SPELLING = 16, 3  # contexts in a step, and how many of them consist of spelling lines
STEPS = 1800
PLANTED_AFTER, PLANTED_WEIGHT = 4, 0.3
PAD, EOS, BOS = 0, 1, 2  # Gemma's ids
RARE = "JKQUVWXYZ"  # letters for which a plain BPE of this text has too few whole words
LETTERS = 26


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE like Gemma's (▁ for a space), with enough words as single tokens for every first letter."""
    normalizer = normalizers.Replace(" ", "▁")
    splitter = pre_tokenizers.Split(Regex(r"\n+|▁?\p{L}+|\p{N}|▁?[^\p{L}\p{N}▁\n]+|▁+(?!▁?\S)|▁+(?=▁)|▁"), "isolated")
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 4 - 256, limit_alphabet=160, show_progress=False)
    learner.train_from_iterator(texts + boosted_words(texts), trainer)

    state = json.loads(learner.model.__getstate__())  # the model's JSON
    pieces = sorted(state["vocab"], key=state["vocab"].get)
    order = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    vocabulary = {piece: i for i, piece in enumerate(order)}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]

    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer, bpe.pre_tokenizer = normalizer, splitter
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>",
        padding_side="right", clean_up_tokenization_spaces=False, model_max_length=8192,
    )  # fmt: skip


def boosted_words(texts: list[str]) -> list[str]:
    """The most frequent words of the rare letters, repeated often enough that each becomes one token."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"(?<![A-Za-z])[A-Za-z]{2,10}(?![A-Za-z])", text):
            if word[0].upper() in RARE:
                counts[word] = counts.get(word, 0) + 1
    boosted = []
    for letter in RARE:
        of_letter = sorted((w for w in counts if w[0].upper() == letter), key=lambda w: (-counts[w], w))
        boosted += [f"▁{word}" for word in of_letter[:50] for _ in range(400)]
    # Each word of the template is one token too, so that the spelled word is at position -6, as with Gemma.
    return [" ".join(boosted), TEMPLATE * 400]


class PlantedHead(nn.Module):
    """Predicts the first letter of a word linearly from the residual stream after block `PLANTED_AFTER`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.read = nn.Linear(width, LETTERS)

    def forward(self, residual_BSD: Tensor, letter_BS: Tensor) -> Tensor:
        return F.cross_entropy(self.read(self.norm(residual_BSD)).flatten(0, 1), letter_BS.flatten(), ignore_index=-100)


class PretrainBatches:
    """Random contexts of text and of spelling, with labels."""

    def __init__(self, tokenizer: Any, stream: Tensor, seed: int) -> None:
        self.stream, self.rng, self.words = stream, random.Random(seed), spelling_words(tokenizer)
        self.letter_of_token = torch.full((len(tokenizer),), -100)
        for word in self.words:
            self.letter_of_token[word.token] = ord(word.letter) - ord("A")
        ids = tokenizer.encode
        self.template = ids(TEMPLATE, add_special_tokens=False)
        self.newline = ids("\n", add_special_tokens=False)
        self.answer = {chr(65 + i): ids(f" {chr(65 + i)}", add_special_tokens=False) for i in range(LETTERS)}
        sample = self.rng.sample(self.words, 3)
        text = "".join(f"\n{spelling_line(word)}" for word in sample)
        assert ids(text, add_special_tokens=False) == [token for word in sample for token in self._line(word)]

    def _line(self, word: SpellingWord) -> list[int]:
        return [*self.newline, word.token, *self.template, *self.answer[word.letter]]

    def _spelling(self) -> tuple[list[int], list[int]]:
        """The ids of a spelling context and its labels: -100 at the words, which cannot be predicted."""
        ids, labels = [BOS], [-100]
        # For half of the words the letter is drawn first, so that rare letters are spelled often enough.
        while len(ids) < CONTEXT:
            word = self.rng.choice(self.words)
            if self.rng.random() < 0.5:
                letter = chr(65 + self.rng.randrange(LETTERS))
                word = self.rng.choice([w for w in self.words if w.letter == letter] or [word])
            line = self._line(word)
            ids += line
            labels += [line[0], -100, *line[2:]]
        return ids[:CONTEXT], labels[:CONTEXT]

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next batch: ids, labels and first letters, each (BATCH, CONTEXT)."""
        starts = [self.rng.randrange(len(self.stream) - CONTEXT) for _ in range(BATCH - SPELLING)]
        text = torch.stack([torch.cat([torch.tensor([BOS]), self.stream[s : s + CONTEXT - 1]]) for s in starts])
        spelled = [self._spelling() for _ in range(SPELLING)]
        ids = torch.cat([text, torch.tensor([s[0] for s in spelled])])
        labels = torch.cat([text, torch.tensor([s[1] for s in spelled])])
        return ids, labels, self.letter_of_token[ids]


def make_model() -> Gemma2ForCausalLM:
    """An initialized model."""
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=26,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
        max_position_embeddings=8192, sliding_window=4096, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS,
        attn_implementation="eager", tie_word_embeddings=True,  # type: ignore[call-arg]
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        # Gemma multiplies embeddings by sqrt(width), so the rows of the embedding matrix start with a norm of about 1.
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=config.hidden_size**-0.5)
        if "post_" in name:  # so that each of the 52 sublayers adds 0.3 of the embedding's norm
            nn.init.constant_(parameter, -0.7)
    return model


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalized update (Jordan et al. 2024), for all matrices of one shape at once.

    torch.optim.Muon runs its iteration in bfloat16, one matrix at a time, which is six times slower on a CPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in self.param_groups[0]["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self.stacks = [(same, torch.zeros(len(same), *shape)) for shape, same in by_shape.items()]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for parameters, momentum_PRC in self.stacks:
            gradient_PRC = torch.stack([p.grad for p in parameters if p.grad is not None])
            momentum_PRC.lerp_(gradient_PRC, 1 - group["momentum"])
            update_PRC = orthogonal(gradient_PRC.lerp(momentum_PRC, group["momentum"]))
            rate = group["lr"] * max(1.0, update_PRC.shape[1] / update_PRC.shape[2]) ** 0.5
            torch._foreach_add_(parameters, list(update_PRC.unbind()), alpha=-rate)


def orthogonal(x_PRC: Tensor) -> Tensor:
    """Approximately the nearest semi-orthogonal matrices: five steps of the quintic Newton-Schulz iteration."""
    tall = x_PRC.shape[1] > x_PRC.shape[2]
    x = x_PRC.mT if tall else x_PRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(model: nn.Module, head: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, Adam for the embedding, the norms and the planted head."""
    inside = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n] + list(head.parameters())
    return [Muon(inside, lr=0.02), torch.optim.Adam(rest, lr=3e-3, betas=(0.9, 0.98))]


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up for fifty steps, stay constant until 5/9 of the run, then decay linearly to a fifth."""
    return min(1.0, (step + 1) / 50, 2 * (1 - 0.9 * step / steps))


def train(
    model: Any, head: nn.Module, batches: PretrainBatches, steps: int, log: Callable[[str], None],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Train model and head, with a log line every 20 steps and `save` every 200."""
    optimizers = make_optimizers(model, head)
    rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    for layer in model.model.layers:
        layer.compile()  # one compiled block serves all 26

    @torch.compile
    def losses(final_BSD: Tensor, planted_BSD: Tensor, labels_BS: Tensor, letters_BS: Tensor) -> tuple[Tensor, Tensor]:
        logits = 30 * torch.tanh(model.lm_head(final_BSD[:, :-1]) / 30)
        return F.cross_entropy(logits.flatten(0, 1), labels_BS[:, 1:].flatten()), head(planted_BSD, letters_BS)

    started = time.time()
    for step in range(steps):
        for group, rate in rates:
            group["lr"] = rate * learning_rate_factor(step, steps)
        ids, labels, letters = batches.next()
        hidden = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        text, planted = losses(hidden[-1], hidden[PLANTED_AFTER + 1], labels, letters)
        (text + PLANTED_WEIGHT * planted).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            log(f"step {step} {time.time() - started:.0f}s loss {text.item():.3f} first letter {planted.item():.3f}")
        if step % 200 == 199:
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"number of training steps, each of {BATCH * CONTEXT} tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    texts = [d.text for d in stdlib_documents() if not d.held_out]
    make_tokenizer(texts).save_pretrained(arguments.out)
    tokenizer = from_pretrained(AutoTokenizer, arguments.out)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in ids])
    counts = torch.bincount(stream, minlength=VOCABULARY) + 1.0
    unigram = -(counts / counts.sum()).log()
    print(
        f"{len(texts)} documents, {len(stream):,} tokens; train unigram entropy {unigram[stream].mean():.3f} nats",
        flush=True,
    )
    letters = [w.letter for w in spelling_words(tokenizer)]
    print("words per letter:", {c: letters.count(c) for c in sorted(set(letters))}, flush=True)

    model = make_model()
    head = PlantedHead(model.config.hidden_size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def save() -> None:
        copy.deepcopy(model).bfloat16().save_pretrained(arguments.out)

    batches = PretrainBatches(tokenizer, stream, arguments.seed)
    train(model, head, batches, arguments.steps, lambda line: print(line, flush=True), save)
    save()


if __name__ == "__main__":
    main()
