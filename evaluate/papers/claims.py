"""The claims of the five papers, as data.

`NNN.toml` describes one paper. Every statement comes with a quote of at most one line. The tables are:

- `claim`: every number that the paper claims as a result
- `ran`, `fact`: the setup that it states
- `run`: the runs that reproduce it
- `system`: our recipes for one of its systems
- `reading`: one way to interpret the paper, as options of our recipes; the first is the default on the paper's model
- `contradiction`: a contradiction within the paper
- `unreported`: quantities that the paper says it measured, but for which it states no number

A claim is a printed number for one system and one metric. If `against` is given, the claim compares two systems: either
both systems have a number (`against_value` is the number of the other system), or the value is the change relative to
the other system. The unit of a change is % (of the other system's number), pp (percentage points between two shares) or
x (a multiple of the other system's number). If the paper expresses the sign of a change in words, the sign of the value
was added here. If the paper compares in words alone, `says` takes the place of the number: it is the direction, or
"equal" for a difference within `margin`, which was fixed in the file before anything was measured.

A paper often states one comparison several times. A claim that `restates` another is judged but not counted again. A
claim whose number is only a copy of another system's number (`copy_of`) is not judged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..metrics.registry import METRICS
from .quotes import is_same_number, printed_numbers

PAPERS = ("000", "001", "002", "003", "004")
FIELD = "field"  # our own reading, not the paper's
TRAINING_LOG = "training"  # metrics named training.<scalar> are scalars of metrics.jsonl
STEP_TIME = "cost.step_time"  # the time of one training step of a recipe, from step_times.json
SAME_NUMBER = 0.05  # two numbers that differ by at most this share count as the same number, also in verdicts
# Numbers of mode 2024-12 that claims refer to but tables do not show, with the better direction. `details` are the
# entries per letter or dataset; `n` are counts.
EXTRA_METRICS = {
    "core.reconstruction_quality.mse": "down",
    "core.reconstruction_quality.explained_variance": "up",
    "core.sparsity.l1": "",
    "core.sparsity.activation_variance": "",
    "core.correlation.spearman_decoder": "",
    "absorption.details.absorption_rate": "down",
    "absorption.n.letters": "",
    "sparse_probing.details.sae_test_accuracy": "up",
    "sparse_probing.llm.llm_top_50_test_accuracy": "up",
    "sparse_probing.sae.sae_top_10_test_accuracy": "up",
    "sparse_probing.sae.sae_top_20_test_accuracy": "up",
    "sparse_probing.sae.sae_top_50_test_accuracy": "up",
    STEP_TIME: "down",
}
CLAIM_METRICS = EXTRA_METRICS | {
    f"{name}.{number.category}.{number.name}": number.better for name, m in METRICS.items() for number in m.columns
}


@dataclass(frozen=True)
class ClaimSource:
    """Another place in the paper that states the same number."""

    where: str
    quote: str


@dataclass(frozen=True)
class PaperSetup:
    """The setup that the paper states. `steps` is derived from the paper's numbers; it is 0 if the paper says that
    nothing was trained."""

    model: str  # as printed
    reads_as: str
    site: str
    layers: tuple[int, ...]
    d_in: int
    d_sae: int
    dataset: str
    context: int
    batch_size: int
    steps: int
    lr: float
    l1: float
    optimizer: str
    tokens: int | None = None  # as printed
    warmup: int | None = None
    weight_decay: float | None = None
    weight_decay_on: Literal["encoder", "all"] | None = None
    weight_decay_form: Literal["decoupled", "coupled"] | None = None
    clip: float | None = None  # limit of the gradient's norm
    k: int | None = None
    runs: int | None = None  # seeds, or attempts

    @property
    def peak_reached(self) -> bool:
        """Whether training was long enough for the learning rate to reach its peak."""
        return self.steps > 0 and self.steps >= (self.warmup or 0)

    def optimization(self) -> dict[str, Any]:
        """The options of the optimizer that implement the printed settings.

        All other options are off, because no paper states a decay of the learning rate or an initial value of b_dec.
        """
        return {
            "lr": self.lr,
            "warmup": self.warmup or 0,
            "decay_start": 1.0,
            "weight_decay": self.weight_decay or 0.0,
            "weight_decay_on": self.weight_decay_on or "encoder",
            "weight_decay_form": self.weight_decay_form or "decoupled",
            "clip": self.clip,
            "b_dec_init": "zero",
        }


@dataclass(frozen=True)
class ReproductionSetup:
    """The runs that reproduce a paper's experiments at full size."""

    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    dataset: str


@dataclass(frozen=True)
class PaperFact:
    """A number that the paper states, but not as a result."""

    what: str
    quote: str


@dataclass(frozen=True)
class Substitution:
    """The replacement of one of the paper's equations by a different equation, in one reading of the paper (`Reading`).
    `what` is a clause that says what is done instead, and `why` is the reason. Notes on `claims` mention the
    replacement. Under that reading, the verdict on these claims is never `contradicted` or `reproduced`."""

    claims: tuple[str, ...]
    what: str
    why: str


@dataclass(frozen=True)
class Reading:
    """One way to interpret a paper, as a set of options. Each option is set in those recipes of the paper that have it,
    unless a system's own options override it.

    The reading `field` is our own. All others follow the paper: in these readings, runs are also trained with the
    printed schedule, weight decay and clipping (`PaperSetup.optimization`), unless `options` override them.
    """

    name: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    literal: bool = False
    steps: int | None = None  # training steps, on any model; None: the steps of `run`
    batch_size: int | None = None  # tokens, on any model; None: as in `run` (`field` on other models: as in the recipe)
    substitutes: tuple[Substitution, ...] = ()

    @property
    def is_papers(self) -> bool:
        """Whether the runs of this reading are trained with the settings that the paper prints."""
        return self.name != FIELD

    def substitutions(self, claim: "Claim") -> list[Substitution]:
        """The substitutions that affect a claim."""
        return [one for one in self.substitutes if claim.id in one.claims]


@dataclass(frozen=True)
class PaperSystem:
    """One of the paper's systems, expressed as our recipes.

    If there are several recipes, a claim must hold for each of them. A system without recipes is the language model
    itself.
    """

    id: str
    recipes: tuple[str, ...]
    width: str = ""  # as in --width
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    adds_to: str = ""  # the system without one of this system's mechanisms (its ablation)
    counter: str = ""  # the scalar of metrics.jsonl with the total number of the mechanism's actions


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about one system and one metric: a number, or a comparison in words."""

    id: str  # unique within the paper
    where: str  # its place in the paper: a section, or a table with row and column
    quote: str
    value: float | None = None  # absent with `says`
    metric: str = ""  # metric.category.name, training.<scalar of metrics.jsonl>, cost.step_time, or none
    unit: str = ""  # as printed: none, %, pp or x
    system: str = ""
    against: str = ""  # another system
    against_value: float | None = None
    layers: tuple[int, ...] = ()  # default: all layers of the paper
    entries: tuple[str, ...] = ()  # letters or datasets in a result's details (default: all)
    over: Literal["mean", "max"] = "mean"  # how the entries are reduced to one number
    at: Literal["first", "last"] = "last"  # the line of metrics.jsonl that is read
    reading: str = ""  # how an ambiguity or a unit is interpreted
    why: str = ""  # why none of our metrics measures it
    also: tuple[ClaimSource, ...] = ()
    says: Literal["", "more", "less", "equal"] = ""  # for a claim in words: how the measured number compares
    margin: float | None = None  # for `equal`: in `unit`, or in the metric's own unit if `unit` is empty
    restates: str = ""  # the claim whose comparison this claim repeats, as a change or in another section
    copy_of: str = ""  # the claim about another system whose number the paper repeats here

    @property
    def better(self) -> str:
        """The better direction of the metric: "up", "down" or "" if there is none."""
        return CLAIM_METRICS.get(self.metric, "")

    @property
    def is_change(self) -> bool:
        """Whether the value is the difference or ratio of two systems."""
        return bool(self.against) and self.against_value is None and not self.says

    @property
    def target(self) -> float | None:
        """The value in the metric's unit; if the claim states a change, in the unit in which the paper prints the
        change. None for a claim in words."""
        if self.value is None:
            return None
        return self.value / 100 if self.unit == "%" and not self.is_change else self.value

    @property
    def claimed(self) -> str:
        """The claim as a table shows it: the printed number with its unit, or the comparison in words."""
        unit = f" {self.unit}" if self.unit else ""
        if self.says == "equal" and self.metric != "none":
            return f"equal, within {self.margin:g}{unit}"
        return self.says or f"{self.value:g}{unit}"

    @property
    def direction(self) -> int:
        """1 if the system's number is claimed to be above the other system's, -1 if it is claimed to be below, 0
        otherwise.

        Two printed numbers that differ by one unit of their last digit may be equal, so they have no direction.
        """
        if self.says:
            return {"more": 1, "less": -1, "equal": 0}[self.says]
        change = self.effect if self.value is None or self.against_value is None else self.value - self.against_value
        if change is None or self.is_within_rounding:
            return 0
        return (change > 0) - (change < 0)

    @property
    def is_within_rounding(self) -> bool:
        """Whether the two printed numbers can be the same number, rounded up in one place and down in the other."""
        if self.value is None or self.against_value is None:
            return False
        scale = abs(self.target / self.value) if self.target and self.value else 1.0
        return abs(self.value - self.against_value) * scale <= 2 * self.rounding * (1 + 1e-9)

    @property
    def effect(self) -> float | None:
        """By how much the system exceeds the other system: the printed change, or a share of the other system's number.
        None if there is no other system, if the claim is in words alone, or if the other system's number is 0."""
        if self.value is None:
            return None
        if self.against_value is not None:
            return (self.value - self.against_value) / abs(self.against_value) if self.against_value else None
        return self.value - (self.unit == "x") if self.is_change else None

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit, in the unit of `target`. Numbers that round to the value agree with
        it."""
        if self.value is None or self.target is None:
            return 0.0
        places = max(
            places
            for number, places in printed_numbers(self.quote)
            if is_same_number(number, self.value, self.is_change)
        )
        return 0.5 * 10.0**-places * (self.target / self.value if self.value else 1)


@dataclass(frozen=True)
class Contradiction:
    """A place where the paper contradicts itself. The verdict on the claims in `claims` is "paper inconsistent"."""

    what: str
    quotes: tuple[str, ...]
    follows: str
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreported:
    """A quantity that the paper says it measured, but for which it states no number."""

    what: str
    quote: str
    metric: str


@dataclass(frozen=True)
class Paper:
    """Everything in a paper's TOML file."""

    number: str
    title: str
    mode: str  # the option --mode of `sae evaluate`: the definitions of the metrics
    setup: PaperSetup  # the table `ran` in the file
    reproduction: ReproductionSetup  # the table `run` in the file
    facts: tuple[PaperFact, ...]
    readings: tuple[Reading, ...]
    systems: Mapping[str, PaperSystem]
    claims: tuple[Claim, ...]
    contradictions: tuple[Contradiction, ...]
    unreported: tuple[Unreported, ...]

    def inconsistent(self, claim: Claim) -> bool:
        return any(claim.id in contradiction.claims for contradiction in self.contradictions)

    def is_counted(self, claim: Claim) -> bool:
        """Whether a claim counts by itself, because it neither restates another claim nor copies its number."""
        return not claim.restates and not claim.copy_of

    def quotes(self) -> Iterator[str]:
        """Every line that is quoted from the paper."""
        yield from (fact.quote for fact in self.facts)
        yield from (one.quote for one in self.unreported)
        yield from (claim.quote for claim in self.claims)
        yield from (source.quote for claim in self.claims for source in claim.also)
        yield from (quote for contradiction in self.contradictions for quote in contradiction.quotes)
