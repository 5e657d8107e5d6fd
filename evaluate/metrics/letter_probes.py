"""Letter probes of the absorption metric: 26 logistic regressions on activations or on SAE latents.

The probes on latents are used to find the split latents of a letter, that is, the latents that together represent it.

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

from ...common.device import copy_to_device
from .base import Progress


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A random generator that depends only on the seed and the purpose."""
    digest = hashlib.sha256(f"absorption {purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6]))


class LetterProbes(NamedTuple):
    """26 logistic regressions, one for each letter."""

    weight_LD: Tensor
    bias_L: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND.float() @ self.weight_LD.T + self.bias_L


@dataclass(frozen=True)
class DenseRows:
    """Dense rows (N, D) to train letter probes on."""

    x_ND: Tensor

    @property
    def width(self) -> int:
        return self.x_ND.shape[1]

    @property
    def device(self) -> torch.device:
        return self.x_ND.device

    def matmul(self, index_B: Tensor, weight_LD: Tensor) -> Tensor:
        """x @ W.T for these words: (B, L)."""
        return self.x_ND[index_B] @ weight_LD.T


@dataclass(frozen=True)
class SparseLatents:
    """The latents that fire on each word, as a matrix in compressed sparse row format."""

    latents: Tensor  # int32: the index of each firing latent
    values: Tensor  # float32: its activation
    start_N: Tensor  # where each word's entries start, and the total: (N + 1,)
    width: int

    @classmethod
    def from_dense(cls, parts: Iterable[Tensor], width: int) -> Self:
        """From batches of dense latents (B, width)."""
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

    def matmul(self, index_B: Tensor, weight_LF: Tensor) -> Tensor:
        """f @ W.T for these words, by gathering rows of W.T: (B, L)."""
        first_B = self.start_N[index_B]
        count_B = self.start_N[index_B + 1] - first_B
        offset_B = count_B.cumsum(0) - count_B
        entry = torch.arange(int(count_B.sum()), device=self.device)
        entry = entry + (first_B - offset_B).repeat_interleave(count_B)
        return functional.embedding_bag(
            self.latents[entry], weight_LF.T, offset_B.int(), mode="sum", per_sample_weights=self.values[entry]
        )

    def dense_columns(self, latents_K: Tensor) -> Tensor:
        """The dense activations (N, K) of some latents on every word, on the CPU."""
        column_F = torch.full((self.width,), -1, device=self.device)
        column_F[latents_K.to(self.device)] = torch.arange(len(latents_K), device=self.device)
        column = column_F[self.latents.long()]
        word = torch.arange(len(self.start_N) - 1, device=self.device).repeat_interleave(self.start_N.diff())
        dense_NK = torch.zeros(len(self.start_N) - 1, len(latents_K), device=self.device)
        dense_NK[word[column >= 0], column[column >= 0]] = self.values[column >= 0]
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
    """Train 26 logistic regressions on the same rows. For each letter, positives and negatives have equal total weight.

    The optimizer is Adam. The learning rate decays exponentially from 1e-2 to 1e-5 and is lowered once per epoch. The
    loss adds `l1` times the mean over letters of sum |w|. Every letter must occur among the rows.
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
            order_N = torch.randperm(len(answer_NL), generator=generator)
            for index_B in copy_to_device(order_N, device).split(batch):
                logits_BL = rows.matmul(index_B, weight_LD) + bias_L
                loss = functional.binary_cross_entropy_with_logits(
                    logits_BL, answer_NL[index_B], pos_weight=weight_of_positives_L
                )
                if l1:
                    loss = loss + l1 * weight_LD.abs().sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if progress:
                progress(epoch + 1, epochs, "epochs of the letter probes")
    return LetterProbes(weight_LD.detach(), bias_L.detach())


def f1_score(positive_N: np.ndarray, answer_N: np.ndarray) -> float:
    """F1 of boolean predictions; 0 without a true positive."""
    hits = int((positive_N & answer_N).sum())
    return 2 * hits / (int(positive_N.sum()) + int(answer_N.sum())) if hits else 0.0


class FeatureSplit(NamedTuple):
    """The latents that represent one letter: the first `size` candidates."""

    size: int
    f1: list[float]  # F1 with 1, 2, ... candidates, until a candidate adds too little
    missed: np.ndarray  # (N,) bool: test words whose letter the regression on these latents misses


def split_latents(
    train_NK: np.ndarray, train_answer_N: np.ndarray, test_NK: np.ndarray, test_answer_N: np.ndarray, jump: float
) -> FeatureSplit:
    """Find a letter's split latents: add candidates, best first, while each raises the F1 on test words by `jump`.

    SAEBench fits all K regressions. Once a candidate adds too little, the regressions for later candidates have no
    effect, so they are skipped here.
    """
    missed: dict[int, np.ndarray] = {}

    def f1_of(k: int) -> float:
        score_N = fit_logistic(train_NK[:, :k], train_answer_N).decision_function(test_NK[:, :k])
        missed[k] = score_N <= 0
        return f1_score(score_N > 0, test_answer_N)

    size, f1 = count_split_latents((f1_of(k) for k in range(1, train_NK.shape[1] + 1)), jump)
    return FeatureSplit(size, f1, missed[size])


def count_split_latents(f1_of_k: Iterable[float], jump: float) -> tuple[int, list[float]]:
    """How many of the candidates are split latents, and the F1s that were read from `f1_of_k` to find this out.

    The first candidate is always a split latent. The following ones are split latents as long as each raises the F1 by
    more than `jump`; the first that does not ends the search.
    """
    seen: list[float] = []
    for value in f1_of_k:
        seen.append(value)
        if len(seen) > 1 and not value > seen[-2] + jump:
            return len(seen) - 1, seen
    return len(seen), seen


def fit_logistic(x_NK: np.ndarray, answer_N: np.ndarray) -> Any:
    """SAEBench's logistic regression on raw latents, with balanced classes."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1.0, max_iter=500, class_weight="balanced").fit(x_NK, answer_N)
