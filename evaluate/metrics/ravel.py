"""RAVEL: whether an SAE has separate latents for one attribute of an entity and for its other attributes.

    cause_score            how often the model names the country of another city, after the latents of a mask were
                           exchanged for those of the other city
    isolation_score        how often it still names the city's own continent and language
    disentanglement_score  their mean

Higher is better. If everything is exchanged, cause is 1 and isolation is 0; if nothing is exchanged, cause is 0 and
isolation is 1.

Source: Huang et al. 2024, arXiv 2402.17700, as measured by SAEBench 0.6.0 (`evals/ravel`). Only questions that the
model answers right are used. For each SAE and attribute, a mask is trained on 70 % of the pairs of questions and tested
on the rest (ravel_masks). Scores are averaged over the attributes of an entity type, then over the types.

If the attributes are in the same order as in SAEBench, the pairs and batches are the same, too. There are three
differences. First, the position of the entity's last token differs if the tokenizer adds no token before a text
(in which case SAEBench reads the token after the entity) or joins the entity's last token with the following text.
Second, time zones differ (ravel_answers). Third, attributes about which the model knows too little are left out, and
the result says so. Questions are left out if the activation at the entity's last token is an outlier row
(`EvalTarget.norm_limit`). If there are such questions, the metric is also measured with them, to obtain SAEBench's
numbers.

Shape suffixes: N prompts, D d_in, F latents.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...cache.outliers import outlier_mask
from ...common.errors import SaeError, UsageError
from ..context import EvalContext
from ..datasets.ravel import FACTS, RAVEL, facts_version, load_facts
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress, UnitValues
from .ravel_masks import Mask, answer_under, train_masks
from .ravel_prompts import (
    FactPrompt,
    PairSplit,
    ask,
    draw_pairs,
    entity_rows,
    known_prompts,
    make_prompts,
    whole_batches,
)
from .ravel_scores import AttributeScores, mean_scores, score_intervals

TOP_LATENTS = 20  # how many latents of each mask are listed in the details


@dataclass(frozen=True)
class KnownFacts:
    """For one type of entity, the questions that the model answers right. Only the attributes in `attributes` are
    measured."""

    entity_type: str
    asked: Counter[str]  # attribute -> number of questions
    prompts: list[FactPrompt]  # answered right
    attributes: tuple[str, ...]
    refusals: list[str]  # reasons why attributes are left out

    @classmethod
    def of(
        cls,
        entity_type: str,
        asked: Counter[str],
        prompts: list[FactPrompt],
        attributes: Sequence[str],
        fewest: int,
        refusals: Sequence[str] = (),
    ) -> Self:
        """`fewest` is the minimum number of right answers per attribute. `refusals` says which attributes have already
        been left out, and why."""
        kept, refusals = [], [*refusals]
        for attribute in attributes:
            values = [prompt.value for prompt in prompts if prompt.attribute == attribute]
            if len(values) >= fewest and len(set(values)) > 1:
                kept.append(attribute)
                continue
            alike = f", all with the answer {values[0]}" if len(values) >= fewest else ""
            count = f"{len(values):,} of {asked[attribute]:,} questions answered right"
            refusals.append(f"{entity_type}.{attribute}: {count}{alike}")
        if len(kept) == 1:
            refusals.append(f"{entity_type}.{kept[0]}: there is no other attribute to keep unchanged")
        return cls(entity_type, asked, prompts, tuple(kept) if len(kept) > 1 else (), refusals)

    def select(self, kept: Sequence[int], fewest: int) -> Self:
        """The same facts, with only these prompts."""
        chosen = [self.prompts[i] for i in kept]
        return self.of(self.entity_type, self.asked, chosen, self.attributes, fewest, self.refusals)


@dataclass
class RavelState:
    """The measurements of one SAE so far, by entity type."""

    target: EvalTarget
    scores: dict[str, list[AttributeScores]] = field(default_factory=dict)
    error: SaeError | None = None


@dataclass(frozen=True)
class Ravel(Metric):
    """`attributes` are pairs of an entity type and an attribute, at least two for each type.

    For each type, the `top_n_entities` entities that the model knows most about are used, and at most
    `num_pairs_per_attribute` pairs of questions about an attribute. An attribute with fewer than `min_known_prompts`
    questions that the model answers right is left out. The model's answers are stored in the artifact cache.

    Memory: the activations at the entities of all known questions, in the model's dtype (230 MB for 50,000 questions
    with Gemma-2-2B); the activations of one batch of questions, with gradients in the blocks after the hook; and twelve
    bytes per latent and SAE.
    """

    attributes: tuple[str, ...] = (
        "city.Country", "city.Continent", "city.Language", "nobel_prize_winner.Country of Birth",
        "nobel_prize_winner.Field", "nobel_prize_winner.Gender",
    )  # fmt: skip
    top_n_entities: int = 500
    num_pairs_per_attribute: int = 5000
    train_test_split: float = 0.7
    learning_rate: float = 1e-3
    num_epochs: int = 2
    batch_size: int = 8
    n_generated_tokens: int = 6
    min_known_prompts: int = 40
    random_seed: int = 42

    dataset: ClassVar[str] = RAVEL

    name = "ravel"
    type_id = "ravel"
    title = "RAVEL (cause: the attribute changes; isolation: the others stay)"
    columns = (
        MetricColumn("disentangle", "ravel", "disentanglement_score", ".4f", "up", 0.5, 1),
        MetricColumn("cause", "ravel", "cause_score", ".4f", "up", 0, 1, shared=False),
        MetricColumn("isolation", "ravel", "isolation_score", ".4f", "up", 0, 1, shared=False),
    )

    unit = "attribute"
    unit_key = "entity_attribute"
    unit_names: ClassVar[Mapping[str, str]] = {"disentanglement_score": "disentangle_score"}

    @classmethod
    def values_by_unit(cls, result: MetricResult, column: MetricColumn) -> UnitValues:
        """The values by attribute, weighted so that their mean equals the metric's number even if types have different
        numbers of attributes."""
        found = super().values_by_unit(result, column)
        type_of = {entry["entity_attribute"]: entry["entity_type"] for entry in result.details}
        sizes = Counter(type_of.values())
        weight = {name: len(type_of) / (len(sizes) * sizes[entity_type]) for name, entity_type in type_of.items()}
        return found._replace(values={name: value * weight[name] for name, value in found.values.items()})

    @property
    def by_type(self) -> dict[str, tuple[str, ...]]:
        """Entity type -> its attributes, in the order of the option."""
        found: dict[str, tuple[str, ...]] = {}
        for name in self.attributes:
            entity_type, _, attribute = name.partition(".")
            found[entity_type] = (*found.get(entity_type, ()), attribute)
        return found

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        version = facts_version(self.dataset, tuple(self.by_type), ctx.data)
        return {**super().settings(ctx), **ctx.logit_settings, **ctx.text_settings, "facts": version}

    def check(self) -> None:
        """Raise UsageError for an option out of range."""
        for entity_type, attributes in self.by_type.items():
            if len({*attributes}) < 2 or not all(attributes) or len({*attributes}) < len(attributes):
                raise UsageError(
                    f"{self.name}.attributes has {', '.join(f'{entity_type}.{a}' for a in attributes)}. Give two or "
                    "more different attributes of each entity type, such as city.Country,city.Language."
                )
        for option in (
            "top_n_entities", "num_pairs_per_attribute", "num_epochs", "batch_size", "n_generated_tokens",
            "min_known_prompts",
        ):  # fmt: skip
            if (value := getattr(self, option)) < 1:
                raise UsageError(f"{self.name}.{option}={value}: give 1 or more.")
        if not 0 < self.train_test_split < 1:
            raise UsageError(f"{self.name}.train_test_split={self.train_test_split}: give a share between 0 and 1.")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"{self.name}.learning_rate={self.learning_rate}: give a number above 0.")

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        self.check()
        known = [self.known_facts(ctx, entity_type, progress) for entity_type in self.by_type]
        self.require_facts(ctx, known)
        hooks = sorted({target.hook for target in targets})
        rows = [entity_rows(ctx, facts.prompts, hooks, progress) if facts.attributes else {} for facts in known]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for number, target in enumerate(targets):
            kept = tuple(kept_prompts(of_type[target.hook], target.norm_limit) if of_type else () for of_type in rows)
            groups.setdefault(kept, []).append(number)
        outcomes: dict[int, Outcome] = {}
        for kept, numbers in groups.items():
            found = self.measure_group(ctx, [targets[i] for i in numbers], known, rows, kept, progress)
            outcomes |= dict(zip(numbers, found, strict=True))
        return [outcomes[number] for number in range(len(targets))]

    def known_facts(self, ctx: EvalContext, entity_type: str, progress: Progress) -> KnownFacts:
        """Ask the model all questions about one type of entity. Questions that it answers wrong are left out."""
        attributes = self.by_type[entity_type]
        facts = load_facts(self.dataset, entity_type, attributes, ctx.data)
        prompts = make_prompts(ctx, facts, attributes)
        answer_NK = ask(ctx, prompts, self.n_generated_tokens, entity_type.replace("_", " "), progress)
        known = known_prompts(prompts, answer_NK, ctx.tokenizer, self.top_n_entities)
        asked = Counter(prompt.attribute for prompt in prompts)
        return KnownFacts.of(entity_type, asked, known, attributes, self.min_known_prompts)

    def require_facts(self, ctx: EvalContext, known: Sequence[KnownFacts]) -> None:
        """Raise SaeError unless at least one entity type has two attributes with enough right answers."""
        if not any(facts.attributes for facts in known):
            counts = "; ".join(refusal for facts in known for refusal in facts.refusals)
            raise SaeError(
                f"{ctx.model_name} knows too few facts for RAVEL. RAVEL needs two attributes of one entity type, and "
                f"for each of them {self.min_known_prompts} questions that the model answers right. The answers to "
                f"these questions must not all be the same. Found: {counts}. Use a model that knows more, or lower "
                f"{self.name}.min_known_prompts."
            )

    def measure_group(
        self,
        ctx: EvalContext,
        targets: Sequence[EvalTarget],
        known: Sequence[KnownFacts],
        rows: Sequence[dict[Hook, Tensor]],
        kept: Sequence[Sequence[int]],
        progress: Progress,
    ) -> list[Outcome]:
        """Measure a group of SAEs that use the same prompts."""
        outliers = sum(
            len(facts.prompts) - len(indices) for facts, indices in zip(known, kept, strict=True) if facts.attributes
        )
        chosen = [facts.select(indices, self.min_known_prompts) for facts, indices in zip(known, kept, strict=True)]
        try:
            self.require_facts(ctx, chosen)
        except SaeError as error:
            return [error] * len(targets)
        states = [RavelState(target) for target in targets]
        rng = random.Random(self.random_seed)
        sizes: Counter[str] = Counter()
        for facts, of_type, indices in zip(chosen, rows, kept, strict=True):
            of_hook = {hook: x_ND[list(indices)] for hook, x_ND in of_type.items()}
            for attribute in facts.attributes:
                pairs = draw_pairs(
                    facts.prompts, facts.attributes, attribute, self.num_pairs_per_attribute, self.train_test_split, rng
                )
                sizes.update(pairs_train=len(pairs.train), pairs_test=len(pairs.test))
                self.measure_attribute(ctx, states, facts, attribute, pairs, of_hook, progress)
        return [state.error or self.result(state, known, chosen, sizes, outliers) for state in states]

    def measure_attribute(
        self,
        ctx: EvalContext,
        states: Sequence[RavelState],
        facts: KnownFacts,
        attribute: str,
        pairs: PairSplit,
        rows: dict[Hook, Tensor],
        progress: Progress,
    ) -> None:
        """For each SAE, train and test a mask that changes `attribute`, and add the scores to the SAE's state."""
        what = f"{facts.entity_type}.{attribute}"
        train, test = (whole_batches(part, self.batch_size) for part in pairs)
        tested = [pair for batch in test for pair in batch]
        if not train or not tested:
            raise UsageError(
                f"{what} has {len(pairs.train)} training pairs and {len(pairs.test)} test pairs, but a batch "
                f"needs {self.batch_size}. Use a smaller {self.name}.batch_size, or more pairs."
            )
        working = [state for state in states if state.error is None]
        masks: list[Mask] = []
        for state in working:
            x_1D = rows[state.target.hook][:1].float()
            masks.append(Mask(state.target, state.target.sae.encode(x_1D).shape[-1], self.learning_rate, ctx.device))
        train_masks(ctx, masks, facts.prompts, rows, train, self.num_epochs, what, progress)
        for number, (state, mask) in enumerate(zip(working, masks, strict=True)):
            state.error = mask.error
            if mask.error is None:
                answers = answer_under(
                    ctx, mask, facts.prompts, rows[state.target.hook], tested, self.n_generated_tokens
                )
                scores = AttributeScores.of(
                    facts.entity_type, attribute, facts.prompts, tested, answers, describe_mask(mask)
                )
                state.scores.setdefault(facts.entity_type, []).append(scores)
            progress(number + 1, len(masks), f"SAEs tested on {what}")

    def result(
        self,
        state: RavelState,
        known: Sequence[KnownFacts],
        chosen: Sequence[KnownFacts],
        sizes: Counter[str],
        outliers: int,
    ) -> MetricResult:
        measured = {facts.entity_type: facts for facts in chosen if facts.attributes}
        n = {
            "questions": sum(sum(facts.asked.values()) for facts in known),
            "known_questions": sum(len(facts.prompts) for facts in measured.values()),
            "entities": sum(len({p.entity for p in facts.prompts}) for facts in measured.values()),
            "attributes": sum(len(facts.attributes) for facts in measured.values()),
            **sizes,
        }
        result = MetricResult.of(
            {"ravel": mean_scores(state.scores)},
            [scores.detail for of_type in state.scores.values() for scores in of_type],
            intervals={"ravel": score_intervals(state.scores, self.random_seed)},
            n=n,
            flags=list(self.flags(state, chosen)),
        )
        return result.without_outliers(outliers, n["known_questions"])

    def flags(self, state: RavelState, chosen: Sequence[KnownFacts]) -> Iterator[str]:
        if refusals := [refusal for facts in chosen for refusal in facts.refusals]:
            yield (
                f"Attributes are left out if the model knows fewer than {self.min_known_prompts} answers, if "
                f"all answers are the same, or if no other attribute is left: {'; '.join(refusals)}."
            )
        all_scores = [scores for of_type in state.scores.values() for scores in of_type]
        if empty := [f"{one.entity_type}.{one.attribute}" for one in all_scores if not one.latents["latents"]]:
            yield f"No latent was chosen for {', '.join(empty)}, so nothing was exchanged there."


@dataclass(frozen=True)
class RavelFacts(Ravel):
    """The same metric on a small set of facts about countries and cities. This metric needs no download.

    This metric has fewer questions and pairs, so the masks are trained for more epochs.
    """

    attributes: tuple[str, ...] = (
        "country.Continent", "country.Capital", "country.Language", "city.Country", "city.Continent", "city.Language",
    )  # fmt: skip
    num_pairs_per_attribute: int = 150
    num_epochs: int = 5

    dataset = FACTS
    saebench_rows = False
    name = "ravel_facts"
    title = "RAVEL on our own facts (cause: the attribute changes; isolation: the others stay)"


def kept_prompts(x_ND: Tensor, norm_limit: float | None) -> tuple[int, ...]:
    """The indices of the prompts in which the activation at the entity (N, D) is not an outlier row."""
    return tuple((~outlier_mask(x_ND, norm_limit)).nonzero()[:, 0].tolist())


def describe_mask(mask: Mask) -> dict[str, Any]:
    """The number of latents that a mask exchanges, and the latents with the largest mask weights."""
    most = mask.theta_F.detach().topk(min(TOP_LATENTS, mask.selected)).indices.tolist()
    return {"latents": mask.selected, "of_latents": len(mask.theta_F), "top_latents": most, "last_loss": mask.loss}
