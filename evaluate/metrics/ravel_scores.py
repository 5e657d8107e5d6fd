"""The scores of RAVEL (cause, isolation, disentanglement), computed from the model's answers after the latents of a
mask were exchanged, with intervals from resampling entities.

Shape suffixes: E entities, A attributes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

from .ravel_answers import is_right
from .ravel_prompts import FactPair, FactPrompt

SCORES = ("disentanglement_score", "cause_score", "isolation_score")
RESAMPLES = 1000


@dataclass(frozen=True)
class AttributeScores:
    """The answers to the test pairs of one attribute.

    Attributes:
        entities: the entity of each pair's base.
        is_cause: whether the answer should change from the answer of the base to that of the source. As in SAEBench,
            this is false if these two answers have the same first token: then the answer should stay the same.
        right: whether the wanted answer was given.
        latents: the entries about the mask in the details.
    """

    entity_type: str
    attribute: str
    entities: Sequence[str]
    is_cause: Sequence[bool]
    right: Sequence[bool]
    latents: dict[str, Any]

    @classmethod
    def of(
        cls,
        entity_type: str,
        attribute: str,
        prompts: Sequence[FactPrompt],
        pairs: Sequence[FactPair],
        answers: Sequence[str],
        latents: dict[str, Any],
    ) -> "AttributeScores":
        bases = [prompts[pair.base] for pair in pairs]
        return cls(
            entity_type,
            attribute,
            [base.entity for base in bases],
            [pair.target != base.first_token for pair, base in zip(pairs, bases, strict=True)],
            [is_right(base.text, pair.value, answer) for pair, base, answer in zip(pairs, bases, answers, strict=True)],
            latents,
        )

    @property
    def cause_score(self) -> float:
        return share([right for right, cause in zip(self.right, self.is_cause, strict=True) if cause])

    @property
    def isolation_score(self) -> float:
        return share([right for right, cause in zip(self.right, self.is_cause, strict=True) if not cause])

    @property
    def detail(self) -> dict[str, Any]:
        """This attribute's entry in the details. Scores are named as in SAEBench."""
        return {
            "entity_attribute": f"{self.entity_type}_{self.attribute}",
            "entity_type": self.entity_type,
            "cause_score": self.cause_score,
            "isolation_score": self.isolation_score,
            "disentangle_score": (self.cause_score + self.isolation_score) / 2,
            "cause_pairs": sum(self.is_cause),
            "isolation_pairs": len(self.right) - sum(self.is_cause),
            **self.latents,
        }


def share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else float("nan")


def mean_scores(by_type: dict[str, list[AttributeScores]]) -> dict[str, float]:
    """The mean over the attributes of each entity type, then over the types."""
    causes, isolations = (
        float(np.mean([np.mean([getattr(one, name) for one in scores]) for scores in by_type.values()]))
        for name in ("cause_score", "isolation_score")
    )
    return dict(zip(SCORES, ((causes + isolations) / 2, causes, isolations), strict=True))


def score_intervals(by_type: dict[str, list[AttributeScores]], seed: int) -> dict[str, list[float]]:
    """95 % intervals of the mean scores, from resampling the entities of each type together with all of their pairs.

    The draws are the same for every SAE that is measured on the same pairs.
    """
    counts = [EntityCounts.of(scores) for scores in by_type.values()]
    drawn_from = [np.arange(len(of_type.counts_EAK)) for of_type in counts]
    if min(map(len, drawn_from)) < 2:
        return {name: [float("nan")] * 2 for name in SCORES}

    def statistic(name: str) -> Any:
        def value(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
            parts = [of_type.scores(rows)[name] for of_type, rows in zip(counts, drawn, strict=True)]
            return np.mean(parts, axis=0)

        return value

    return {name: finite_interval(drawn_from, statistic(name), seed) for name in SCORES}


def finite_interval(samples: Sequence[np.ndarray], statistic: Any, seed: int) -> list[float]:
    """95 % percentile interval over the resamples in which the statistic is defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # scipy's own interval warns of undefined resamples
        found = bootstrap(
            samples, statistic, n_resamples=RESAMPLES, vectorized=True, method="percentile",
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    finite = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
    return [float(end) for end in np.quantile(finite, [0.025, 0.975])] if len(finite) else [float("nan")] * 2


@dataclass(frozen=True)
class EntityCounts:
    """Counts for each entity and attribute (E, A, 4): cause pairs, cause pairs answered right, isolation pairs,
    isolation pairs answered right."""

    counts_EAK: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[AttributeScores]) -> "EntityCounts":
        number = {entity: i for i, entity in enumerate(dict.fromkeys(e for one in scores for e in one.entities))}
        counts_EAK = np.zeros((len(number), len(scores), 4))
        for a, one in enumerate(scores):
            for entity, cause, right in zip(one.entities, one.is_cause, one.right, strict=True):
                kind = 0 if cause else 2
                counts_EAK[number[entity], a, kind] += 1
                counts_EAK[number[entity], a, kind + 1] += right
        return cls(counts_EAK)

    def scores(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The scores of this entity type over resampled entities, given the entities' indices `rows` (..., E)."""
        sums = self.counts_EAK[rows].sum(-3)  # (..., A, 4)
        with np.errstate(invalid="ignore"):  # NaN where no drawn entity has such a pair
            causes, isolations = ((sums[..., kind + 1] / sums[..., kind]).mean(-1) for kind in (0, 2))
        return dict(zip(SCORES, ((causes + isolations) / 2, causes, isolations), strict=True))
