"""Sparse probing: how well a few latents tell what a text is about, and how well the residual itself does.

Each class of each dataset is a binary task against the others. A text is the mean of its latents (of its residual: the
LLM's side) over the counted tokens. Two probes per task: one on everything, trained until the test accuracy stops to
rise, and scikit-learn's logistic regression on the k features whose means differ most. Accuracies are averaged over the
classes of a dataset, then over the datasets; 0.5 is chance. The definitions and names are SAEBench's.

Beside SAEBench's fields a result says which latents the probes on few of them chose: `sae_top_1_latents` and so on,
dataset -> class -> latent -> difference, the largest first. A difference is the mean over the task's training texts of
the class minus that over its others, so above 0 where the latent fires more for the class.

The logistic regression is regularised, so accuracies depend on the scale of the latents: decoder rows of another length
than 1 are folded into them first. Where SAEBench sums residuals in the model's dtype, the sums here are in float32.

Memory: the rows of one dataset at each layer (mapped from the disk), and one SAE's pooled latents of it, N x d_sae.

Shape suffixes: N texts, M texts of a task, D features of a text, K of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...common.files import digest_of
from ..context import EvalContext
from ..datasets.labelled import HUB, STAND_INS, Texts, dataset_version, load_texts
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress
from .probes import (
    ProbeFeatures,
    ProbeTask,
    logistic_accuracy,
    make_generator,
    mean_difference,
    one_vs_rest_task,
    pool_unit_norm,
    read_labelled_rows,
    top_features,
    train_probe,
    wilson_interval,
)

K_OF_MODE = {"0.6.0": (1, 2, 5), "2024-12": (1, 2, 5, 10, 20, 50)}
RESULT_KS = (1, 2, 5, 10, 20, 50, 100)  # in SAEBench's files
MAX_NAMED_LATENTS = 5  # of a probe on more latents than this, a result does not say which they are
BATCH, EPOCHS, PATIENCE, RATE = 250, 100, 10, 1e-2


@dataclass(frozen=True)
class SparseProbing(Metric):
    """On SAEBench's eight datasets, from `--data` or the Hub. Sizes are texts of one binary task; `context` is tokens.

    `k` is SAEBench's own of the mode when empty. With rng "saebench" the draws are SAEBench's for an SAE whose
    activations were cached (one generator from 42 over all datasets); the LLM's side begins anew for each dataset.
    """

    datasets: tuple[str, ...] = tuple(HUB)
    k: tuple[int, ...] = ()
    train_set_size: int = 4000
    test_set_size: int = 1000
    context: int = 128
    rng: str = "paired"

    name = "sparse_probing"
    type_id = "sparse_probing"
    title = "sparse probing, test accuracy (0.5 is chance)"
    columns = (
        MetricColumn("LLM", "llm", "llm_test_accuracy", ".4f", "up", 0.5, 1),
        MetricColumn("SAE", "sae", "sae_test_accuracy", ".4f", "up", 0.5, 1),
        MetricColumn("LLM k=1", "llm", "llm_top_1_test_accuracy", ".4f", "up", 0.5, 1),
        MetricColumn("SAE k=1", "sae", "sae_top_1_test_accuracy", ".4f", "up", 0.5, 1),
        MetricColumn("k=2", "sae", "sae_top_2_test_accuracy", ".4f", "up", 0.5, 1),
        MetricColumn("k=5", "sae", "sae_top_5_test_accuracy", ".4f", "up", 0.5, 1),
    )

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        texts = {name: dataset_version(name, ctx.data) for name in self.datasets}
        return {**super().settings(ctx), "k": self.ks(ctx.mode), "texts": texts}

    def ks(self, mode: str) -> tuple[int, ...]:
        if any(k < 1 for k in self.k):
            raise UsageError(f"{self.name}.k={','.join(map(str, self.k))}: a probe reads at least one latent.")
        return self.k or K_OF_MODE[mode]

    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        ks = self.ks(ctx.mode)
        make_generator(self.rng)  # an unknown one is refused before the model runs
        texts = {name: load_texts(name, ctx.data, self.train_set_size, self.test_set_size) for name in self.datasets}
        layers = sorted({target.layer for target in targets})
        own = [make_generator(self.rng) for _ in targets]  # of "saebench": one per SAE
        llm: dict[int, dict[str, ProbingScores]] = {layer: {} for layer in layers}
        sae: list[dict[str, ProbingScores]] = [{} for _ in targets]
        refused: dict[int, UsageError] = {}
        folded: set[int] = set()
        for number, (name, classes) in enumerate(texts.items()):
            found = read_labelled_rows(ctx, layers, name, classes, progress, self.context)
            for layer, rows in found.items():
                depends = {"layer": layer, "dataset": name, "texts": digest_of(classes), "k": ks, **self.draws(ctx)}

                def make(rows=rows, name=name) -> dict[str, Tensor]:
                    features = rows.split(rows.rows.mean_ND())
                    one = make_generator(self.rng)
                    return probe_dataset(features, ks, lambda *names: self.drawn_by(one, name, *names)).tensors()

                kept = ctx.artifacts.get_or_compute("llm_probes", depends, make)
                llm[layer][name] = ProbingScores.of_tensors(kept, classes["test"], ks)
            for index, target in enumerate(targets):
                progress(number * len(targets) + index, len(texts) * len(targets), f"{name}, SAE {index + 1}")
                if index in refused:
                    continue
                rows = found[target.layer]
                pooled, scaled = pool_unit_norm(target.sae, rows.rows, ctx.model.device)
                if (latents := len(pooled.zero_F)) < max(ks):
                    refused[index] = UsageError(
                        f"A probe on {max(ks)} latents needs as many, and there are {latents}. Give smaller ones: --set {self.name}.k=1"
                    )
                    continue
                if scaled:
                    folded.add(index)
                features = rows.split(pooled.mean_NF.to(ctx.model.device))

                def drawn(*names: object, one=own[index], name=name) -> torch.Generator:
                    return self.drawn_by(one, name, *names)

                sae[index][name] = probe_dataset(features, ks, drawn)
        return [
            refused.get(index) or build_result(llm[target.layer], sae[index], ks, self.test_set_size, index in folded)
            for index, target in enumerate(targets)
        ]

    def draws(self, ctx: EvalContext) -> dict[str, Any]:
        """What decides the numbers of the LLM's side, besides layer and texts."""
        return {**ctx.model_identity, "skip": ctx.special_ids, "context": self.context, "rng": self.rng}

    def drawn_by(self, one: torch.Generator, *names: object) -> torch.Generator:
        return one if self.rng == "saebench" else make_generator(self.rng, "sparse_probing", *names)


@dataclass(frozen=True)
class SparseProbingStdlib(SparseProbing):
    """The same on texts of the standard library, which every machine has: smaller sets of shorter texts."""

    datasets: tuple[str, ...] = tuple(STAND_INS)
    train_set_size: int = 400
    test_set_size: int = 200

    name = "sparse_probing_stdlib"
    title = "sparse probing on the standard library, test accuracy (0.5 is chance)"


@dataclass
class ProbingScores:
    """Test accuracies per class of one dataset: `full` on all features, `top[k]` on the k of the largest difference.

    `constant[k]` counts the classes whose k features never vary, so that the probe has nothing to read. `chosen[k]` are
    class -> feature -> difference, for a k of at most LATENTS_KEPT.
    """

    full: dict[str, float] = field(default_factory=dict)
    top: dict[int, dict[str, float]] = field(default_factory=dict)
    constant: dict[int, int] = field(default_factory=dict)
    chosen: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        top = {f"top_{k}": torch.tensor([*by_class.values()]).double() for k, by_class in self.top.items()}
        return {"full": torch.tensor([*self.full.values()], dtype=torch.float64), **top}

    @classmethod
    def of_tensors(
        cls, kept: Mapping[str, Tensor], labels: Sequence[str] | Texts, ks: Sequence[int]
    ) -> "ProbingScores":
        def by_class(name: str) -> dict[str, float]:
            return dict(zip(labels, kept[name].tolist(), strict=True))

        return cls(by_class("full"), {k: by_class(f"top_{k}") for k in ks if f"top_{k}" in kept})

    def flat(self, side: str) -> dict[str, dict[str, float]]:
        """SAEBench's names -> class -> accuracy."""
        return {f"{side}_test_accuracy": self.full} | {
            f"{side}_top_{k}_test_accuracy": scores for k, scores in self.top.items()
        }

    def latents(self) -> dict[str, dict[str, dict[str, float]]]:
        """Names like SAEBench's -> class -> latent -> difference."""
        return {f"sae_top_{k}_latents": by_class for k, by_class in self.chosen.items()}


def probe_dataset(
    features: Mapping[str, ProbeFeatures], ks: Sequence[int], drawn_by: Callable[..., torch.Generator]
) -> ProbingScores:
    """Probes on the texts of one dataset: the numeric part, on one row of features per text.

    `drawn_by("full", class)` and `drawn_by(k, class)` give what a task is drawn with. A k above the number of features
    is left out.
    """
    (train_ND, counts), (test_ND, test_counts) = features["train"], features["test"]

    def tasks(label: str, generator: torch.Generator) -> tuple[ProbeTask, ProbeTask]:
        return one_vs_rest_task(counts, label, generator), one_vs_rest_task(test_counts, label, generator)

    found = ProbingScores()
    for label in counts:
        generator = drawn_by("full", label)
        train, test = tasks(label, generator)
        trained = train_probe(
            train_ND[train.rows.to(train_ND.device)], train.label, test_ND[test.rows.to(test_ND.device)], test.label,
            generator, lr=RATE, batch_size=BATCH, epochs=EPOCHS, patience=PATIENCE,
        )  # fmt: skip
        found.full[label] = trained.test_accuracy
    for k in ks:
        if k > train_ND.shape[1]:
            continue
        found.top[k], found.constant[k] = {}, 0
        if k <= MAX_NAMED_LATENTS:
            found.chosen[k] = {}
        for label in counts:
            train, test = tasks(label, drawn_by(k, label))
            difference_D = mean_difference(train_ND, train)
            columns = top_features(difference_D.abs(), k)
            x_MK, test_x_MK = train_ND[:, columns].cpu()[train.rows], test_ND[:, columns].cpu()[test.rows]
            found.top[k][label] = logistic_accuracy(x_MK, train.label, test_x_MK, test.label)
            found.constant[k] += bool((x_MK == x_MK[0]).all())
            if k in found.chosen:
                found.chosen[k][label] = ranked_differences(columns, difference_D)
    return found


def ranked_differences(columns: Tensor, difference_D: Tensor) -> dict[str, float]:
    """Feature -> difference, the largest first; names are text, as in a file that is read."""
    pairs = zip(columns.tolist(), difference_D[columns].tolist(), strict=True)
    return {str(column): value for column, value in sorted(pairs, key=lambda pair: abs(pair[1]), reverse=True)}


def build_result(
    llm: Mapping[str, ProbingScores], sae: Mapping[str, ProbingScores], ks: Sequence[int], test_texts: int, folded: bool
) -> MetricResult:
    """Scores by dataset -> SAEBench's fields, with intervals as if tasks were independent (they share their texts)."""
    named = {side: ["test_accuracy", *(f"top_{k}_test_accuracy" for k in sorted({*RESULT_KS, *ks}))] for side in ("llm", "sae")}  # fmt: skip
    by_dataset = {name: llm[name].flat("llm") | sae[name].flat("sae") for name in sae}
    details = [
        {"dataset_name": f"{name}_results"}
        | {
            metric: mean([*flat[metric].values()]) if metric in flat else math.nan
            for side, names in named.items()
            for metric in (f"{side}_{n}" for n in names)
        }
        for name, flat in by_dataset.items()
    ]
    metrics, intervals = {}, {}
    for side, names in named.items():
        metrics[side] = {f"{side}_{n}": mean([detail[f"{side}_{n}"] for detail in details]) for n in names}
        spread = sum(1 / (len(sae) ** 2 * len(scores.full) * test_texts) for scores in sae.values())
        intervals[side] = {
            name: wilson_interval(value, 1 / spread) for name, value in metrics[side].items() if value >= 0
        }
    tasks = sum(len(scores.full) for scores in sae.values())
    flags = []
    for k in ks:
        if constant := sum(scores.constant[k] for scores in sae.values()):
            flags.append(
                f"k={k}: in {constant} of {tasks} tasks the chosen latents never vary, which gives exactly 0.5."
            )
    if folded:
        flags.append("Decoder rows were not of length 1: latents are scaled as if they were.")
    return MetricResult.of(
        metrics,
        details,
        intervals=intervals,
        n={"datasets": len(sae), "tasks": tasks, "test_texts_per_task": test_texts},
        flags=flags,
        extra={f"{name}_results": flat | sae[name].latents() for name, flat in by_dataset.items()},
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
