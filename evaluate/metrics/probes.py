"""Binary tasks from classes of texts, and linear probes on them (sparse probing, SCR and TPP).

Each text is represented by one row, which contains the mean of each feature over the counted tokens of the text. A
task lists rows and their labels, so all tasks use one matrix of all texts.

Shape suffixes: N texts, M texts of a task, D features of a text (dimensions of the activations, or latents), K of them.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...common.device import copy_to_device
from ...common.errors import UsageError
from ..context import EvalContext
from ..datasets.labeled import Texts
from .base import Progress, RowSet, SAELike
from .pooled_activations import PooledLatents, TextRows, pool_latents, read_text_rows
from .unit_decoder import decoder_norms_to_fold

RNGS = ("paired", "saebench")  # values of the option `rng` (see make_generator)
SEED = 42  # SAEBench's


class ProbeFeatures(NamedTuple):
    """One row per text (N, D), sorted by class, and the number of texts of each class."""

    x_ND: Tensor
    counts: dict[str, int]


@dataclass(frozen=True)
class LabeledRows:
    """The activation rows of one dataset's texts at one hook, sorted by split (train, test), then by class."""

    rows: TextRows
    counts: dict[str, dict[str, int]]  # split -> class -> number of texts

    @property
    def outliers(self) -> int:
        """The number of rows that were left out."""
        return self.rows.outliers

    def without_outliers(self, norm_limit: float | None) -> "LabeledRows":
        """See `TextRows.without_outliers`."""
        return replace(self, rows=self.rows.without_outliers(norm_limit))

    def split(self, feature_ND: Tensor) -> dict[str, ProbeFeatures]:
        """Split a matrix with one row per text into the rows of train and of test."""
        sizes = [sum(counts.values()) for counts in self.counts.values()]
        parts = feature_ND.split(sizes)
        return {split: ProbeFeatures(x, counts) for (split, counts), x in zip(self.counts.items(), parts, strict=True)}


def read_labeled_rows(
    ctx: EvalContext, row_sets: Sequence[RowSet], name: str, texts: Texts, progress: Progress, context: int = 128
) -> dict[RowSet, LabeledRows]:
    """The activation rows of a dataset's texts for each row set, from the artifact cache or one pass of the model.

    Metrics that read the same texts in the same order share these rows. Raises UsageError for a text that consists only
    of special tokens, because it has no mean.
    """
    flat = [text for classes in texts.values() for texts_of_class in classes.values() for text in texts_of_class]
    by_hook = read_text_rows(ctx, sorted({row_set.hook for row_set in row_sets}), flat, progress, context)
    count_N = next(iter(by_hook.values())).count_N
    if not bool((count_N > 0).all()):
        raise UsageError(
            f"{name}: the text {flat[int(count_N.argmin())]!r} contains only special tokens. "
            "Remove it from the dataset."
        )
    counts = {
        split: {label: len(texts_of_class) for label, texts_of_class in classes.items()}
        for split, classes in texts.items()
    }
    return {
        row_set: LabeledRows(by_hook[row_set.hook], counts).without_outliers(row_set.norm_limit) for row_set in row_sets
    }


class ProbeTask(NamedTuple):
    """A binary task: the indices (M,) of its texts among all texts of a split, and their labels (M,), 1.0 or 0.0."""

    rows: Tensor
    label: Tensor


def make_generator(rng: str, *names: object) -> torch.Generator:
    """A random generator. If rng="paired", its seed is computed from `names`; if rng="saebench", its seed is 42.

    Paired draws do not depend on earlier draws, so they are the same for every SAE. With "saebench", a single generator
    must be used for all draws of an SAE, in SAEBench's order.
    """
    if rng not in RNGS:
        raise UsageError(
            f"rng={rng} is unknown. Expected paired (one generator per draw) or saebench (one generator for all draws)."
        )
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    seed = SEED if rng == "saebench" else int.from_bytes(digest[:7], "little")
    return torch.Generator().manual_seed(seed)


def one_vs_rest_task(counts: Mapping[str, int], positive: str, generator: torch.Generator) -> ProbeTask:
    """All texts of class `positive`, and as many negatives, drawn evenly from the other classes.

    `counts` maps each class to its number of texts. The draws are SAEBench's, in its order.
    """
    starts = class_offsets(counts)
    needed, others = counts[positive], [label for label in counts if label != positive]
    share = math.ceil(needed / len(others))
    negative = torch.cat([starts[o] + torch.randperm(counts[o], generator=generator)[:share] for o in others])
    negative = negative[torch.randperm(len(negative), generator=generator)[:needed]]
    return shuffled_task(starts[positive] + torch.arange(needed), negative, generator)


def class_offsets(counts: Mapping[str, int]) -> dict[str, int]:
    """Index of the first text of each class."""
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
    """logit = x . weight + bias, from the epoch with the best test accuracy."""

    weight_D: Tensor
    bias: Tensor
    test_accuracy: float

    def accuracy(self, x_MD: Tensor, label_M: Tensor) -> float:
        return accuracy(x_MD @ self.weight_D + self.bias, label_M)


def accuracy(logit_M: Tensor, label_M: Tensor) -> float:
    """Share of the texts whose logit has the sign of their label."""
    return float(((logit_M > 0) == (label_M.to(logit_M.device) > 0.5)).double().mean())


def train_probe(
    x_MD: Tensor,
    label_M: Tensor,
    test_x_MD: Tensor,
    test_label_M: Tensor,
    generator: torch.Generator,
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    patience: int,
    l1: float = 0.0,
) -> BinaryProbe:
    """Train a logistic regression with AdamW (weight decay 0.01) on BCE + l1 * sum |weight|, reshuffling every epoch.

    Stops after `patience` epochs without a better test accuracy and returns the probe of the best epoch (the earliest,
    if several are equal). The epoch is chosen by the same test accuracy that is then reported, which makes every probe
    look slightly too good; SAEBench does the same. The generator draws first the weight, then the bias, and then one
    permutation of the texts for each epoch.
    """
    linear = nn.utils.skip_init(nn.Linear, x_MD.shape[1], 1)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(x_MD.shape[1])
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    linear, label_M = linear.to(x_MD), label_M.to(x_MD)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=lr)
    best = BinaryProbe(linear.weight[0].detach().clone(), linear.bias.detach().clone(), 0.0)
    epochs_since_best = 0
    for _ in range(epochs):
        for rows in copy_to_device(torch.randperm(len(x_MD), generator=generator), x_MD.device).split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(linear(x_MD[rows])[:, 0], label_M[rows])
            (loss + l1 * linear.weight.abs().sum() if l1 else loss).backward()
            optimizer.step()
        with torch.no_grad():
            test_accuracy = accuracy(linear(test_x_MD)[:, 0], test_label_M)
        if test_accuracy > best.test_accuracy:
            best = BinaryProbe(linear.weight[0].detach().clone(), linear.bias.detach().clone(), test_accuracy)
            epochs_since_best = 0
        else:
            epochs_since_best += 1
            if epochs_since_best >= patience:
                break
    return best


def mean_difference(feature_ND: Tensor, task: ProbeTask) -> Tensor:
    """Mean over a task's positive texts minus mean over its negative texts, per feature (D,)."""
    positive, rows = task.label > 0.5, task.rows.to(feature_ND.device)
    return feature_ND[rows[positive]].mean(0) - feature_ND[rows[~positive]].mean(0)


def top_features(score_D: Tensor, k: int) -> Tensor:
    """The indices (K,) of the k largest scores. The indices, not the scores, are in ascending order."""
    return score_D.argsort(descending=True)[:k].sort().values


def logistic_accuracy(x_MK: Tensor, label_M: Tensor, test_x_MK: Tensor, test_label_M: Tensor) -> float:
    """Test accuracy of scikit-learn's logistic regression (C = 1, L2, lbfgs, at most 1000 steps) on unscaled
    features."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=1000).fit(x_MK.float().cpu().numpy(), label_M.numpy())
    return float((model.predict(test_x_MK.float().cpu().numpy()) == test_label_M.numpy()).mean())


def wilson_interval(share: float, count: float) -> list[float]:
    """95 % interval for a share of `count` independent trials (Wilson 1927).

    `count` need not be a whole number. For example, it can be the effective number of texts behind a mean over data
    sets. `statistics.proportion_interval`, which calls scipy, needs whole numbers of hits and trials. For whole
    numbers, it returns the same interval as this function to within 1e-6.
    """
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return [middle - half, middle + half]


def pool_unit_norm(sae: SAELike, rows: TextRows, device: torch.device) -> tuple[PooledLatents, bool]:
    """`pool_latents` with the decoder norms folded into the latents, and whether folding was necessary."""
    pooled, norm_F = pool_latents(sae, rows, device), decoder_norms_to_fold(sae)
    if norm_F is None:
        return pooled, False
    norm_F = norm_F.cpu()
    return PooledLatents(pooled.sum_NF * norm_F, pooled.count_N, pooled.zero_F * norm_F), True
