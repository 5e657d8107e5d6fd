"""The three criteria that gemma-2-mini has to meet: `python -m sae.harvest.mini.quality` measures them.

1. The model's cross-entropy on held-out documents is at least 2.5 nats below that of the training split's unigram
   distribution.
2. For at least 20 letters, the model answers over 90% of new ten-shot spelling prompts correctly (for words that it was
   trained to spell).
3. A linear probe on the residual stream after block 12, at the word's token, predicts the first letter of words that
   it was not trained on: its F1 is above 0.6 for at least 20 letters (mean of five splits; letters with ten words or
   more; " cat", "cat" and "Cat" are always in the same split).
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from ...common.remote_code import from_pretrained
from ..model import LanguageModel, find_model, load_model
from . import WEIGHTS
from .corpus import stdlib_documents
from .spelling import TEMPLATE, SpellingWord, sample_others, spelling_prompt, spelling_words

CONTEXT = 128
PROBED_LAYERS = (5, 12, 19)
SHOTS = 10
WORD_FROM_END = 6  # the word, then the five tokens of the template


def batches_of(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def tokenize_documents(tokenizer: Any, *, held_out: bool) -> list[list[int]]:
    """The token ids of the training documents or of the held-out documents."""
    texts = [d.text for d in stdlib_documents() if d.held_out == held_out]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


@torch.no_grad()
def cross_entropies(model: LanguageModel, tokenizer: Any, contexts: int) -> tuple[float, float, int]:
    """Cross-entropies on held-out text, in nats per token, and the number of held-out tokens.

    The first cross-entropy is the model's; the second is that of the training split's unigram distribution.
    """
    train = torch.tensor([t for ids in tokenize_documents(tokenizer, held_out=False) for t in ids])
    held_out = tokenize_documents(tokenizer, held_out=True)
    counts = torch.bincount(train, minlength=len(tokenizer)) + 1.0
    unigram = -(counts / counts.sum()).log()
    bodies = [ids[s : s + CONTEXT - 1] for ids in held_out for s in range(0, len(ids) - CONTEXT, CONTEXT - 1)]
    chosen = random.Random(0).sample(bodies, min(contexts, len(bodies)))
    losses, baselines = [], []
    for batch in batches_of(chosen, 16):
        ids = torch.tensor([[tokenizer.bos_token_id, *body] for body in batch])
        logits = model.model(ids, use_cache=False).logits.float()
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        baselines.append(unigram[ids[:, 1:]].mean())
    return float(torch.stack(losses).mean()), float(torch.stack(baselines).mean()), sum(map(len, held_out))


@torch.no_grad()
def spelling_accuracy(model: LanguageModel, tokenizer: Any, per_letter: int) -> dict[str, float]:
    """Letter -> share of new ten-shot prompts that the model answers with the right letter."""
    pool, rng = spelling_words(tokenizer), random.Random(1)
    accuracy = {}
    for letter in sorted({word.letter for word in pool}):
        targets = [rng.choice([w for w in pool if w.letter == letter]) for _ in range(per_letter)]
        ids = encode_prompts(tokenizer, [spelling_prompt(sample_others(pool, w, SHOTS, rng), w) for w in targets])
        answer = tokenizer.encode(f" {letter}", add_special_tokens=False)[0]
        guesses = torch.cat([model.model(b, use_cache=False).logits[:, -1].argmax(-1) for b in ids.split(16)])
        accuracy[letter] = float((guesses == answer).float().mean())
    return accuracy


def encode_prompts(tokenizer: Any, texts: list[str]) -> Tensor:
    """The ids of prompts (N, S). With this vocabulary every prompt has the same length."""
    encoded = tokenizer(texts)["input_ids"]
    if len({len(ids) for ids in encoded}) != 1:
        raise ValueError("the prompts differ in length: a word of the pool or of the template is not a single token")
    return torch.tensor(encoded)


@torch.no_grad()
def probe_f1(model: LanguageModel, tokenizer: Any, limit: int) -> dict[int, dict[str, float]]:
    """Layer -> letter -> F1 of a linear probe at the word, on words that it was not trained on; mean of five splits."""
    rng = random.Random(2)
    pool = spelling_words(tokenizer)
    by_letter: dict[str, list[SpellingWord]] = {}
    for word in rng.sample(pool, len(pool)):
        by_letter.setdefault(word.letter, []).append(word)
    targets = [word for words in by_letter.values() if len(words) >= 10 for word in words[:limit]]
    ids = encode_prompts(tokenizer, [spelling_prompt(sample_others(pool, w, SHOTS, rng), w) for w in targets])
    captured = [model.capture(batch, PROBED_LAYERS) for batch in ids.split(32)]
    labels = np.array([word.letter for word in targets])
    stems = np.array([word.text.strip().lower() for word in targets])
    results = {}
    for layer in PROBED_LAYERS:
        x = torch.cat([c[layer][:, -WORD_FROM_END] for c in captured]).numpy()
        x = (x - x.mean(0)) / x.std(0)
        scores: list[np.ndarray] = []
        letters = np.unique(labels)
        for fit, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(x, labels, stems):
            probe = LogisticRegression(max_iter=300, class_weight="balanced", C=0.1).fit(x[fit], labels[fit])
            scores.append(f1_score(labels[test], probe.predict(x[test]), labels=letters, average=None))
        results[layer] = dict(zip(letters.tolist(), np.mean(scores, 0).tolist(), strict=True))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--contexts", type=int, default=2000, help="held-out contexts for the cross-entropy")
    parser.add_argument("--prompts", type=int, default=20, help="spelling prompts for each letter")
    parser.add_argument("--words", type=int, default=100, help="maximum number of words per letter for the probe")
    arguments = parser.parse_args()
    tokenizer = from_pretrained(AutoTokenizer, arguments.model)
    assert len(tokenizer.encode(TEMPLATE, add_special_tokens=False)) == WORD_FROM_END - 1
    source, config = find_model(str(arguments.model))
    model = load_model(source, config, dtype="float32", device="cpu")

    loss, unigram, tokens = cross_entropies(model, tokenizer, arguments.contexts)
    print(
        f"held-out text: {min(arguments.contexts * (CONTEXT - 1), tokens):,} of {tokens:,} tokens read; "
        f"{loss:.3f} nats, {unigram - loss:.3f} below unigram at {unigram:.3f} (required: 2.5)"
    )
    accuracy = spelling_accuracy(model, tokenizer, arguments.prompts)
    spelled = sum(a > 0.9 for a in accuracy.values())
    print(
        f"ten-shot spelling: over 90% for {spelled} letters (required: 20), mean {np.mean(list(accuracy.values())):.1%}"
    )
    f1 = probe_f1(model, tokenizer, arguments.words)
    linear = {layer: sum(v > 0.6 for v in scores.values()) for layer, scores in f1.items()}
    for layer, scores in f1.items():
        print(f"linear probe after block {layer}: F1 above 0.6 for {linear[layer]} letters (required: 20 at 12)")
        print("   " + " ".join(f"{letter} {score:.2f}" for letter, score in scores.items()))
    if not (unigram - loss >= 2.5 and spelled >= 20 and linear[12] >= 20):
        sys.exit("gemma-2-mini does not meet all criteria")


if __name__ == "__main__":
    main()
