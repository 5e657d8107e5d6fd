"""What the five papers claim, as data, and the verdict on each claim beside what was measured.

`claims/NNN.toml` holds one paper: every number that it claims as a result (`claim`), what it says it ran (`ran`, `fact`),
what we run to reproduce it (`run`), which of our recipes its systems are (`system`) and in which units they are read
(`reading`; the first is the one for the paper's own model), where it contradicts itself (`contradiction`), and what it
says that it measures without a number (`unreported`). Every statement stands on a quote of at most a line.

A claim is a number as printed, of one system and one metric. With `against` it sets two systems against each other:
either both have a number (`against_value` is the other's), or the value is the change from the one to the other, in the
form that its unit says: % of the other, pp between two shares, x times the other. Signs of changes are ours where the
paper writes them in words.
"""

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from ...common.errors import UsageError, did_you_mean
from ..metrics.base import MODES
from ..metrics.registry import METRICS

PAPERS = ("000", "001", "002", "003", "004")
CLAIMS_FOLDER = Path(__file__).parent
MAX_QUOTE = 160  # characters of a quote
TRAINING_LOG = "training"  # the first word of a metric that is a scalar of metrics.jsonl
UNITS = ("", "%", "pp", "x")
# What results of mode 2024-12 hold beside the columns of tables, as far as claims read it, and which way is better.
# `details` are the entries by letter or dataset, `n` what was counted.
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
}
CLAIM_METRICS = EXTRA_METRICS | {
    f"{name}.{number.category}.{number.name}": number.better for name, m in METRICS.items() for number in m.columns
}


@dataclass(frozen=True)
class ClaimSource:
    """Where else a number stands."""

    where: str
    quote: str


@dataclass(frozen=True)
class PaperSetup:
    """What the paper says it ran. `steps` follows from its own numbers; 0 where it says that nothing was trained."""

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
    k: int | None = None
    runs: int | None = None  # seeds, or attempts

    @property
    def peak_reached(self) -> bool:
        """Whether the learning rate came to its peak."""
        return self.steps > 0 and self.steps >= (self.warmup or 0)


@dataclass(frozen=True)
class ReproductionSetup:
    """What we run to reproduce it, at the paper's size."""

    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    dataset: str


@dataclass(frozen=True)
class PaperFact:
    """A number of the paper that is no result."""

    what: str
    quote: str


@dataclass(frozen=True)
class Reading:
    """Options that settle a paper's units, for each of its recipes that has them; a system's own go before these."""

    name: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    literal: bool = False


@dataclass(frozen=True)
class PaperSystem:
    """One of the paper's systems as recipes of ours: one, or several of which a claim has to hold alike.

    None at all is the language model by itself.
    """

    id: str
    recipes: tuple[str, ...]
    width: str = ""  # as for --width
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """One number."""

    id: str  # unique within the paper
    where: str  # section, or table with row and column
    quote: str
    value: float
    metric: str  # metric.category.name, training.<scalar of metrics.jsonl>, or none
    unit: str = ""  # as printed: a number, % , pp or x
    system: str = ""
    against: str = ""  # another system
    against_value: float | None = None
    layers: tuple[int, ...] = ()  # of the paper's, unless it says which
    entries: tuple[str, ...] = ()  # of a result's details: letters or datasets, averaged; none are all
    over: Literal["mean", "max"] = "mean"  # how entries become one number
    at: Literal["first", "last"] = "last"  # line of metrics.jsonl
    reading: str = ""  # of an ambiguity, and of units
    why: str = ""  # no metric of ours speaks to it
    also: tuple[ClaimSource, ...] = ()

    @property
    def better(self) -> str:
        """The metric's: up or down, or nothing for a number that is neither."""
        return CLAIM_METRICS.get(self.metric, "")

    @property
    def is_change(self) -> bool:
        """Whether the value itself is what one system has over another."""
        return bool(self.against) and self.against_value is None

    @property
    def target(self) -> float:
        """The value in the unit in which it is measured: that of the metric, of a change the printed one."""
        return self.value / 100 if self.unit == "%" and not self.is_change else self.value

    @property
    def effect(self) -> float | None:
        """How far the paper sets the system above the other: as a share of the other's number, or the printed change."""
        if self.against_value is not None:
            return (self.value - self.against_value) / abs(self.against_value)
        return self.value - (self.unit == "x") if self.is_change else None

    @property
    def rounding(self) -> float:
        """Half of the last printed digit, in the unit of `target`: what rounds to the value is the value."""
        places = max(
            places
            for number, places in printed_numbers(self.quote)
            if is_same_number(number, self.value, self.is_change)
        )
        return 0.5 * 10.0**-places * (self.target / self.value if self.value else 1)


@dataclass(frozen=True)
class Contradiction:
    """Where the paper speaks against itself; `claims` are those on which there can be no other verdict."""

    what: str
    quotes: tuple[str, ...]
    follows: str
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreported:
    """What the paper says that it measures, and gives no number for."""

    what: str
    quote: str
    metric: str


@dataclass(frozen=True)
class Paper:
    number: str
    title: str
    mode: str  # of `sae evaluate`, whose definitions the metrics' names mean
    ran: PaperSetup
    run: ReproductionSetup
    facts: tuple[PaperFact, ...]
    readings: tuple[Reading, ...]
    systems: Mapping[str, PaperSystem]
    claims: tuple[Claim, ...]
    contradictions: tuple[Contradiction, ...]
    unreported: tuple[Unreported, ...]

    def inconsistent(self, claim: Claim) -> bool:
        return any(claim.id in contradiction.claims for contradiction in self.contradictions)

    def quotes(self) -> Iterator[str]:
        """Every line that the paper is said to hold."""
        for one in (*self.facts, *self.unreported, *self.claims):
            yield one.quote
        yield from (place.quote for claim in self.claims for place in claim.also)
        yield from (quote for contradiction in self.contradictions for quote in contradiction.quotes)


# --- reading ----------------------------------------------------------------------------------------------------------

Table = TypeVar("Kind")
TABLE_TYPES = {
    "fact": PaperFact, "reading": Reading, "system": PaperSystem, "claim": Claim, "contradiction": Contradiction,
    "unreported": Unreported,
}  # fmt: skip


def load_paper(number: str) -> Paper:
    """The claims of a paper. UsageError lists everything that is wrong with its file, at once."""
    if number not in PAPERS:
        raise UsageError(f"There is no paper {number}{did_you_mean(number, PAPERS)}")
    return parse_paper((CLAIMS_FOLDER / f"{number}.toml").read_text(encoding="utf-8"), f"claims/{number}.toml")


def parse_paper(text: str, name: str) -> Paper:
    wrong: list[str] = []
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is no TOML: {error}.") from error
    known = {"number": str, "title": str, "mode": str, "ran": dict, "run": dict, **dict.fromkeys(TABLE_TYPES, list)}
    wrong += [f"{key} is no key{did_you_mean(key, known)}" for key in tree if key not in known]
    for key, kind in known.items():
        if not isinstance(tree.get(key, [] if kind is list else None), kind):
            wrong.append(f"{key} is missing, or no {kind.__name__}.")
    found: dict[str, list[Any]] = {key: [] for key in TABLE_TYPES}
    if not wrong:
        single = [
            build_table(PaperSetup, tree["ran"], "ran", wrong),
            build_table(ReproductionSetup, tree["run"], "run", wrong),
        ]
        for key, kind in TABLE_TYPES.items():
            tables = tree.get(key, [])
            named = [f"{key} {one.get('id', place)}" if isinstance(one, dict) else key for place, one in enumerate(tables, 1)]  # fmt: skip
            found[key] = [build_table(kind, one, label, wrong) for one, label in zip(tables, named, strict=True)]
    if not wrong:
        systems = {system.id: system for system in found["system"]}
        paper = Paper(
            tree["number"], tree["title"], tree["mode"], *single, tuple(found["fact"]), tuple(found["reading"]),
            systems, tuple(with_default_layers(claim, single[0].layers) for claim in found["claim"]),
            tuple(found["contradiction"]), tuple(found["unreported"]),
        )  # fmt: skip
        wrong += find_problems(paper, [system.id for system in found["system"]])
    if wrong:
        raise UsageError("\n".join([f"{name} cannot be read:", *(f"  {sentence}" for sentence in wrong)]))
    return paper


def with_default_layers(claim: Claim, layers: tuple[int, ...]) -> Claim:
    return Claim(**{f.name: getattr(claim, f.name) for f in fields(Claim)} | {"layers": claim.layers or layers})


def build_table(kind: type[Table], table: Any, label: str, wrong: list[str]) -> Table:
    """The dataclass of a table; what is wrong with it is added to `wrong`, and it is not to be used then."""
    if not isinstance(table, dict):
        wrong.append(f"{label} is no table.")
        return None  # type: ignore[return-value]
    kinds = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    before = len(wrong)
    wrong += [f"{label}: {key} is no key{did_you_mean(key, kinds)}" for key in table if key not in kinds]
    for name, one in kinds.items():
        if name not in table and one.default is MISSING and one.default_factory is MISSING:
            wrong.append(f"{label}: {name} is missing.")
        elif name in table and not has_type(table[name], one.type):
            wrong.append(f"{label}: {name} = {table[name]!r} is of the wrong type.")
    if len(wrong) > before:
        return None  # type: ignore[return-value]
    if kind is Claim and "also" in table:
        places = [build_table(ClaimSource, one, f"{label}, also {n}", wrong) for n, one in enumerate(table["also"], 1)]
        table = table | {"also": places}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value of TOML is of an annotated type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        one = dict if get_args(kind)[0] is ClaimSource else get_args(kind)[0]
        return isinstance(value, list) and all(has_type(element, one) for element in value)
    if get_origin(kind) is Mapping:
        return isinstance(value, dict)
    if get_args(kind):
        return any(has_type(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def find_problems(paper: Paper, system_ids: Sequence[str]) -> Iterator[str]:
    """What is wrong with a paper whose tables are all of the right form, in sentences."""
    ids = [claim.id for claim in paper.claims]
    for name, names in (("system", system_ids), ("claim", ids), ("reading", [r.name for r in paper.readings])):
        yield from (f"Two of {name} are called {one}." for one in sorted(set(names)) if names.count(one) > 1)
    if paper.mode not in MODES:
        yield f"mode = {paper.mode} is unknown: {' or '.join(MODES)}."
    if not paper.readings:
        yield "There is no reading, so no units to train in."
    for quote in paper.quotes():
        if len(quote) > MAX_QUOTE:
            yield f"A quote has {len(quote)} characters, and a line has {MAX_QUOTE}: {quote[:60]}..."
        if quote != " ".join(quote.split()):
            yield f"A quote has other white space than single spaces between words: {quote!r}"
    for contradiction in paper.contradictions:
        yield from (
            f"contradiction {contradiction.what!r}: there is no claim {one}{did_you_mean(one, ids)}"
            for one in contradiction.claims
            if one not in ids
        )
    for one in paper.unreported:
        yield from check_metric_name(one.metric, f"unreported {one.what}")
    for claim in paper.claims:
        yield from claim_problems(claim, paper)


def claim_problems(claim: Claim, paper: Paper) -> Iterator[str]:
    label = f"claim {claim.id}"
    yield from check_metric_name(claim.metric, label)
    if (claim.metric == "none") != bool(claim.why):
        yield f"{label}: `why` says why no metric of ours speaks to it, where metric = none and only there."
    if claim.metric != "none" and not claim.system:
        yield f"{label}: what is measured is of a system; give one of {', '.join(paper.systems)}."
    for system in filter(None, (claim.system, claim.against)):
        if system not in paper.systems:
            yield f"{label}: there is no system {system}{did_you_mean(system, paper.systems)}"
    for quote in (claim.quote, *(place.quote for place in claim.also)):
        if not any(is_same_number(number, claim.value, claim.is_change) for number, _ in printed_numbers(quote)):
            yield f"{label}: the value {claim.value:g} does not stand in its quote: {quote}"
    if claim.unit not in UNITS:
        yield f"{label}: the unit {claim.unit} is unknown; leave it out, or give one of {', '.join(UNITS[1:])}."
    if claim.is_change and not claim.unit and claim.metric != "none":
        yield f"{label}: a change against {claim.against} is in %, pp or x; give the unit, or against_value."
    if claim.unit in ("pp", "x") and not claim.is_change:
        yield f"{label}: {claim.unit} is the unit of a change; give `against`, and no against_value."
    if claim.against_value is not None and not any(
        (other.system, other.metric, other.entries, other.value, other.unit)
        == (claim.against, claim.metric, claim.entries, claim.against_value, claim.unit)
        for other in paper.claims
    ):
        yield f"{label}: against_value = {claim.against_value:g} is no claim about {claim.against or 'a system'}."
    if not set(claim.layers) <= set(paper.ran.layers):
        yield f"{label}: layers {claim.layers} are not all among the paper's {paper.ran.layers}."


def check_metric_name(metric: str, label: str) -> Iterator[str]:
    """Nothing, for `none`, a number of our metrics, or a scalar that training logs."""
    if metric != "none" and not metric.startswith(f"{TRAINING_LOG}.") and metric not in CLAIM_METRICS:
        yield f"{label}: {metric} is no number of a metric of ours, no {TRAINING_LOG}.<scalar>, and not none{did_you_mean(metric, CLAIM_METRICS)}"


NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-−+])?(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s*(?:×|\\times)\s*10\^\{?(?P<power>[-−]?\d+)\}?)?"
)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def printed_numbers(quote: str) -> list[tuple[float, int]]:
    """The numbers of a line, and how many decimals each is printed with.

    1,735 is one number; 5.4x, 3.5×, 82.4% and ±0.0002 are what stands before or after the sign; a hyphen between
    numbers is no minus; 3×10^{-4} is one number, of 4 decimals.
    """
    found = []
    for match in NUMBER.finditer(quote):
        digits = match["digits"].replace(",", "")
        power = int((match["power"] or "0").replace("−", "-"))
        sign = -1 if match["sign"] in ("-", "−") else 1
        found.append((sign * float(f"{digits}e{power}"), len(digits.partition(".")[2]) - power))
    words = re.findall(r"[a-z]+", quote.lower())
    return found + [(float(NUMBER_WORDS.index(word)), 0) for word in words if word in NUMBER_WORDS]


def is_same_number(number: float, value: float, either_sign: bool = False) -> bool:
    """Whether a printed number is the value; of a change the words say the sign."""
    return math.isclose(number, value, rel_tol=1e-9) or (either_sign and math.isclose(number, -value, rel_tol=1e-9))
