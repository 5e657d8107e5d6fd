"""sae_probes: how well logistic probes on a few latents separate the classes of 113 data sets. 0.5 is chance.

A text is represented by the latents at its last token or, for the model's own score, by the activations there. In each
data set, the k latents that best separate the classes of the training texts are probed. See logistic_probes.py for
splits, ranking and regularization. AUC and accuracy are averaged over the splits of a data set (only one split if the
setting is "normal"), then over data sets. Intervals resample data sets.

Source: Kantamneni et al. 2025, "Are Sparse Autoencoders Useful?", arXiv 2502.16681, and its package sae-probes 0.4.2.
With `--max-norm none`, the numbers equal those of sae-probes except for these differences:

- Contexts begin with the same token as those that the SAE was trained on; sae-probes keeps the tokens that
  TransformerLens' tokenizer adds.
- A text whose last token is an outlier row is left out, together with a text of the other class to keep the classes
  balanced.
- For a k larger than the number of latents, there is no number; sae-probes reports a probe on all latents as the number
  for this k.

Memory, for one data set at a time: its rows (5,000 x d_in), one SAE's latents of these rows in sparse form, and the
dense latents of the training texts (1,024 x d_sae float32, 67 MB at 16,384 latents).

Shape suffixes: N texts, D d_in, F latents, S splits, K entries of `ks` or probed latents.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

from ...cache.outliers import outlier_mask
from ...common.device import copy_to_device
from ...common.errors import SaeError, UsageError
from ..context import EvalContext
from ..datasets import sae_probes as data
from ..statistics import bootstrap_interval
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress, RowSet, SAELike, encode_finite
from .last_token_rows import last_token_rows
from .logistic_probes import (
    SEED,
    SETTINGS,
    SHARES,
    ProbeScore,
    ProbeSplit,
    fit_probe,
    rank_latents,
    splits_of,
)

KS = (1, 2, 5, 16, 128)
PENALTIES = ("l1", "l2")  # of the probes on latents; the probe on the model's activations uses L2, as in sae-probes
DEFAULT_TEXTS = 5000  # number of texts of a data set
ROWS_PER_ENCODE = 128
NAMED_LATENTS = 16  # how many latents a result lists for each split
UNKNOWN = ProbeScore(*[math.nan] * len(ProbeScore._fields))


class SplitScores(NamedTuple):
    """The scores of the probes on one split, the latents that they read, and whether these are constant in the training
    texts."""

    probes: list[ProbeScore]
    latents: list[int]
    constant: list[bool]


@dataclass(frozen=True)
class SaeProbes(Metric):
    """Probes on the data sets that `sae data get sae-probes` fetches.

    `datasets` are names or numbers from `sae data list sae-probes`; `ks` are the numbers of latents to probe. `setting`
    is normal, scarcity (2 to 1,024 training texts) or imbalance (5 % to 95 % positive texts). `max_texts` limits the
    texts of a data set, and `max_train` those that a probe is trained on; the defaults follow sae-probes.
    """

    datasets: tuple[str, ...] = ("all",)
    ks: tuple[int, ...] = KS
    setting: str = "normal"
    penalty: str = "l1"
    max_texts: int = DEFAULT_TEXTS
    max_train: int = 1024

    name = "sae_probes"
    type_id = "sparse_probing_sae_probes"
    unit = "data set"
    title = "sae-probes, test AUC of logistic probes (0.5 is chance)"
    columns = (
        MetricColumn("LLM AUC", "llm", "llm_test_auc", ".4f", "up", 0.5, 1),
        *(MetricColumn(f"k={k} AUC", "sae", f"sae_top_{k}_test_auc", ".4f", "up", 0.5, 1) for k in KS),
    )

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        self.check()
        about = {"datasets": self.names(), "data": f"sae-probes {data.VERSION}", "bos": ctx.context_format.bos_id}
        return {**super().settings(ctx), **about}

    def check(self) -> None:
        if self.setting not in SETTINGS:
            raise UsageError(f"{self.name}.setting={self.setting} is unknown. Expected one of {', '.join(SETTINGS)}.")
        if self.penalty not in PENALTIES:
            raise UsageError(f"{self.name}.penalty={self.penalty} is unknown. Expected l1 or l2.")
        if not self.ks or min(self.ks) < 1:
            raise UsageError(
                f"{self.name}.ks={','.join(map(str, self.ks))}: a probe needs at least one latent. Give 1 or more."
            )
        for option in ("max_texts", "max_train"):
            if (value := getattr(self, option)) < 2:
                raise UsageError(f"{self.name}.{option}={value}: give 2 or more, so that each class has a text.")
        try:
            self.splits(np.arange(min(self.max_texts, DEFAULT_TEXTS) // 2 * 2) % 2, "sae")
        except UsageError as error:
            raise UsageError(f"{self.name}.max_texts={self.max_texts}: {error}") from None

    def names(self) -> list[str]:
        """The requested data sets, in the order of the index.

        Raises UsageError for an unknown data set and UnavailableError if the data have not been fetched.
        """
        known = data.dataset_names()
        if self.datasets == ("all",):
            return known
        if not any(self.datasets):
            raise UsageError(f"{self.name}.datasets= names no data set. `sae data list sae-probes` lists them.")
        by_number = {name.split("_")[0]: name for name in known}
        asked = [by_number.get(name, name) for name in self.datasets]
        for name in asked:
            data.find_source(name)
        return [name for name in known if name in asked]

    def kept_bytes(self, ctx: EvalContext, targets: Sequence[EvalTarget]) -> int:
        return len(self.names()) * self.max_texts * ctx.row_bytes({target.hook for target in targets})

    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        names = self.names()
        row_sets = list(dict.fromkeys(target.row_set for target in targets))
        llm: dict[RowSet, dict[str, DatasetScores]] = {row_set: {} for row_set in row_sets}
        probed = [ScoredSAE() for _ in targets]
        for number, name in enumerate(names):
            problems = self.read_problems(ctx, row_sets, name, progress)
            for row_set, problem in problems.items():
                llm[row_set][name] = self.probe_model(ctx, problem)
            for index, (target, sae) in enumerate(zip(targets, probed, strict=True)):
                progress(number * len(targets) + index, len(names) * len(targets), f"{name}, SAE {index + 1}")
                if sae.error is None:
                    try:
                        sae.scores[name] = self.probe_sae(ctx, target.sae, problems[target.row_set])
                    except SaeError as error:
                        sae.error = error
        return [
            sae.error or build_result(llm[target.row_set], sae.scores, self.ks)
            for target, sae in zip(targets, probed, strict=True)
        ]

    def read_problems(
        self, ctx: EvalContext, row_sets: Sequence[RowSet], name: str, progress: Progress
    ) -> dict[RowSet, "ProbeProblem"]:
        """For each row set, the rows and splits of one data set. The model runs over the texts at most once."""
        texts, label_N = data.read_texts(name)
        chosen = balanced(label_N, np.ones(len(texts), bool), self.max_texts)
        source = {"dataset": name, "data": data.dataset_digest(name), "texts": len(chosen)}
        hooks = sorted({row_set.hook for row_set in row_sets})
        rows = last_token_rows(ctx, hooks, [texts[i] for i in chosen], source, progress)
        problems = {}
        for row_set in row_sets:
            outlier_N = outlier_mask(rows[row_set.hook], row_set.norm_limit)
            kept = balanced(label_N[chosen], ~outlier_N.numpy(), self.max_texts)
            try:
                splits = {side: self.splits(label_N[chosen][kept], side) for side in ("sae", "llm")}
            except UsageError as error:
                masked = int(outlier_N.sum())
                hint = (
                    f" {masked:,} texts that end in an outlier row are left out. To count them, pass --max-norm none."
                )
                raise UsageError(f"{name}: {error}{hint if masked else ''}") from None
            x_ND = rows[row_set.hook][torch.from_numpy(kept)].float()
            problems[row_set] = ProbeProblem(x_ND, label_N[chosen][kept], splits, int(outlier_N.sum()))
        return problems

    def splits(self, label_N: np.ndarray, side: str) -> list[ProbeSplit]:
        """The splits for the probes on latents ("sae") or on the model's activations ("llm"). For "llm", sae-probes
        rounds the shares."""
        shares = [round(share * 20) / 20 for share in SHARES] if side == "llm" else SHARES
        return splits_of(self.setting, label_N, self.max_train, shares)

    def probe_model(self, ctx: EvalContext, problem: "ProbeProblem") -> "DatasetScores":
        x_ND = problem.x_ND.numpy()

        def probe(split: ProbeSplit) -> SplitScores:
            (x, y), (test_x, test_y) = ((x_ND[texts], problem.label_N[texts]) for texts in split[:2])
            return SplitScores([fit_probe(x, y, test_x, test_y, l1=False)], [], [bool((x == x[0]).all())])

        return self.kept_scores(ctx, problem, "llm", {"rows": digest_arrays(x_ND)}, probe)

    def probe_sae(self, ctx: EvalContext, sae: SAELike, problem: "ProbeProblem") -> "DatasetScores":
        latent_NF = encode_rows(sae, problem.x_ND, ctx.device)
        digest = digest_arrays(latent_NF.data, latent_NF.indices, latent_NF.indptr, np.array(latent_NF.shape))

        def probe(split: ProbeSplit) -> SplitScores:
            return probe_latents(latent_NF, problem.label_N, split, self.ks, l1=self.penalty == "l1")

        return self.kept_scores(ctx, problem, "sae", {"latents": digest, "ks": self.ks, "penalty": self.penalty}, probe)

    def kept_scores(
        self, ctx: EvalContext, problem: "ProbeProblem", side: str, features: Mapping[str, Any],
        probe: Callable[[ProbeSplit], SplitScores],
    ) -> "DatasetScores":  # fmt: skip
        """The scores of one data set, from the artifact cache or computed. Scores that are complete when the process is
        killed are not computed again.

        The scores are keyed by a digest of the probes' inputs, so this also works for SAE objects without files.
        """
        splits = problem.splits[side]

        def compute() -> dict[str, Tensor]:
            scores = [probe(split) for split in splits]
            latents = torch.tensor([one.latents for one in scores], dtype=torch.int64)
            return {
                "scores": torch.tensor([one.probes for one in scores], dtype=torch.float64),
                "constant": torch.tensor([one.constant for one in scores]),
                "latents": latents.reshape(len(scores), -1),
            }

        depends = {
            "side": side, "definition": self.definition, "labels": digest_arrays(problem.label_N),
            "setting": self.setting, "max_train": self.max_train, **features,
        }  # fmt: skip
        arrays = ctx.artifacts.get_or_compute("sae_probes", depends, compute)
        return DatasetScores(arrays["scores"], arrays["constant"], arrays["latents"], splits, problem.outliers)


@dataclass(frozen=True)
class ProbeProblem:
    """The activation rows and labels of a data set's texts at one hook, and two lists of splits: "sae" for probes on
    latents, "llm" for probes on the model's activations."""

    x_ND: Tensor  # float32
    label_N: np.ndarray
    splits: dict[str, list[ProbeSplit]]
    outliers: int  # texts that were left out


@dataclass(frozen=True)
class DatasetScores:
    """Scores of one data set. The model's own scores have a single entry instead of one for each k."""

    score_SK4: Tensor  # the fields of ProbeScore; NaN for a k larger than the number of latents
    constant_SK: Tensor  # whether the probed latents never vary in the training texts
    latent_SK: Tensor  # the probed latents, the best first
    splits: list[ProbeSplit]
    outliers: int

    def mean(self, score: str, place: int = 0) -> float:
        """The mean of one field of ProbeScore over the splits, for k = ks[place]."""
        return float(self.score_SK4[:, place, ProbeScore._fields.index(score)].mean())


@dataclass
class ScoredSAE:
    """One SAE's scores so far: name of a data set -> scores."""

    scores: dict[str, DatasetScores] = field(default_factory=dict)
    error: SaeError | None = None


# --- one data set -----------------------------------------------------------------------------------------------------


def balanced(label_N: np.ndarray, usable_N: np.ndarray, max_texts: int) -> np.ndarray:
    """The indices of the first usable texts in ascending order: equally many of each class, at most `max_texts` in
    total."""
    by_class = [np.flatnonzero(usable_N & (label_N == label)) for label in (0, 1)]
    each = min(max_texts // 2, *map(len, by_class))
    return np.sort(np.concatenate([texts[:each] for texts in by_class]))


@torch.no_grad()
def encode_rows(sae: SAELike, x_ND: Tensor, device: str) -> csr_array:
    """The latents (N, F) of every row. Raises SaeError for latents that are not finite."""
    parts = x_ND.split(ROWS_PER_ENCODE)
    return vstack(
        [csr_array(encode_finite(sae, copy_to_device(part, device)).cpu().numpy()) for part in parts], format="csr"
    )


def probe_latents(
    latent_NF: csr_array, label_N: np.ndarray, split: ProbeSplit, ks: Sequence[int], *, l1: bool
) -> SplitScores:
    """Rank latents on the training texts of a split. For each k in `ks`, train a probe on the best k latents."""
    (train_M, test_M, _), latents = split, latent_NF.shape[1]
    train_MF = torch.from_numpy(latent_NF[train_M].toarray())
    ranked_K = rank_latents(train_MF, torch.from_numpy(label_N[train_M]), min(max(ks), latents))
    train_MK, test_MK = train_MF[:, ranked_K].numpy(), latent_NF[test_M][:, ranked_K.numpy()].toarray()
    probes, constant = [], []
    for k in ks:
        x, test_x = np.ascontiguousarray(train_MK[:, :k]), np.ascontiguousarray(test_MK[:, :k])
        known = k <= latents
        probes.append(fit_probe(x, label_N[train_M], test_x, label_N[test_M], l1=l1) if known else UNKNOWN)
        constant.append(known and bool((x == x[0]).all()))
    return SplitScores(probes, ranked_K.tolist(), constant)


def digest_arrays(*arrays: np.ndarray) -> str:
    """A digest of the bytes of some arrays. It does not cover their types and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# --- all data sets ----------------------------------------------------------------------------------------------------


def build_result(llm: Mapping[str, DatasetScores], sae: Mapping[str, DatasetScores], ks: Sequence[int]) -> MetricResult:
    """Means over the data sets, with intervals from resampling the data sets."""
    details = [describe_dataset(name, llm[name], sae[name], ks) for name in sae]
    fields = {
        "llm": ["llm_test_auc", "llm_test_accuracy"],
        "sae": [f"sae_top_{k}_{score}" for k in ks for score in ("test_auc", "test_accuracy")],
    }
    values = {side: {name: [one[name] for one in details] for name in names} for side, names in fields.items()}
    result = MetricResult.of(
        {side: {name: float(np.mean(found)) for name, found in group.items()} for side, group in values.items()},
        details,
        intervals={
            side: {
                name: bootstrap_interval([found], SEED)
                for name, found in group.items()
                if len(found) > 1 and np.isfinite(found).all()
            }
            for side, group in values.items()
        },
        n={
            "data_sets": len(sae),
            "tested_texts": sum(len(split.test_M) for one in sae.values() for split in one.splits),
        },
        flags=probe_flags(sae, ks),
        extra={name: describe_splits(llm[name], sae[name], ks) for name in sae},
    )
    return result.without_outliers(sum(one.outliers for one in sae.values()), sum(one["texts"] for one in details))


def describe_dataset(name: str, llm: DatasetScores, sae: DatasetScores, ks: Sequence[int]) -> dict[str, Any]:
    scores = {f"llm_{score}": llm.mean(score) for score in ("test_auc", "test_accuracy")}
    for place, k in enumerate(ks):
        scores |= {f"sae_top_{k}_{score}": sae.mean(score, place) for score in ("test_auc", "test_accuracy")}
    texts = len(sae.splits[0].train_M) + len(sae.splits[0].test_M) + 1
    return {"dataset_name": name, "texts": texts, "outlier_texts": sae.outliers, "splits": len(sae.splits), **scores}


def describe_splits(llm: DatasetScores, sae: DatasetScores, ks: Sequence[int]) -> list[dict[str, Any]]:
    """For each split, its sizes, the scores of every probe, and the best latents, best first."""
    return [
        {
            "train": len(split.train_M),
            "test": len(split.test_M),
            "share": split.share,
            "llm": ProbeScore(*llm.score_SK4[number, 0].tolist())._asdict(),
            "sae": {str(k): ProbeScore(*sae.score_SK4[number, p].tolist())._asdict() for p, k in enumerate(ks)},
            "latents": sae.latent_SK[number, :NAMED_LATENTS].tolist(),
        }
        for number, split in enumerate(sae.splits)
    ]


def probe_flags(sae: Mapping[str, DatasetScores], ks: Sequence[int]) -> list[str]:
    flags = []
    for place, k in enumerate(ks):
        if not all(math.isfinite(one.mean("test_auc", place)) for one in sae.values()):
            flags.append(f"k={k}: there is no number, because the SAE has fewer latents.")
        if constant := sum(bool(one.constant_SK[:, place].any()) for one in sae.values()):
            flags.append(
                f"k={k}: in {constant} of {len(sae)} data sets, the chosen latents never vary in the "
                "training texts, so the AUC is exactly 0.5."
            )
    if outliers := {name: one.outliers for name, one in sae.items() if one.outliers}:
        named = ", ".join(f"{name} {count:,}" for name, count in sorted(outliers.items(), key=lambda item: -item[1]))
        flags.append(
            "Texts that end in an outlier row are left out, each together with a text of the other class: "
            f"{named}. To count them, as sae-probes does, pass --max-norm none."
        )
    return flags
