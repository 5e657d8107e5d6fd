"""Absorption, first letter: does the latent of a letter fall silent on words whose own latent has swallowed the letter?

Words of the tokenizer's vocabulary stand in spelling prompts, and the residual is read at the word. A linear probe of
the model says where the 26 letters are; small logistic regressions on the latents say which latents spell each letter;
absorbed is a word whose letter is there by the probe and comes from other latents. After Chanin et al. 2024, as SAEBench
measures it: fraction and full absorption in mode 0.6.0, the rate behind the five papers' numbers in mode 2024-12.

SAEBench draws without a seed, from a vocabulary in an order that changes by process. Here words are sorted by token and
every draw is seeded, the same for every SAE. A word is scored on another prompt than the one that it was chosen on.

Memory: the rows of all words in the model's dtype; 8 bytes for each latent that fires on one of them; the latents of
CELLS cells' worth of words, dense.

Shape suffixes: N words, B words of a batch, D d_in, F latents, K candidate latents, L letters, S positions.
"""

import hashlib
import random
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..cache.errors import SaeError, UsageError
from .bench import Bench
from .metric import Coder, Metric, Number, Outcome, Progress, Result, Subject

LETTERS = string.ascii_lowercase
TEMPLATE = " has the first letter:"
EXAMPLES = 10  # answered in each prompt
TRAIN_SHARE = 0.8
PROMPTS_AT_ONCE = 64
CELLS = 2**25  # words x latents that are dense at one time
SILENT = 1e-8
UNIT = 1e-5  # by how much the norm of a row of W_dec may differ from 1
SPELLS = 0.5  # the F1 below which latents are not called those of a letter
FEW_STEPS = 300  # of the probe that proposes latents; Gemma's vocabulary gives it about a thousand
RESAMPLES = 1000


@dataclass(frozen=True)
class Absorption(Metric):
    """`words` of the vocabulary are drawn, the same number of each letter where it has them; 0 takes all. The letters that count are those that the model's probe finds.

    `k_sparse_probe_*` are of the probe that proposes latents; the rest are the thresholds of SAEBench.
    """

    words: int = 0
    random_seed: int = 42
    f1_jump_threshold: float = 0.03
    max_k_value: int = 10
    k_sparse_probe_l1_decay: float = 0.01
    k_sparse_probe_batch_size: int = 4096
    k_sparse_probe_num_epochs: int = 50
    min_GT_probe_f1: float = 0.6
    min_feats_for_eval: int = 20
    full_absorption_probe_cos_sim_threshold: float = 0.025
    absorption_fraction_probe_cos_sim_threshold: float = 0.1
    probe_projection_proportion_threshold: float = 0.4
    absorption_fraction_max_absorbing_latents: int = 3

    name = "absorption"
    type_id = "absorption_first_letter"
    title = "absorption of first letters (a silent or dead SAE has 0 too: read the flags)"
    numbers = (
        Number("fraction", "mean", "mean_absorption_fraction_score", ".4f", "down", 0, 1),
        Number("full", "mean", "mean_full_absorption_score", ".4f", "down", 0, 1),
        Number("rate (2024-12)", "mean", "mean_absorption_score", ".4f", "down", 0, 1),
        Number("split latents", "mean", "mean_num_split_features", ".2f", "down", 1),
        Number("F1, 1 latent", "k_sparse", "mean_f1_1", ".3f", "up", 0, 1),
        Number("F1, probe", "llm", "mean_f1_probe", ".3f", "up", 0, 1),
    )

    def measure(self, bench: Bench, subjects: Sequence[Subject], progress: Progress) -> list[Outcome]:
        """Raises UsageError when the tokenizer or its vocabulary cannot serve."""
        self.check()
        spelling = Spelling.of(bench.tokenizer, self.words, self.random_seed, newline=bench.mode != "2024-12")
        layers = sorted({subject.layer for subject in subjects})
        spelled = spell(bench, spelling, layers, self.random_seed, progress)
        outcomes: list[Outcome] = []
        for number, subject in enumerate(subjects):
            progress(number, len(subjects), "SAEs")
            try:
                outcomes.append(self.result(bench.mode, subject.sae, spelled[subject.layer], bench.model.device))
            except SaeError as error:
                outcomes.append(error)
        progress(len(subjects), len(subjects), "SAEs")
        return outcomes

    def check(self) -> None:
        least = {"words": 0, "max_k_value": 1, "absorption_fraction_max_absorbing_latents": 1}
        least |= {"k_sparse_probe_batch_size": 1, "k_sparse_probe_num_epochs": 1, "random_seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"absorption.{name} is {getattr(self, name)}; the least is {lowest}.")

    @torch.no_grad()
    def result(self, mode: str, sae: Coder, words: "Spelled", device: torch.device) -> Result:
        """Everything that depends on the SAE. Raises SaeError where the metric does not exist for it."""
        coder = Unit.of(sae, device)
        old = mode == "2024-12"
        counted = [letter for letter in range(26) if old or words.f1_L[letter] > self.min_GT_probe_f1]
        if not counted:
            raise SaeError(
                f"Absorption needs letters that the model spells, and a probe finds none at F1 above {self.min_GT_probe_f1}: "
                f"the best has {float(words.f1_L.max()):.2f}. Take another layer or model, or lower absorption.min_GT_probe_f1."
            )
        train, test = Codes.of(coder, words.train_ND), Codes.of(coder, words.test_ND)
        probe = linear_probe(
            train,
            words.train_letter_N,
            l1=self.k_sparse_probe_l1_decay,
            batch=self.k_sparse_probe_batch_size,
            epochs=self.k_sparse_probe_num_epochs,
            weight_decay=1e-6,
            generator=generator_of(self.random_seed, "k-sparse"),
        )
        order_LK = probe.weight_LD.sort(dim=1, descending=True, stable=True).indices[:, : self.max_k_value].cpu()
        candidates, place = order_LK.unique(return_inverse=True)
        train_NK, test_NK = train.columns(candidates).numpy(), test.columns(candidates).numpy()
        details, scores = [], []
        for letter in counted:
            split = split_latents(
                train_NK[:, place[letter].numpy()],
                (words.train_letter_N == letter).numpy(),
                test_NK[:, place[letter].numpy()],
                (words.test_letter_N == letter).numpy(),
                self.f1_jump_threshold,
            )
            main = order_LK[letter, : split.count]
            positive_N = words.true_positive_NL[:, letter]
            if not (old or positive_N.any()):
                continue  # as in SAEBench; old: it is without candidates too
            own = self.score(coder, words.fresh_ND[positive_N], words.probe.weight_LD[letter], main)
            entry = {
                "first_letter": LETTERS[letter],
                "num_probe_true_positives": len(own.fraction_N),
                "num_split_features": split.count,
                "main_latents": main.tolist(),
                "f1_probe": float(words.f1_L[letter]),
                "f1_k_sparse": split.f1,
            }
            if old:
                candidate_N = (own.main_sum_N < SILENT) & torch.from_numpy(split.missed)[positive_N]
                absorbed_N = (own.dominated_N & candidate_N).double()
                entry |= rate("absorption_rate", "num_absorption", absorbed_N)
                entry["num_candidates"] = int(candidate_N.sum())
                scores.append({"absorption_score": absorbed_N})
            else:
                full_N = (own.dominated_N & own.silent_N).double()
                entry |= {"mean_absorption_fraction": float(own.fraction_N.mean())}
                entry |= rate("full_absorption_rate", "num_full_absorption", full_N)
                scores.append({"absorption_fraction_score": own.fraction_N.double(), "full_absorption_score": full_N})
            details.append(entry)
        return self.summary(old, coder, words, train, details, scores)

    def score(self, coder: "Unit", fresh_ND: Tensor, probe_D: Tensor, main: Tensor) -> "Scores":
        """Score the words of one letter, a part at a time."""
        unit_D = functional.normalize(probe_D, dim=0)
        cosine_F = coder.W_dec @ unit_D.to(coder.W_dec.device)
        parts = [
            score_words(f_NF, x_ND.to(f_NF) @ unit_D.to(f_NF), cosine_F, main.to(f_NF.device), self)
            for x_ND, f_NF in coder.encoded(fresh_ND)
        ]
        return Scores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def summary(
        self,
        old: bool,
        coder: "Unit",
        words: "Spelled",
        train: "Codes",
        details: list[dict[str, Any]],
        scores: list[dict[str, Tensor]],
    ) -> Result:
        kept = [number for number, entry in enumerate(details) if not old or entry["num_candidates"]]
        generator = generator_of(self.random_seed, "bootstrap")
        mean: dict[str, float] = {}
        intervals: dict[str, list[float]] = {}
        names = ("absorption_score",) if old else ("absorption_fraction_score", "full_absorption_score")
        for name in names:
            values = [scores[number][name] for number in kept]
            mean |= mean_of(name, [float(value_N.mean()) for value_N in values], deviation=not old)
            if values:
                intervals[f"mean_{name}"] = bootstrap(values, generator)
        mean |= mean_of(
            "num_split_features", [float(details[n]["num_split_features"]) for n in kept], deviation=not old
        )
        f1_1 = [entry["f1_k_sparse"][0] for entry in details]
        f1_k = [entry["f1_k_sparse"][entry["num_split_features"] - 1] for entry in details]
        return Result.of(
            {
                "mean": mean,
                "k_sparse": {**mean_of("f1_1", f1_1), **mean_of("f1_split", f1_k)},
                "llm": {"mean_f1_probe": float(words.f1_L.mean())},
            },
            details,
            intervals={"mean": intervals},
            n={
                "words_train": len(words.train_ND),
                "words_test": len(words.test_ND),
                "letters": len(kept),
                "true_positives": sum(entry["num_probe_true_positives"] for entry in details),
            },
            flags=list(self.flags(old, coder, train, details, kept)),
        )

    def flags(
        self, old: bool, coder: "Unit", train: "Codes", details: list[dict[str, Any]], kept: list[int]
    ) -> Iterator[str]:
        if coder.folded:
            yield f"The rows of W_dec were not of unit length ({coder.folded} of {len(coder.W_dec)}); their norms were folded into the latents."
        steps = self.k_sparse_probe_num_epochs * -(-(len(train.start_N) - 1) // self.k_sparse_probe_batch_size)
        if steps < FEW_STEPS:
            yield (
                f"The probe that proposes latents made only {steps} steps, so those proposed may not be the letters' best; "
                "more words or a smaller absorption.k_sparse_probe_batch_size give it more."
            )
        if not len(train.latents):
            yield "No latent fires on any word: an absorption of 0 says nothing of such an SAE."
        elif mute := [
            entry["first_letter"] for entry in details if entry["f1_k_sparse"][entry["num_split_features"] - 1] < SPELLS
        ]:
            yield (
                f"The latents chosen do not spell {len(mute)} of {len(details)} letters (F1 below {SPELLS}: {', '.join(mute)}); "
                "absorption there is not of a latent for the letter."
            )
        if old and len(kept) < 26:
            lacking = "No letter has" if not kept else f"Only {len(kept)} of 26 letters have"
            yield f"{lacking} a word that the k-sparse probe misses while its latents are silent; the others are not in the mean."
        if not old and len(kept) < self.min_feats_for_eval:
            yield f"Only {len(kept)} letters count; SAEBench gives no number below {self.min_feats_for_eval}."


def rate(name: str, count: str, hit_N: Tensor) -> dict[str, Any]:
    """A share, its count, and Wilson's 95 % interval."""
    n, hits, z = len(hit_N), float(hit_N.sum()), 1.959964
    if not n:
        return {name: float("nan"), count: 0}
    share = hits / n
    centre, spread = share + z * z / 2 / n, z * (share * (1 - share) / n + z * z / 4 / n / n) ** 0.5
    interval = [max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))]
    return {name: share, count: int(hits), f"{name}_interval": interval}


def mean_of(name: str, values: Sequence[float], deviation: bool = False) -> dict[str, float]:
    """The unweighted mean over letters, and the sample standard deviation; NaN where there are too few."""
    found = {f"mean_{name}": sum(values) / len(values) if values else float("nan")}
    return found | ({f"std_dev_{name}": stdev(values) if len(values) > 1 else float("nan")} if deviation else {})


def bootstrap(values: Sequence[Tensor], generator: torch.Generator) -> list[float]:
    """95 % of the mean over letters of means over words, when each letter's words are drawn anew."""
    draws = torch.zeros(RESAMPLES, dtype=torch.float64)
    for value_N in values:
        draws += value_N[torch.randint(len(value_N), (RESAMPLES, len(value_N)), generator=generator)].mean(1)
    return torch.quantile(draws / len(values), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """Random numbers that depend on nothing else."""
    digest = hashlib.sha256(f"absorption {purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6]))


# --- words and prompts ------------------------------------------------------------------------------------------------


class Word(NamedTuple):
    token: int
    text: str  # " cat", "cat" and "Cat" are three words
    letter: int


@dataclass(frozen=True)
class Spelling:
    """The words in the order of a seeded shuffle, the first `train` of them to fit on; prompts as token ids.

    All prompts are of one length: a word is one token, and each part between words is the same. Prompts end at the word
    that they ask for: what comes after it cannot change the residual there.

    Paper: two entries of the vocabulary with the same text (a letter, and a byte that is that letter) are one word here.
    """

    words: list[Word]
    train: int
    prefix: list[int]  # BOS, and a newline but in mode 2024-12
    question: list[int]  # after a word
    answers: list[list[int]]  # after the question, by letter, with the newline
    from_ids: int  # words whose text the tokenizer would cut otherwise

    @classmethod
    def of(cls, tokenizer: Any, words: int, seed: int, *, newline: bool = True) -> Self:
        """Raises UsageError when the tokenizer has no such prompts, or too few words."""

        def ids_of(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        start = ids_of(["\n"])[0]
        chosen = drawn(vocabulary(tokenizer, start), words, random.Random(f"{seed} words"))
        train = int(TRAIN_SHARE * len(chosen))
        lacking = sorted(set(range(26)) - {word.letter for word in chosen[:train]})
        if lacking or len(chosen) - train <= EXAMPLES:
            none = f" (none begins with {', '.join(LETTERS[letter] for letter in lacking)})" if lacking else ""
            raise UsageError(
                f"The {len(chosen)} words {'taken' if words else 'of this vocabulary'} cannot serve absorption: they are {train} to "
                f"fit on{none} and {len(chosen) - train} to test on; every letter, and more than {EXAMPLES} to test on, are needed. "
                f"Take {'more with absorption.words' if words else 'a model with more'}."
            )
        lines = ids_of([f"\n{word.text}{TEMPLATE}" for word in chosen])
        head = [[*start, word.token] for word in chosen]
        after = [tuple(line[len(h) :]) if line[: len(h)] == h else () for line, h in zip(lines, head, strict=True)]
        question = Counter(filter(None, after)).most_common(1)
        if not start or not question:
            raise UsageError(
                "This tokenizer cannot serve absorption: in a line such as 'cat has the first letter:' no word of its vocabulary "
                "is one token, behind a newline that it keeps."
            )
        usual = question[0][0]
        first = after.index(usual)
        answered = ids_of([f"\n{chosen[first].text}{TEMPLATE} {letter}\n" for letter in LETTERS.upper()])
        answers = [line[len(head[first]) + len(usual) :] for line in answered]
        if len({len(answer) for answer in answers}) > 1:
            raise UsageError(
                "This tokenizer cannot serve absorption: its answers ' A' to ' Z' differ in their number of tokens, so prompts "
                "would be of unequal lengths."
            )
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        from_ids = sum(tokens != usual for tokens in after)
        return cls(chosen, train, bos + (start if newline else []), list(usual), answers, from_ids)

    def prompts(self, words: Sequence[Word], pool: Sequence[Word], draw: random.Random) -> Tensor:
        """A prompt for each word, with examples from the pool, never the word itself: (N, S) int64."""
        part = len(self.question) + len(self.answers[0]) + 1
        ids_NS = np.empty((len(words), len(self.prefix) + EXAMPLES * part + 1), np.int64)
        for row_S, word in zip(ids_NS, words, strict=True):
            examples = [other for other in draw.sample(pool, EXAMPLES + 1) if other != word][:EXAMPLES]
            asked = [i for other in examples for i in (other.token, *self.question, *self.answers[other.letter])]
            row_S[:] = [*self.prefix, *asked, word.token]
        return torch.from_numpy(ids_NS)

    def all_prompts(self, seed: int) -> tuple[Tensor, Tensor]:
        """A prompt for each word, with examples of its own split; fresh ones for the test words, with any examples."""
        train, test = self.words[: self.train], self.words[self.train :]
        draw = random.Random(f"{seed} examples")
        chosen = torch.cat([self.prompts(train, train, draw), self.prompts(test, test, draw)])
        return chosen, self.prompts(test, self.words, random.Random(f"{seed} fresh examples"))


def drawn(pool: Sequence[Word], count: int, draw: random.Random) -> list[Word]:
    """All words in random order, or `count` of them: the same number of each letter, as far as it has them."""
    order, seen, rank = draw.sample(pool, len(pool)), Counter[int](), {}
    for word in order:
        rank[word] = seen[word.letter]
        seen[word.letter] += 1
    taken = sorted(order, key=rank.__getitem__)[: count or None]
    return draw.sample(taken, len(taken))


def vocabulary(tokenizer: Any, start: list[int]) -> list[Word]:
    """Every entry that is ASCII letters after at most one space, by token. `start` are the ids of a newline.

    An entry is decoded behind a newline: at the beginning of a text some tokenizers drop its space.
    """
    newline, special = tokenizer.decode(start), set(tokenizer.all_special_ids)
    found: dict[str, Word] = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([*start, token], clean_up_tokenization_spaces=False).removeprefix(newline)
        bare = text.removeprefix(" ")
        if not (bare.isascii() and bare.isalpha()) or token in special:
            continue
        usual = [*start, token]
        if text not in found or tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"] == usual:
            found[text] = Word(token, text, LETTERS.index(bare[0].lower()))
    return sorted(found.values())


# --- what no SAE changes ----------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """26 logistic regressions side by side."""

    weight_LD: Tensor
    bias_L: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND.float() @ self.weight_LD.T + self.bias_L


@dataclass(frozen=True)
class Spelled:
    """The residual at the words behind one layer, and the model's own probe. Letters are 0 to 25."""

    train_ND: Tensor
    train_letter_N: Tensor
    test_ND: Tensor
    test_letter_N: Tensor
    fresh_ND: Tensor  # of the test words, on other prompts: what is scored
    probe: Probe

    @property
    def positive_NL(self) -> Tensor:
        """Which letters the probe finds in the test words."""
        return self.probe.logits(self.test_ND) > 0

    @property
    def true_positive_NL(self) -> Tensor:
        return self.positive_NL & functional.one_hot(self.test_letter_N, 26).bool()

    @property
    def f1_L(self) -> Tensor:
        answer_NL, positive_NL = functional.one_hot(self.test_letter_N, 26).bool(), self.positive_NL
        return torch.tensor([f1(positive_NL[:, n].numpy(), answer_NL[:, n].numpy()) for n in range(26)])


def spell(bench: Bench, spelling: Spelling, layers: Sequence[int], seed: int, progress: Progress) -> dict[int, Spelled]:
    """The rows of every word after each layer and the probe on them: from the shelf, or one pass of the model."""
    chosen_NS, fresh_NS = spelling.all_prompts(seed)
    ids_NS = torch.cat([chosen_NS, fresh_NS])
    pinned = {**bench.identity, "prompts": hashlib.sha256(ids_NS.numpy().tobytes()).hexdigest()}
    lacking = [layer for layer in layers if not bench.shelf.holds("letters", {**pinned, "layer": layer})]
    made = last_rows(bench, ids_NS, lacking, progress) if lacking else {}
    letter_N = torch.tensor([word.letter for word in spelling.words])
    found = {}
    for layer in layers:

        def rows(layer: int = layer) -> dict[str, Tensor]:
            return {"x": made[layer] if layer in made else last_rows(bench, ids_NS, [layer], progress)[layer]}

        at = {**pinned, "layer": layer}
        x_ND = bench.shelf.keep("letters", at, rows)["x"]
        train_ND, test_ND, fresh_ND = x_ND.tensor_split([spelling.train, len(chosen_NS)])
        settings = {"batch": 64, "epochs": 50, "weight_decay": 1e-4}

        def probe(train_ND: Tensor = train_ND, settings: dict[str, Any] = settings) -> dict[str, Tensor]:
            rows = Dense(train_ND.to(bench.model.device).float())
            generator = generator_of(seed, "letters")
            fitted = linear_probe(rows, letter_N[: spelling.train], **settings, generator=generator, progress=progress)
            return {"weight": fitted.weight_LD, "bias": fitted.bias_L}

        kept = bench.shelf.keep("letters-probe", {**at, **settings, "seed": seed, "train": spelling.train}, probe)
        own = Probe(kept["weight"], kept["bias"])
        train_letter_N, test_letter_N = letter_N.tensor_split([spelling.train])
        found[layer] = Spelled(train_ND, train_letter_N, test_ND, test_letter_N, fresh_ND, own)
    return found


def last_rows(bench: Bench, ids_NS: Tensor, layers: Sequence[int], progress: Progress) -> dict[int, Tensor]:
    """The residual at the last position of each prompt, (N, D) in the model's dtype, after each layer."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(ids_NS), PROMPTS_AT_ONCE):
        part_NS = ids_NS[start : start + PROMPTS_AT_ONCE].to(bench.model.device)
        for layer, x_NSD in bench.model.capture(part_NS, layers).items():
            found[layer].append(x_NSD[:, -1].cpu())
        progress(min(start + PROMPTS_AT_ONCE, len(ids_NS)), len(ids_NS), "prompts through the model")
    return {layer: torch.cat(parts) for layer, parts in found.items()}


# --- probes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Rows to fit a probe on."""

    x_ND: Tensor

    @property
    def width(self) -> int:
        return self.x_ND.shape[1]

    @property
    def device(self) -> torch.device:
        return self.x_ND.device

    def times(self, index_B: Tensor, weight_LD: Tensor) -> Tensor:
        return self.x_ND[index_B] @ weight_LD.T


@dataclass(frozen=True)
class Codes:
    """The latents that fire on each word, one word after the other: which (int32) and how strongly (float32)."""

    latents: Tensor
    values: Tensor
    start_N: Tensor  # where each word's begin; one more than there are words
    width: int

    @classmethod
    def of(cls, coder: "Unit", x_ND: Tensor) -> Self:
        latents, values, counts = [], [], [torch.zeros(1, dtype=torch.int64)]
        for _, f_NF in coder.encoded(x_ND):
            row, column = f_NF.nonzero(as_tuple=True)
            latents.append(column.int())
            values.append(f_NF[row, column])
            counts.append((f_NF != 0).sum(1).cpu())
        start_N = torch.cat(counts).cumsum(0).to(latents[0].device)
        return cls(torch.cat(latents), torch.cat(values), start_N, len(coder.W_dec))

    @property
    def device(self) -> torch.device:
        return self.values.device

    def times(self, index_B: Tensor, weight_LF: Tensor) -> Tensor:
        """f @ W.T for these words, by gathering: (B, L)."""
        first_B = self.start_N[index_B]
        count_B = self.start_N[index_B + 1] - first_B
        offset_B = count_B.cumsum(0) - count_B
        place = torch.arange(int(count_B.sum()), device=self.device)
        place = place + (first_B - offset_B).repeat_interleave(count_B)
        return functional.embedding_bag(
            self.latents[place], weight_LF.T, offset_B.int(), mode="sum", per_sample_weights=self.values[place]
        )

    def columns(self, latents_K: Tensor) -> Tensor:
        """What these latents are on every word, on the CPU: (N, K)."""
        place_F = torch.full((self.width,), -1, device=self.device)
        place_F[latents_K.to(self.device)] = torch.arange(len(latents_K), device=self.device)
        place = place_F[self.latents.long()]
        word = torch.arange(len(self.start_N) - 1, device=self.device).repeat_interleave(self.start_N.diff())
        dense_NK = torch.zeros(len(self.start_N) - 1, len(latents_K), device=self.device)
        dense_NK[word[place >= 0], place[place >= 0]] = self.values[place >= 0]
        return dense_NK.cpu()


def linear_probe(
    rows: Dense | Codes,
    letter_N: Tensor,
    *,
    batch: int,
    epochs: int,
    weight_decay: float,
    generator: torch.Generator,
    l1: float = 0.0,
    progress: Progress | None = None,
) -> Probe:
    """26 logistic regressions on the same rows, each letter's positives weighing as much as all others.

    Adam from 1e-2 down to 1e-5, a step of the schedule an epoch; `l1` times the mean over letters of sum |w| is added.
    Every letter has to occur.
    """
    device, bound = rows.device, rows.width**-0.5
    weight_LD = torch.empty(26, rows.width).uniform_(-bound, bound, generator=generator).to(device).requires_grad_()
    bias_L = torch.empty(26).uniform_(-bound, bound, generator=generator).to(device).requires_grad_()
    answer_NL = functional.one_hot(letter_N, 26).float().to(device)
    positives_L = answer_NL.sum(0)
    weight_of_positives_L = (len(answer_NL) - positives_L) / positives_L
    optimizer = torch.optim.Adam([weight_LD, bias_L], lr=1e-2, weight_decay=weight_decay)
    with torch.enable_grad():
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1e-5 / 1e-2) ** (epoch / epochs)
            for index_B in torch.randperm(len(answer_NL), generator=generator).to(device).split(batch):
                logits_BL = rows.times(index_B, weight_LD) + bias_L
                loss = functional.binary_cross_entropy_with_logits(
                    logits_BL, answer_NL[index_B], pos_weight=weight_of_positives_L
                )
                if l1:
                    loss = loss + l1 * weight_LD.abs().sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if progress:
                progress(epoch + 1, epochs, "epochs of the letters' probe")
    return Probe(weight_LD.detach(), bias_L.detach())


def f1(positive_N: np.ndarray, answer_N: np.ndarray) -> float:
    """0 where nothing is found."""
    hits = int((positive_N & answer_N).sum())
    return 2 * hits / (int(positive_N.sum()) + int(answer_N.sum())) if hits else 0.0


class Split(NamedTuple):
    count: int  # the latents that spell the letter are the first so many candidates
    f1: list[float]  # of 1, 2, ... candidates, up to the one that added too little
    missed: np.ndarray  # (N,) bool: the test words that the regression on those latents does not find


def split_latents(
    train_NK: np.ndarray, train_answer_N: np.ndarray, test_NK: np.ndarray, test_answer_N: np.ndarray, jump: float
) -> Split:
    """How many of a letter's candidates, best first, spell it: as long as each raises F1 on the test words by `jump`.

    SAEBench fits all K regressions; those after the first that adds too little decide nothing and are not fitted here.
    """
    missed: dict[int, np.ndarray] = {}

    def f1_of(k: int) -> float:
        score_N = logistic(train_NK[:, :k], train_answer_N).decision_function(test_NK[:, :k])
        missed[k] = score_N <= 0
        return f1(score_N > 0, test_answer_N)

    count, found = accepted((f1_of(k) for k in range(1, train_NK.shape[1] + 1)), jump)
    return Split(count, found, missed[count])


def accepted(f1_of_k: Iterable[float], jump: float) -> tuple[int, list[float]]:
    """How many of F1_1, F1_2, ... exceed the one before by more than `jump`, at least one; and those looked at."""
    seen: list[float] = []
    for value in f1_of_k:
        seen.append(value)
        if len(seen) > 1 and not value > seen[-2] + jump:
            return len(seen) - 1, seen
    return len(seen), seen


def logistic(x_NK: np.ndarray, answer_N: np.ndarray) -> Any:
    """SAEBench's regression on raw latents; letters that are rare weigh as much as the rest."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1.0, max_iter=500, class_weight="balanced").fit(x_NK, answer_N)


# --- the SAE, and absorption itself -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """An SAE whose decoder rows are of unit length: each latent times its row's norm, after the activation."""

    sae: Coder
    W_dec: Tensor  # (F, D) float32
    norm_F: Tensor
    folded: int  # how many rows were not

    @classmethod
    def of(cls, sae: Coder, device: torch.device) -> Self:
        W_dec = getattr(sae, "W_dec", None)
        if W_dec is None:
            raise SaeError(f"Absorption is of latents with directions, and {type(sae).__name__} has no W_dec.")
        W_dec = W_dec.detach().to(device).float()
        norm_F = W_dec.norm(dim=1)
        folded = int(((norm_F - 1).abs() > UNIT).sum())
        unit = W_dec / torch.where(norm_F > 0, norm_F, 1)[:, None]
        return cls(sae, unit, norm_F if folded else torch.ones_like(norm_F), folded)

    def encoded(self, x_ND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and their latents, as many at a time as CELLS allows; float32."""
        for part_ND in x_ND.split(max(1, CELLS // len(self.W_dec))):
            yield part_ND, self.sae.encode(part_ND.to(self.W_dec.device).float()).float() * self.norm_F


class Scores(NamedTuple):
    """Of each word of a letter."""

    fraction_N: Tensor  # how much of the letter comes from absorbing latents, 0 to 1
    dominated_N: Tensor  # bool: one latent along the probe carries enough of the letter
    silent_N: Tensor  # bool: no latent of the letter fires
    main_sum_N: Tensor  # the sum of the letter's latents


def score_words(f_NF: Tensor, along_N: Tensor, cosine_F: Tensor, main: Tensor, settings: Absorption) -> Scores:
    """Absorption of words of one letter.

    `along_N` is the residual along the unit probe, `cosine_F` each decoder row's cosine with it, `main` the letter's
    latents. What a latent contributes is its activation times its cosine.
    """
    enough = settings.probe_projection_proportion_threshold
    p_NF = f_NF * cosine_F
    main_N = p_NF[:, main].sum(1)
    absorbing_F = cosine_F >= settings.absorption_fraction_probe_cos_sim_threshold
    absorbing_F[main] = False
    most = min(settings.absorption_fraction_max_absorbing_latents, len(cosine_F))
    absorbed_N = torch.where(absorbing_F, p_NF.clamp(min=0), 0).topk(most, dim=1).values.sum(1)
    taken_N = torch.minimum(absorbed_N, along_N - main_N)
    fraction_N = torch.where(main_N > 0, (taken_N / (taken_N + main_N)).clamp(0, 1), 1)
    # SAEBench divides by `along`; where that is not positive nothing is absorbed.
    none_N = (main_N >= along_N) | (along_N <= 0) | (absorbed_N / along_N < enough)
    top = p_NF.topk(1, dim=1)
    top_N, cosine_N = top.values[:, 0], cosine_F[top.indices[:, 0]]
    dominated_N = (
        (cosine_N >= settings.full_absorption_probe_cos_sim_threshold) & (along_N >= 0) & (top_N / along_N >= enough)
    )
    silent_N = (f_NF[:, main] < SILENT).all(1)
    return Scores(torch.where(none_N, 0, fraction_N), dominated_N, silent_N, f_NF[:, main].sum(1))
