"""Sparse probing: how well a few latents predict the class of a text. Higher accuracy is better; 0.5 is chance.

Each class of each dataset has a binary task: to tell this class from the other classes. A text is represented by its
latents, averaged over the counted tokens. For the LLM's own score, a text is represented by the LLM's activations,
averaged in the same way. There are two probes per task: a probe on all features, trained until the test accuracy stops
rising, and scikit-learn's logistic regression on the k features whose class means differ most. Accuracies are averaged
over the classes of a dataset, then over datasets.

Source: SAEBench 0.6.0, `evals/sparse_probing` (after Gurnee et al. 2023), with its definitions and names. There are
three differences: additional entries in the results, and two numerical choices.

- If k is at most MAX_NAMED_LATENTS, the entry `sae_top_<k>_latents` lists the latents used by the probes on k latents:
  dataset -> class -> latent -> difference, with the largest absolute difference first. The difference is the
  latent's mean over the training texts of the class minus its mean over the other training texts of the task, so it is
  positive if the latent fires more for the class.
- The logistic regression is regularized, so accuracies depend on the scale of the latents. Decoder norms other than 1
  are therefore folded into the latents first.
- SAEBench sums activations in the model's dtype; here the sums are in float32.

Memory: the rows of one dataset at each layer (memory-mapped), and one SAE's pooled latents on it, N x d_sae.

Shape suffixes: N texts, M texts of a task, D features of a text, K selected features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...common.errors import SaeError, UsageError
from ...common.files import digest_of
from ..context import EvalContext
from ..datasets.labeled import HUB, STAND_INS, Texts, count_texts, dataset_version, load_texts
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress, RowSet
from .probes import (
    LabeledRows,
    ProbeFeatures,
    ProbeTask,
    logistic_accuracy,
    make_generator,
    mean_difference,
    one_vs_rest_task,
    pool_unit_norm,
    read_labeled_rows,
    top_features,
    train_probe,
    wilson_interval,
)

K_OF_MODE = {"0.6.0": (1, 2, 5), "2024-12": (1, 2, 5, 10, 20, 50)}
RESULT_KS = (1, 2, 5, 10, 20, 50, 100)  # the values of k that have a field in SAEBench's files
MAX_NAMED_LATENTS = 5  # for probes on at most this many latents, results list the latents
BATCH, EPOCHS, PATIENCE, RATE = 250, 100, 10, 1e-2  # for the probe on all features


@dataclass(frozen=True)
class SparseProbing(Metric):
    """Sparse probing on SAEBench's eight datasets, from `--data` or the Hub.

    `train_set_size` and `test_set_size` are numbers of texts of one binary task, and `context` is the number of tokens
    per text. An empty `k` selects SAEBench's values for the mode. With rng="saebench", the draws equal SAEBench's draws
    for an SAE whose activations were cached: the probes of an SAE share one generator, seeded with 42, for all
    datasets. The probes of the LLM use another generator, which is seeded with 42 again for each dataset.
    """

    datasets: tuple[str, ...] = tuple(HUB)
    k: tuple[int, ...] = ()
    train_set_size: int = 4000
    test_set_size: int = 1000
    context: int = 128
    rng: str = "paired"

    unit = "data set"
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
        return {**super().settings(ctx), **ctx.text_settings, "k": self.ks(ctx.mode), "texts": texts}

    def ks(self, mode: str) -> tuple[int, ...]:
        if any(k < 1 for k in self.k):
            raise UsageError(
                f"{self.name}.k={','.join(map(str, self.k))}: a probe needs at least one latent. Give 1 or more."
            )
        return self.k or K_OF_MODE[mode]

    def kept_bytes(self, ctx: EvalContext, targets: Sequence[EvalTarget]) -> int:
        texts = sum(count_texts(name, self.train_set_size, self.test_set_size) for name in self.datasets)
        return texts * self.context * ctx.row_bytes({target.hook for target in targets})

    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        ks = self.ks(ctx.mode)
        make_generator(self.rng)  # raises an error for an unknown rng before the model runs
        texts = {name: load_texts(name, ctx.data, self.train_set_size, self.test_set_size) for name in self.datasets}
        row_sets = list(dict.fromkeys(target.row_set for target in targets))
        llm: dict[RowSet, dict[str, ProbingScores]] = {row_set: {} for row_set in row_sets}
        probed = [ProbedSAE(make_generator(self.rng)) for _ in targets]
        for number, (name, classes) in enumerate(texts.items()):
            rows = read_labeled_rows(ctx, row_sets, name, classes, progress, self.context)
            for row_set in row_sets:
                llm[row_set][name] = self.llm_scores(ctx, row_set, name, classes, rows[row_set], ks)
            for index, (target, sae) in enumerate(zip(targets, probed, strict=True)):
                progress(number * len(targets) + index, len(texts) * len(targets), f"{name}, SAE {index + 1}")
                if sae.error is None:
                    self.probe_sae(ctx, target, sae, name, rows[target.row_set], ks)
        return [
            sae.error
            or build_result(llm[target.row_set], sae.scores, ks, self.test_set_size, sae.folded).without_outliers(
                sae.outliers, sae.rows
            )
            for target, sae in zip(targets, probed, strict=True)
        ]

    def llm_scores(
        self, ctx: EvalContext, row_set: RowSet, name: str, texts: Texts, rows: LabeledRows, ks: Sequence[int]
    ) -> "ProbingScores":
        """The scores of the probes on the model's own activations for one dataset. They are computed unless the
        artifact cache contains them."""

        def make() -> dict[str, Tensor]:
            generator = make_generator(self.rng)
            features = rows.split(rows.rows.mean_ND())
            return probe_dataset(features, ks, self.generators(generator, name)).to_tensors()

        place = row_set.record(rows.outliers)
        depends = {**place, "dataset": name, "texts": digest_of(texts), "k": ks, **ctx.model_identity}
        depends |= {**ctx.text_settings, "skip": ctx.context_format.skip_record}
        depends |= {"context": self.context, "rng": self.rng}
        return ProbingScores.from_tensors(
            ctx.artifacts.get_or_compute("llm_probes", depends, make), [*texts["test"]], ks
        )

    def probe_sae(
        self, ctx: EvalContext, target: EvalTarget, sae: "ProbedSAE", name: str, rows: LabeledRows, ks: Sequence[int]
    ) -> None:
        """Add the scores of one SAE on one dataset to `sae`, or the error if the SAE has too few latents or if its
        latents are not finite."""
        try:
            pooled, folded = pool_unit_norm(target.sae, rows.rows, ctx.model.device)
        except SaeError as error:
            sae.error = error
            return
        if (d_sae := len(pooled.zero_F)) < max(ks):
            sae.error = UsageError(
                f"This SAE has {d_sae} latents, too few for a probe on {max(ks)}. Give smaller values of k: "
                f"--set {self.name}.k=1"
            )
            return
        sae.folded |= folded
        sae.rows, sae.outliers = sae.rows + len(rows.rows.x_TD), sae.outliers + rows.outliers
        features = rows.split(pooled.mean_NF.to(ctx.model.device))
        sae.scores[name] = probe_dataset(features, ks, self.generators(sae.generator, name))

    def generators(self, shared: torch.Generator, dataset: str) -> Callable[..., torch.Generator]:
        """A function that returns the generator for a random draw, given the names that identify the draw. With
        rng="saebench", the function always returns `shared`."""

        def generator_for(*names: object) -> torch.Generator:
            return shared if self.rng == "saebench" else make_generator(self.rng, "sparse_probing", dataset, *names)

        return generator_for


@dataclass(frozen=True)
class SparseProbingStdlib(SparseProbing):
    """The same metric on fewer and shorter texts from Python's standard library. This metric needs no download."""

    datasets: tuple[str, ...] = tuple(STAND_INS)
    train_set_size: int = 400
    test_set_size: int = 200

    name = "sparse_probing_stdlib"
    title = "sparse probing on the standard library, test accuracy (0.5 is chance)"


@dataclass
class ProbingScores:
    """Test accuracies by class for one dataset: `full` on all features, `top[k]` on the k features with the largest
    difference.

    `constant[k]` is the number of classes whose k features are all constant, so that the probe has nothing to read.
    `selected[k]` maps class -> feature -> difference, for k up to MAX_NAMED_LATENTS.
    """

    full: dict[str, float] = field(default_factory=dict)
    top: dict[int, dict[str, float]] = field(default_factory=dict)
    constant: dict[int, int] = field(default_factory=dict)
    selected: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        top = {f"top_{k}": torch.tensor([*by_class.values()]).double() for k, by_class in self.top.items()}
        return {"full": torch.tensor([*self.full.values()], dtype=torch.float64), **top}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, Tensor], classes: Sequence[str], ks: Sequence[int]) -> "ProbingScores":
        def by_class(name: str) -> dict[str, float]:
            return dict(zip(classes, arrays[name].tolist(), strict=True))

        return cls(by_class("full"), {k: by_class(f"top_{k}") for k in ks if f"top_{k}" in arrays})

    def flat(self, side: str) -> dict[str, dict[str, float]]:
        """SAEBench's names -> class -> accuracy. `side` is "llm" or "sae"."""
        return {f"{side}_test_accuracy": self.full} | {
            f"{side}_top_{k}_test_accuracy": scores for k, scores in self.top.items()
        }

    def latents(self) -> dict[str, dict[str, dict[str, float]]]:
        """Nested dicts: sae_top_<k>_latents (a name in SAEBench's style) -> class -> latent -> difference."""
        return {f"sae_top_{k}_latents": by_class for k, by_class in self.selected.items()}


@dataclass
class ProbedSAE:
    """One SAE's scores so far: name of a dataset -> scores."""

    generator: torch.Generator  # with rng="saebench": used for all random draws when this SAE is measured
    scores: dict[str, ProbingScores] = field(default_factory=dict)
    folded: bool = False  # whether decoder norms were folded into the latents
    rows: int = 0  # rows that were pooled
    outliers: int = 0  # rows that were left out
    error: SaeError | None = None


def probe_dataset(
    features: Mapping[str, ProbeFeatures], ks: Sequence[int], generator_for: Callable[..., torch.Generator]
) -> ProbingScores:
    """Train and test the probes of one dataset; `features` has one row per text.

    `generator_for("full", class)` and `generator_for(k, class)` return the generator for a task's draws. A k above the
    number of features is skipped.
    """
    (train_ND, counts), (test_ND, test_counts) = features["train"], features["test"]

    def tasks(label: str, generator: torch.Generator) -> tuple[ProbeTask, ProbeTask]:
        return one_vs_rest_task(counts, label, generator), one_vs_rest_task(test_counts, label, generator)

    scores = ProbingScores()
    for label in counts:
        generator = generator_for("full", label)
        train, test = tasks(label, generator)
        trained = train_probe(
            train_ND[train.rows.to(train_ND.device)],
            train.label,
            test_ND[test.rows.to(test_ND.device)],
            test.label,
            generator,
            lr=RATE,
            batch_size=BATCH,
            epochs=EPOCHS,
            patience=PATIENCE,
        )
        scores.full[label] = trained.test_accuracy
    for k in ks:
        if k > train_ND.shape[1]:
            continue
        scores.top[k], scores.constant[k] = {}, 0
        if k <= MAX_NAMED_LATENTS:
            scores.selected[k] = {}
        for label in counts:
            train, test = tasks(label, generator_for(k, label))
            difference_D = mean_difference(train_ND, train)
            selected_K = top_features(difference_D.abs(), k)
            x_MK, test_x_MK = train_ND[:, selected_K].cpu()[train.rows], test_ND[:, selected_K].cpu()[test.rows]
            scores.top[k][label] = logistic_accuracy(x_MK, train.label, test_x_MK, test.label)
            scores.constant[k] += bool((x_MK == x_MK[0]).all())
            if k in scores.selected:
                scores.selected[k][label] = ranked_differences(selected_K, difference_D)
    return scores


def ranked_differences(selected_K: Tensor, difference_D: Tensor) -> dict[str, float]:
    """Feature -> difference, the largest first. Keys are strings, as they are in a JSON file."""
    pairs = zip(selected_K.tolist(), difference_D[selected_K].tolist(), strict=True)
    return {str(feature): value for feature, value in sorted(pairs, key=lambda pair: abs(pair[1]), reverse=True)}


def build_result(
    llm: Mapping[str, ProbingScores], sae: Mapping[str, ProbingScores], ks: Sequence[int], test_texts: int, folded: bool
) -> MetricResult:
    """Convert the scores of each dataset to a result with SAEBench's fields.

    Intervals treat the tasks as independent although they share their texts.
    """
    suffixes = ["test_accuracy", *(f"top_{k}_test_accuracy" for k in sorted({*RESULT_KS, *ks}))]
    fields = {side: [f"{side}_{suffix}" for suffix in suffixes] for side in ("llm", "sae")}
    by_dataset = {name: llm[name].flat("llm") | sae[name].flat("sae") for name in sae}
    accuracies = {
        dataset: {
            name: mean([*flat[name].values()]) if name in flat else math.nan
            for names in fields.values()
            for name in names
        }
        for dataset, flat in by_dataset.items()
    }
    metrics, intervals = {}, {}
    for side, names in fields.items():
        metrics[side] = {name: mean([of_dataset[name] for of_dataset in accuracies.values()]) for name in names}
        variance = sum(1 / (len(sae) ** 2 * len(scores.full) * test_texts) for scores in sae.values())
        intervals[side] = {
            name: wilson_interval(value, 1 / variance) for name, value in metrics[side].items() if value >= 0
        }
    tasks = sum(len(scores.full) for scores in sae.values())
    return MetricResult.of(
        metrics,
        [{"dataset_name": f"{dataset}_results", **of_dataset} for dataset, of_dataset in accuracies.items()],
        intervals=intervals,
        n={"datasets": len(sae), "tasks": tasks, "test_texts_per_task": test_texts},
        flags=probing_flags(sae, ks, tasks, folded),
        extra={f"{dataset}_results": flat | sae[dataset].latents() for dataset, flat in by_dataset.items()},
    )


def probing_flags(sae: Mapping[str, ProbingScores], ks: Sequence[int], tasks: int, folded: bool) -> list[str]:
    flags = [
        f"k={k}: in {constant} of {tasks} tasks, the selected latents never vary, so the accuracy is exactly 0.5."
        for k in ks
        if (constant := sum(scores.constant[k] for scores in sae.values()))
    ]
    if folded:
        flags.append("Decoder rows do not have unit length, so their norms were folded into the latents.")
    return flags


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
