"""Probes for 26 letters side by side, on rows of a model or on the latents of an SAE; and how many latents spell one.

Shape suffixes: N words, B words of a batch, D d_in, F latents, K candidate latents, L letters.
"""

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .base import Progress


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """Random numbers that depend on nothing else."""
    digest = hashlib.sha256(f"absorption {purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6]))


class LetterProbes(NamedTuple):
    """26 logistic regressions side by side."""

    weight_LD: Tensor
    bias_L: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND.float() @ self.weight_LD.T + self.bias_L


@dataclass(frozen=True)
class DenseRows:
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
class SparseLatents:
    """The latents that fire on each word, one word after the other: which (int32) and how strongly (float32)."""

    latents: Tensor
    values: Tensor
    start_N: Tensor  # where each word's begin; one more than there are words
    width: int

    @classmethod
    def of(cls, parts: Iterable[Tensor], width: int) -> Self:
        """From the dense latents (N, width) of some words at a time."""
        latents, values, counts = [], [], [torch.zeros(1, dtype=torch.int64)]
        for f_NF in parts:
            row, column = f_NF.nonzero(as_tuple=True)
            latents.append(column.int())
            values.append(f_NF[row, column])
            counts.append((f_NF != 0).sum(1).cpu())
        start_N = torch.cat(counts).cumsum(0).to(latents[0].device)
        return cls(torch.cat(latents), torch.cat(values), start_N, width)

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


def train_letter_probes(
    rows: DenseRows | SparseLatents,
    letter_N: Tensor,
    *,
    batch: int,
    epochs: int,
    weight_decay: float,
    generator: torch.Generator,
    l1: float = 0.0,
    progress: Progress | None = None,
) -> LetterProbes:
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
    return LetterProbes(weight_LD.detach(), bias_L.detach())


def f1_score(positive_N: np.ndarray, answer_N: np.ndarray) -> float:
    """0 where nothing is found."""
    hits = int((positive_N & answer_N).sum())
    return 2 * hits / (int(positive_N.sum()) + int(answer_N.sum())) if hits else 0.0


class FeatureSplit(NamedTuple):
    count: int  # the latents that spell the letter are the first so many candidates
    f1: list[float]  # of 1, 2, ... candidates, up to the one that added too little
    missed: np.ndarray  # (N,) bool: the test words that the regression on those latents does not find


def split_latents(
    train_NK: np.ndarray, train_answer_N: np.ndarray, test_NK: np.ndarray, test_answer_N: np.ndarray, jump: float
) -> FeatureSplit:
    """How many of a letter's candidates, best first, spell it: as long as each raises F1 on the test words by `jump`.

    SAEBench fits all K regressions; those after the first that adds too little decide nothing and are not fitted here.
    """
    missed: dict[int, np.ndarray] = {}

    def f1_of(k: int) -> float:
        score_N = fit_logistic(train_NK[:, :k], train_answer_N).decision_function(test_NK[:, :k])
        missed[k] = score_N <= 0
        return f1_score(score_N > 0, test_answer_N)

    count, found = count_split_latents((f1_of(k) for k in range(1, train_NK.shape[1] + 1)), jump)
    return FeatureSplit(count, found, missed[count])


def count_split_latents(f1_of_k: Iterable[float], jump: float) -> tuple[int, list[float]]:
    """How many of F1_1, F1_2, ... exceed the one before by more than `jump`, at least one; and those looked at."""
    seen: list[float] = []
    for value in f1_of_k:
        seen.append(value)
        if len(seen) > 1 and not value > seen[-2] + jump:
            return len(seen) - 1, seen
    return len(seen), seen


def fit_logistic(x_NK: np.ndarray, answer_N: np.ndarray) -> Any:
    """SAEBench's regression on raw latents; letters that are rare weigh as much as the rest."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1.0, max_iter=500, class_weight="balanced").fit(x_NK, answer_N)
