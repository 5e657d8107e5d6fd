"""Linear probes on whole texts: binary tasks from classes of texts, and the probes that sparse probing, SCR and TPP fit.

Texts are represented by one row each, the mean over their counted tokens. A task is a list of rows and their labels, so
that one matrix of all texts serves every task.

Shape suffixes: N texts, M texts of a task, D features of a text (dimensions of the residual, or latents), K of them.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...common.errors import UsageError
from ..context import EvalContext
from ..datasets.labelled import Texts
from .base import Progress, SAELike
from .pooled_activations import PooledLatents, TextRows, pool_latents, read_text_rows

RNGS = ("paired", "saebench")
SEED = 42


class ProbeFeatures(NamedTuple):
    """One row per text (N, D), all texts of a class before those of the next, and how many are of each class."""

    x_ND: Tensor
    counts: dict[str, int]


@dataclass(frozen=True)
class LabelledRows:
    """The rows of the texts of one dataset after one layer: training before test texts, one class after the other."""

    rows: TextRows
    counts: dict[str, dict[str, int]]  # split -> class -> texts

    def split(self, feature_ND: Tensor) -> dict[str, ProbeFeatures]:
        """One row per text -> train, test -> features."""
        sizes = [sum(counts.values()) for counts in self.counts.values()]
        parts = feature_ND.split(sizes)
        return {split: ProbeFeatures(x, counts) for (split, counts), x in zip(self.counts.items(), parts, strict=True)}


def read_labelled_rows(
    ctx: EvalContext, layers: Sequence[int], name: str, texts: Texts, progress: Progress, context: int = 128
) -> dict[int, LabelledRows]:
    """The rows of the texts of a dataset after each layer, from the shelf or one pass.

    Metrics that ask for the same texts in the same order share them. Raises UsageError for a text without a token that
    counts: it has no mean.
    """
    listed = [text for classes in texts.values() for own in classes.values() for text in own]
    found = read_text_rows(ctx, layers, listed, progress, context)
    count_N = next(iter(found.values())).count_N
    if not bool((count_N > 0).all()):
        raise UsageError(
            f"{name}: the text {listed[int(count_N.argmin())]!r} has no token that counts. Take it out of the dataset."
        )
    counts = {split: {label: len(own) for label, own in classes.items()} for split, classes in texts.items()}
    return {layer: LabelledRows(rows, counts) for layer, rows in found.items()}


class ProbeTask(NamedTuple):
    """Which of the texts, all classes one after the other, are in a binary task (M,), and which are positive (M,)."""

    rows: Tensor
    label: Tensor


def make_generator(rng: str, *names: object) -> torch.Generator:
    """A generator of its own for what `names` say, whatever was drawn before; for "saebench", torch's with seed 42.

    Under "saebench" one generator has to serve every draw of an SAE, in SAEBench's order.
    """
    if rng not in RNGS:
        raise UsageError(f"rng={rng} is unknown: paired (every draw has its own generator) or saebench (one for all).")
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    seed = SEED if rng == "saebench" else int.from_bytes(digest[:7], "little")
    return torch.Generator().manual_seed(seed)


def one_vs_rest_task(counts: Mapping[str, int], positive: str, generator: torch.Generator) -> ProbeTask:
    """All texts of a class, and as many negatives, drawn evenly from the other classes. `counts` are texts per class.

    The draws are SAEBench's, in its order.
    """
    starts = class_offsets(counts)
    needed, others = counts[positive], [label for label in counts if label != positive]
    share = math.ceil(needed / len(others))
    drawn = torch.cat([starts[o] + torch.randperm(counts[o], generator=generator)[:share] for o in others])
    drawn = drawn[torch.randperm(len(drawn), generator=generator)[:needed]]
    return shuffled_task(starts[positive] + torch.arange(needed), drawn, generator)


def class_offsets(counts: Mapping[str, int]) -> dict[str, int]:
    starts, total = {}, 0
    for label, count in counts.items():
        starts[label], total = total, total + count
    return starts


def shuffled_task(positive: Tensor, negative: Tensor, generator: torch.Generator) -> ProbeTask:
    rows = torch.cat([positive, negative])
    label = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    order = torch.randperm(len(rows), generator=generator)
    return ProbeTask(rows[order], label[order])


@dataclass(frozen=True)
class BinaryProbe:
    """logit = x . weight + bias, of the epoch that was best on the test texts."""

    weight_D: Tensor
    bias: Tensor
    test_accuracy: float

    def accuracy(self, x_MD: Tensor, label_M: Tensor) -> float:
        return accuracy(x_MD @ self.weight_D + self.bias, label_M)


def accuracy(logit_M: Tensor, label_M: Tensor) -> float:
    """Share of the texts whose logit is on the side of their label."""
    return float(((logit_M > 0) == (label_M.to(logit_M.device) > 0.5)).double().mean())


def train_probe(
    x_MD: Tensor, label_M: Tensor, test_x_MD: Tensor, test_label_M: Tensor, generator: torch.Generator, *,
    lr: float, batch_size: int, epochs: int, patience: int, l1: float = 0.0,
) -> BinaryProbe:  # fmt: skip
    """Logistic regression by AdamW (weight decay 0.01) on BCE + l1 * sum |weight|, in another order each epoch.

    Stops after `patience` epochs without a better test accuracy, and keeps the first best epoch. Choosing the epoch by
    the texts that are then reported flatters every probe a little; SAEBench does so. Draws from the generator: weight,
    bias, one order per epoch.
    """
    linear = nn.utils.skip_init(nn.Linear, x_MD.shape[1], 1)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(x_MD.shape[1])
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    linear, label_M = linear.to(x_MD), label_M.to(x_MD)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=lr)
    best = BinaryProbe(linear.weight[0].detach().clone(), linear.bias.detach().clone(), 0.0)
    waited = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x_MD), generator=generator).to(x_MD.device).split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(linear(x_MD[rows])[:, 0], label_M[rows])
            (loss + l1 * linear.weight.abs().sum() if l1 else loss).backward()
            optimizer.step()
        with torch.no_grad():
            reached = accuracy(linear(test_x_MD)[:, 0], test_label_M)
        if reached > best.test_accuracy:
            best, waited = BinaryProbe(linear.weight[0].detach().clone(), linear.bias.detach().clone(), reached), 0
        else:
            waited += 1
            if waited >= patience:
                break
    return best


def mean_difference(feature_ND: Tensor, task: ProbeTask) -> Tensor:
    """Mean over the positives minus mean over the negatives of a task, for each feature (D,)."""
    positive, rows = task.label > 0.5, task.rows.to(feature_ND.device)
    return feature_ND[rows[positive]].mean(0) - feature_ND[rows[~positive]].mean(0)


def top_features(score_D: Tensor, k: int) -> Tensor:
    """The k features of the largest score, in the order of the features (K,)."""
    return score_D.argsort(descending=True)[:k].sort().values


def logistic_accuracy(x_MK: Tensor, label_M: Tensor, test_x_MK: Tensor, test_label_M: Tensor) -> float:
    """Test accuracy of scikit-learn's logistic regression (C = 1, L2, lbfgs, at most 1000 steps) on raw columns."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=1000).fit(x_MK.float().cpu().numpy(), label_M.numpy())
    return float((model.predict(test_x_MK.float().cpu().numpy()) == test_label_M.numpy()).mean())


def wilson_interval(share: float, count: float) -> list[float]:
    """95 % interval of a share of `count` independent trials (Wilson 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return [middle - half, middle + half]


def decoder_norms_to_fold(sae: SAELike) -> Tensor | None:
    """What to scale latents with so that they are those of unit decoder rows (F,); None when they are, or have none."""
    W_dec = getattr(sae, "W_dec", None)
    if W_dec is None:
        return None
    norm_F = W_dec.detach().float().norm(dim=1)
    tolerance = 1e-5 if W_dec.dtype == torch.float32 else 1e-2
    return None if bool(((norm_F - 1).abs() <= tolerance).all()) else norm_F


def pool_unit_norm(sae: SAELike, rows: TextRows, device: torch.device) -> tuple[PooledLatents, bool]:
    """`pool`, with latents as those of unit decoder rows; whether they had to be scaled."""
    pooled, norm_F = pool_latents(sae, rows, device), decoder_norms_to_fold(sae)
    if norm_F is None:
        return pooled, False
    norm_F = norm_F.cpu()
    return PooledLatents(pooled.sum_NF * norm_F, pooled.count_N, pooled.zero_F * norm_F), True
