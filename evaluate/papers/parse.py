"""Read a paper's claims from its TOML file and check them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from ...common.errors import UsageError, did_you_mean
from ...common.files import parse_toml
from ..metrics.base import MODES
from .claims import (
    CLAIM_METRICS,
    PAPERS,
    SAME_NUMBER,
    TRAINING_LOG,
    Claim,
    ClaimSource,
    Contradiction,
    Paper,
    PaperFact,
    PaperSetup,
    PaperSystem,
    Reading,
    ReproductionSetup,
    Substitution,
    Unreported,
)
from .quotes import is_same_number, printed_numbers

CLAIMS_FOLDER = Path(__file__).parent
MAX_QUOTE = 160  # characters
UNITS = ("", "%", "pp", "x")
NESTED: Mapping[str, type[Any]] = {"also": ClaimSource, "substitutes": Substitution}  # arrays of tables inside a table
LISTS = ("fact", "reading", "system", "claim", "contradiction", "unreported")  # arrays of tables
Table = TypeVar("Table")


def load_paper(number: str) -> Paper:
    """The claims of a paper. Raises UsageError with all mistakes in its file."""
    if number not in PAPERS:
        raise UsageError(f"There is no paper {number}{did_you_mean(number, PAPERS)}")
    return parse_paper((CLAIMS_FOLDER / f"{number}.toml").read_text(encoding="utf-8"), f"papers/{number}.toml")


def parse_paper(text: str, name: str) -> Paper:
    """The claims in a TOML text; `name` is used in errors. Raises UsageError with all mistakes in the text."""
    tree = parse_toml(text, name)
    errors = check_keys(tree)
    paper = None if errors else build_paper(tree, errors)
    if paper is not None:
        errors += find_problems(paper, [system["id"] for system in tree.get("system", [])])
    if errors or paper is None:
        raise UsageError("\n".join([f"{name} is invalid:", *(f"  {error}" for error in errors)]))
    return paper


def check_keys(tree: Mapping[str, Any]) -> list[str]:
    """Errors about the top-level keys of a file."""
    types: dict[str, type] = {"number": str, "title": str, "mode": str, "ran": dict, "run": dict}
    types |= dict.fromkeys(LISTS, list)
    errors = [f"unknown key {key}{did_you_mean(key, types)}" for key in tree if key not in types]
    for key, kind in types.items():
        if not isinstance(tree.get(key, [] if kind is list else None), kind):
            errors.append(f"{key} is missing or not a {kind.__name__}.")
    return errors


def build_paper(tree: Mapping[str, Any], errors: list[str]) -> Paper | None:
    """The paper. If a table is invalid, adds the reasons to `errors` and returns None."""
    setup = build_table(PaperSetup, tree["ran"], "ran", errors)
    reproduction = build_table(ReproductionSetup, tree["run"], "run", errors)
    facts = build_tables(PaperFact, tree, "fact", errors)
    readings = build_tables(Reading, tree, "reading", errors)
    systems = build_tables(PaperSystem, tree, "system", errors)
    claims = build_tables(Claim, tree, "claim", errors)
    contradictions = build_tables(Contradiction, tree, "contradiction", errors)
    unreported = build_tables(Unreported, tree, "unreported", errors)
    if errors or setup is None or reproduction is None:
        return None
    return Paper(
        number=tree["number"],
        title=tree["title"],
        mode=tree["mode"],
        setup=setup,
        reproduction=reproduction,
        facts=facts,
        readings=readings,
        systems={system.id: system for system in systems},
        claims=tuple(replace(claim, layers=claim.layers or setup.layers) for claim in claims),
        contradictions=contradictions,
        unreported=unreported,
    )


def build_tables(kind: type[Table], tree: Mapping[str, Any], key: str, errors: list[str]) -> tuple[Table, ...]:
    """The valid tables of an array. Problems with the other tables are added to `errors`."""
    built = []
    for place, table in enumerate(tree.get(key, []), 1):
        label = f"{key} {table.get('id', place)}" if isinstance(table, dict) else key
        if (one := build_table(kind, table, label, errors)) is not None:
            built.append(one)
    return tuple(built)


def build_table(kind: type[Table], table: Any, label: str, errors: list[str]) -> Table | None:
    """A table as a dataclass. If it is invalid, adds the reasons to `errors` and returns None."""
    if not isinstance(table, dict):
        errors.append(f"{label} is not a table.")
        return None
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    before = len(errors)
    errors += [f"{label}: unknown key {key}{did_you_mean(key, known)}" for key in table if key not in known]
    for name, one in known.items():
        if name not in table and one.default is MISSING and one.default_factory is MISSING:
            errors.append(f"{label}: {name} is missing.")
        elif name in table and not has_type(table[name], one.type):
            errors.append(f"{label}: {name} = {table[name]!r} has the wrong type.")
    if len(errors) > before:
        return None
    for key, inner in NESTED.items():
        if key in known and key in table:
            inside = [build_table(inner, one, f"{label}, {key} {n}", errors) for n, one in enumerate(table[key], 1)]
            table = table | {key: inside}
    if len(errors) > before:
        return None
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})


def has_type(value: Any, kind: Any) -> bool:
    """Whether a TOML value has the annotated type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        item = dict if get_args(kind)[0] in NESTED.values() else get_args(kind)[0]
        return isinstance(value, list) and all(has_type(element, item) for element in value)
    if get_origin(kind) is Mapping:
        return isinstance(value, dict)
    if get_args(kind):
        return any(has_type(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def find_problems(paper: Paper, system_ids: Sequence[str]) -> Iterator[str]:
    """Sentences about contradictions between tables that are valid individually."""
    ids = [claim.id for claim in paper.claims]
    for name, names in (("system", system_ids), ("claim", ids), ("reading", [r.name for r in paper.readings])):
        yield from (f"Two tables of {name} have the name {one}." for one in sorted(set(names)) if names.count(one) > 1)
    if paper.mode not in MODES:
        yield f"mode = {paper.mode} is unknown. Expected {' or '.join(MODES)}."
    if not paper.readings:
        yield "There is no reading. Give at least one."
    for quote in paper.quotes():
        if len(quote) > MAX_QUOTE:
            yield f"A quote has {len(quote)} characters; at most {MAX_QUOTE} are allowed: {quote[:60]}..."
        if quote != " ".join(quote.split()):
            yield f"A quote may contain no white space except single spaces between words: {quote!r}"
    named = [(f"contradiction {one.what!r}", one.claims) for one in paper.contradictions]
    named += [
        (f"reading {r.name}, substitutes {one.what!r}", one.claims) for r in paper.readings for one in r.substitutes
    ]
    for label, claims in named:
        yield from (f"{label}: there is no claim {one}{did_you_mean(one, ids)}" for one in claims if one not in ids)
    for contradiction in paper.contradictions:
        yield from same_number_problems(contradiction, paper)
    for system in paper.systems.values():
        yield from ablation_problems(system, paper)
    for one in paper.unreported:
        yield from check_metric_name(one.metric, f"unreported {one.what}")
    for claim in paper.claims:
        yield from claim_problems(claim, paper)


def same_number_problems(contradiction: Contradiction, paper: Paper) -> Iterator[str]:
    """Errors if numbers of a contradiction are so close to each other that they count as the same number. Such numbers
    do not make a claim inconsistent."""
    groups: dict[tuple[Any, ...], list[Claim]] = {}
    for claim in paper.claims:
        if claim.id in contradiction.claims and claim.value is not None and not claim.is_change:
            groups.setdefault((claim.system, claim.metric, claim.entries, claim.unit), []).append(claim)
    for claims in groups.values():
        values = [claim.value for claim in claims if claim.value is not None]
        if len(claims) > 1 and max(values) - min(values) <= SAME_NUMBER * max(map(abs, values)):
            yield (
                f"contradiction {contradiction.what!r}: {' and '.join(f'{value:g}' for value in values)} "
                f"differ by at most {SAME_NUMBER:.0%}, so they count as the same number. Leave "
                f"{', '.join(claim.id for claim in claims)} out of its claims."
            )


def ablation_problems(system: PaperSystem, paper: Paper) -> Iterator[str]:
    """Errors in a system's `adds_to`, the id of its ablation: the system that lacks one of its mechanisms."""
    label = f"system {system.id}"
    if system.adds_to and system.adds_to not in paper.systems:
        yield f"{label}: adds_to: there is no system {system.adds_to}{did_you_mean(system.adds_to, paper.systems)}"
    passed, one = [system.id], system
    while one.adds_to in paper.systems:
        one = paper.systems[one.adds_to]
        if one.id in passed:
            yield f"{label}: adds_to leads back to {one.id}: {' -> '.join([*passed, one.id])}."
            break
        passed.append(one.id)


def claim_problems(claim: Claim, paper: Paper) -> Iterator[str]:
    label = f"claim {claim.id}"
    yield from check_metric_name(claim.metric, label)
    yield from words_problems(claim, label)
    yield from repetition_problems(claim, paper, label)
    if (claim.metric == "none") != bool(claim.why):
        yield f"{label}: give `why` (the reason that no metric measures it) if and only if metric = none."
    if claim.metric != "none" and not claim.system:
        yield f"{label}: a measured claim needs a system. Choose from {', '.join(paper.systems)}."
    for system in filter(None, (claim.system, claim.against)):
        if system not in paper.systems:
            yield f"{label}: there is no system {system}{did_you_mean(system, paper.systems)}"
    for quote in (claim.quote, *(source.quote for source in claim.also)):
        value = claim.value
        if value is not None and not any(
            is_same_number(number, value, claim.is_change) for number, _ in printed_numbers(quote)
        ):
            yield f"{label}: its quote does not contain the value {value:g}: {quote}"
    if not set(claim.layers) <= set(paper.setup.layers):
        yield f"{label}: layers {claim.layers} are not all among the paper's {paper.setup.layers}."
    yield from unit_problems(claim, paper, label)


def words_problems(claim: Claim, label: str) -> Iterator[str]:
    """Problems with a comparison in words, or with a missing number."""
    if claim.value is None and not claim.says:
        yield f"{label}: give a value. If the paper compares in words alone, give says = more, less or equal."
    if claim.says and (claim.value is not None or claim.against_value is not None):
        yield f"{label}: says = {claim.says} is a comparison in words. Leave out value and against_value."
    if claim.says and not claim.against and claim.metric != "none":
        yield f"{label}: says = {claim.says} needs `against`, the system that it is compared with."
    if (claim.margin is not None) != (claim.says == "equal"):
        yield f"{label}: give a margin (the largest difference at which the two are equal) if and only if says = equal."
    if claim.margin is not None and not claim.margin > 0:
        yield f"{label}: margin = {claim.margin:g} is not positive."
    if claim.margin is not None and claim.unit == "x":
        yield f"{label}: a margin is a difference. Give it in %, in pp, or in the metric's own unit."


def repetition_problems(claim: Claim, paper: Paper, label: str) -> Iterator[str]:
    """Problems with `restates` and `copy_of`."""
    if claim.restates and claim.copy_of:
        yield f"{label}: it has both restates = {claim.restates} and copy_of = {claim.copy_of}. Leave one out."
    by_id = {other.id: other for other in paper.claims}
    for key in ("restates", "copy_of"):
        if not (name := getattr(claim, key)):
            continue
        if (other := by_id.get(name)) is None or other is claim:
            yield f"{label}: {key}: there is no other claim {name}{did_you_mean(name, by_id)}"
        elif other.restates or other.copy_of:
            yield f"{label}: {key} = {name} is itself a repetition. Name {other.restates or other.copy_of} instead."
        elif key == "restates" and (claim.metric, claim.entries) != (other.metric, other.entries):
            yield f"{label}: it restates {name}, which is about {subject(other)}, not {subject(claim)}."
        elif key == "restates" and {claim.system, claim.against} != {other.system, other.against}:
            yield (
                f"{label}: it restates {name}, which is about {other.system} and {other.against or 'no other system'}."
            )
        elif key == "copy_of" and not is_nearly(claim.value, other.value):
            yield f"{label}: copy_of = {name}, but the two numbers differ by more than {SAME_NUMBER:.0%}."


def subject(claim: Claim) -> str:
    """What a claim is about, worded as part of a sentence."""
    return f"{claim.metric} of {', '.join(claim.entries)}" if claim.entries else claim.metric


def is_nearly(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) <= SAME_NUMBER * max(abs(one), abs(other))


def unit_problems(claim: Claim, paper: Paper, label: str) -> Iterator[str]:
    """Problems with a claim's unit and with its `against_value`, the number of the other system."""
    if claim.unit not in UNITS:
        yield f"{label}: unknown unit {claim.unit}. Omit it, or give one of {', '.join(UNITS[1:])}."
    if claim.is_change and not claim.unit and claim.value is not None and claim.metric != "none":
        yield f"{label}: a change against {claim.against} needs a unit (%, pp or x) or an against_value."
    if claim.unit in ("pp", "x") and not claim.is_change and not claim.says:
        yield f"{label}: {claim.unit} is the unit of a change. Give `against`, and no against_value."
    if claim.against_value is not None and not any(
        (other.system, other.metric, other.entries, other.value, other.unit)
        == (claim.against, claim.metric, claim.entries, claim.against_value, claim.unit)
        for other in paper.claims
    ):
        yield f"{label}: no claim about {claim.against or 'a system'} has the value {claim.against_value:g}."


def check_metric_name(metric: str, label: str) -> Iterator[str]:
    """Yield an error unless `metric` is `none`, or names a number that a metric reports or a scalar that training
    logs."""
    if metric != "none" and not metric.startswith(f"{TRAINING_LOG}.") and metric not in CLAIM_METRICS:
        yield (
            f"{label}: unknown metric {metric}. Expected a number of a metric, {TRAINING_LOG}.<scalar>, or none"
            f"{did_you_mean(metric, CLAIM_METRICS)}"
        )
