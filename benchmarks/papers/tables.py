"""Tables of the comparison, generated from the records alone.

    python benchmarks/papers/tables.py > page.md

For each model: what was run, the two families of tests of design.md (KL score; the papers' own measures), the papers'
own readings, every system with mean and standard deviation over seeds, tuning, the frontier and stability. Tests are
those of evaluate/statistics.py; design.md says what they mean.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from jobs import LIKE_L0, choose_rate, load_design, make_jobs  # noqa: E402
from records import RECORDS, Known, survey, texts_of  # noqa: E402

from sae.evaluate.statistics import (  # noqa: E402
    LEVEL,
    Finding,
    PairedComparison,
    PairedDifferences,
    judge,
    mean_interval,
)

HIGHER = ("kl", "ce", "ev", "alive", "probe_k1", "probe_k16")  # better if higher; L0 has no better direction
NO_DIRECTION = ("l0",)
INACTIVE = "mechanism inactive"
COLUMNS = (
    "l0", "kl", "ev", "alive", "corr_mean", "corr_top", "absorption", "absorption_full", "probe_k1", "probe_k16",
)  # fmt: skip
OWN_BESIDE = ("kl", "ev", "absorption")  # for comparing a paper's own system with relu and with topk at its L0

Valid = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """One comparison a - b of one measure.

    Attributes:
        differences: one per seed, each the mean over layers; None if there are fewer than two.
        by_layer: layer -> differences by seed.
        open_layers: layers of the design that are left out of `differences` because a seed has no record there yet.
        l0: mean L0 of a and b.
        claim: lower, higher or equal, as the paper claims for a; "" if it claims nothing.
        why_not: why it is not tested.
        l0_shift: the change of the measure that the difference in L0 alone would cause, judged by the slope of the
        frontiers; None: unknown.
    """

    id: str
    a: str
    b: str
    measure: str
    claim: str
    differences: PairedDifferences | None
    by_layer: Mapping[int, Sequence[float]]
    l0: tuple[float, float] | None
    margin: float | None
    open_layers: Sequence[int] = ()
    why_not: str = ""
    l0_shift: float | None = None

    @property
    def at_another_l0(self) -> bool:
        """Whether the difference in L0 alone explains at least half of the difference that was found."""
        one = self.differences
        return one is not None and self.l0_shift is not None and abs(self.l0_shift) >= abs(one.mean) / 2 > 0

    @property
    def comparison(self) -> PairedComparison:
        better = "up" if self.measure in (*HIGHER, *NO_DIRECTION) else "down"
        return PairedComparison(None if self.why_not else self.differences, better, self.margin)


def values(valid: Valid, model: str, part: str, system: str, layer: int, measure: str) -> dict[int, float]:
    """Seed -> a measure of a system."""
    found, start = {}, f"{model}/{part}/{system}/L{layer}-s"
    for job, record in valid.items():
        if job.startswith(start) and "metrics" in record:
            value = record["metrics"].get(measure, {}).get("value")
            if value is not None:
                found[int(job.removeprefix(start))] = value
    return found


def make_line(
    design: Mapping[str, Any], valid: Valid, model: str, pair: Mapping[str, Any], measure: str, claim: str,
    why_not: str = "",
) -> Line:  # fmt: skip
    """A comparison, from the records that exist so far.

    For each seed, the difference is averaged over layers. While other layers than the main layer are unfinished, the
    average is over the layers on which all seeds of the main layer have been run.
    """
    own, about = pair.get("own", False), design["model"][model]
    layers = [about["main_layer"]] if own or measure.startswith("probe") else about["layers"]
    parts = ("own", pair.get("part_b", "own")) if own else ("middle", "middle")
    by_layer: dict[int, dict[int, float]] = {}
    for layer in layers:
        ours, theirs = (
            values(valid, model, part, pair[side], layer, measure) for part, side in zip(parts, "ab", strict=True)
        )
        by_layer[layer] = {seed: ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))}
    seeds = set(by_layer[about["main_layer"]])
    complete = [layer for layer in layers if seeds <= set(by_layer[layer])]
    whole = [mean(by_layer[layer][seed] for layer in complete) for seed in sorted(seeds)]
    l0s = [
        [one for layer in complete for one in values(valid, model, part, pair[side], layer, "l0").values()]
        for part, side in zip(parts, "ab", strict=True)
    ]
    l0 = (mean(l0s[0]), mean(l0s[1])) if all(l0s) else None
    if not why_not and l0 and not own and not 1 / LIKE_L0 <= l0[0] / l0[1] <= LIKE_L0:
        why_not = "not comparable: L0"
    if not why_not and (failed := failed_runs(valid, model, pair)):
        why_not = f"not comparable: {failed} failed"
    differences = PairedDifferences(whole, "seed") if len(whole) > 1 else None
    slope = None if own else l0_slope(design, valid, model, (pair["a"], pair["b"]), measure)
    shift = None if slope is None or l0 is None else slope * math.log(l0[0] / l0[1])
    return Line(
        pair["id"], pair["a"], pair["b"], measure, claim, differences,
        {layer: list(some.values()) for layer, some in by_layer.items()}, l0, design["margin"].get(measure),
        [layer for layer in layers if layer not in complete], why_not, shift,
    )  # fmt: skip


def l0_slope(design: Mapping[str, Any], valid: Valid, model: str, systems: Sequence[str], measure: str) -> float | None:
    """The slope of a measure over log L0, from the frontiers of these systems, or of all systems if these systems have
    none.

    It is the least-squares slope with an intercept for each system, as in evaluate/against.py.
    """
    known = [name for name, one in design["system"].items() if one.get("frontier")]
    about, x, y = design["model"][model], [], []
    for system in [name for name in known if name in systems] or known:
        points = []
        for l0 in about["frontier"]:
            record = valid.get(f"{model}/frontier/{system}/L{about['main_layer']}-l0_{l0:g}-s0", {})
            points.append(record.get("metrics", {}))
        points.append(valid.get(f"{model}/middle/{system}/L{about['main_layer']}-s0", {}).get("metrics", {}))
        found = [
            (math.log(one["l0"]["value"]), one[measure]["value"])
            for one in points
            if one.get("l0", {}).get("value") and one.get(measure, {}).get("value") is not None
        ]
        if len(found) > 1:
            middle = [mean(some) for some in zip(*found, strict=True)]
            x += [one - middle[0] for one, _ in found]
            y += [one - middle[1] for _, one in found]
    below = sum(one * one for one in x)
    return sum(one * other for one, other in zip(x, y, strict=True)) / below if below else None


def failed_runs(valid: Valid, model: str, pair: Mapping[str, Any]) -> int:
    starts = tuple(f"{model}/{part}/{pair[side]}/" for part in ("middle", "own") for side in "ab")
    return sum(job.startswith(starts) and "failed" in record for job, record in valid.items())


def pairs_of(design: Mapping[str, Any], model: str, own: bool) -> Iterator[Mapping[str, Any]]:
    for pair in design["pair"]:
        if model in pair.get("models", [model]) and pair.get("own", False) == own:
            yield pair


def families(
    design: Mapping[str, Any], known: Sequence[Known], valid: Valid, model: str
) -> dict[str, list[Line]]:  # fmt: skip
    """The lines about a model, grouped by family of tests."""
    idle = {one.job.system for one in known if one.state == "not needed" and one.job.model == model}

    def line(pair: Mapping[str, Any], measure: str, claim: str) -> Line:
        inactive = INACTIVE if pair.get("only_if_different") and pair["a"] in idle else ""
        return make_line(design, valid, model, pair, measure, claim, inactive)

    lines: dict[str, list[Line]] = {"K": [], "C": [], "O": []}
    for pair in pairs_of(design, model, own=False):
        if pair.get("kl", True):
            lines["K"].append(line(pair, "kl", ""))
        lines["C"] += [line(pair, measure, claim) for measure, claim in pair.get("claims", [])]
    for pair in pairs_of(design, model, own=True):
        if pair.get("kl", True):
            lines["O"].append(line(pair, "kl", pair.get("kl_claim", "")))
        lines["O"] += [line(pair, measure, claim) for measure, claim in pair.get("claims", [])]
    for name, one in design.get("own", {}).items():
        for beside in one.get("beside", []):
            pair = {"id": name, "a": name, "b": f"{name}-{beside}", "own": True, "part_b": "beside"}
            lines["O"] += [line(pair, measure, "") for measure in OWN_BESIDE]
    return lines


# --- in words ---------------------------------------------------------------------------------------------------------


def verdict(line: Line, found: Finding, tested: bool) -> str:
    """The verdict in the words of docs/reference/statistics.md, and whether it agrees with the paper's claim."""
    if line.why_not:
        return line.why_not
    if not tested or line.differences is None:
        return "not measured"
    word = found.verdict
    if word in ("better", "worse"):
        up = line.differences.mean > 0
        word_l0 = "higher" if up else "lower"
        text = word_l0 if line.measure in NO_DIRECTION else f"{word} ({word_l0})"
        if found.small:
            text += f", by less than {line.margin:g}"
        if line.claim:
            text += (
                "; as claimed" if line.claim == word_l0 else "; opposite" if line.claim != "equal" else "; not equal"
            )
        return text
    if word == "equivalent":
        return f"equivalent within ±{line.margin:g}" + ("; as claimed" if line.claim == "equal" else "")
    return word


def widened(one: PairedDifferences, comparisons: int) -> tuple[float, float]:
    """The interval of the mean at the Bonferroni-corrected level for this number of comparisons."""
    return mean_interval(one.values, 1 - LEVEL / max(1, comparisons)) if one.has_spread else one.interval


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"


def span(low_high: tuple[float, float] | None) -> str:
    return "" if low_high is None else f"{low_high[0]:+.4f} to {low_high[1]:+.4f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def family_table(lines: Sequence[Line]) -> list[str]:
    """The comparisons of a family. The correction is for the whole family, even if some comparisons are not measured
    yet or are not comparable. Only pairs whose mechanism is inactive leave the family."""
    tests = sum(line.why_not != INACTIVE for line in lines)
    findings = judge([line.comparison for line in lines], planned=tests)
    rows = []
    for line, found in zip(lines, findings, strict=True):
        one = line.differences
        layers = [f"L{layer} {mean(some):+.4f}" for layer, some in line.by_layer.items() if some]
        rows.append([
            line.id, f"{line.a} - {line.b}", line.measure, line.claim,
            "" if line.l0 is None else f"{line.l0[0]:.1f}, {line.l0[1]:.1f}",
            "" if one is None else f"{one.mean:+.4f}", "" if one is None else str(one.pairs),
            "" if one is None else span(widened(one, tests)), "" if one is None else span(one.interval),
            "" if found.p_value is None else f"{found.p_value:.4f}", number(found.detectable),
            "; ".join(layers) if len(layers) > 1 else "",
            verdict(line, found, line.comparison.is_test) + "; at another L0" * line.at_another_l0
            + f"; preliminary, without layer {' and '.join(map(str, line.open_layers))}" * bool(line.open_layers),
        ])  # fmt: skip
    heads = (
        "id", "a - b", "measure", "the paper says", "L0", "difference", "seeds", f"interval, corrected for {tests}",
        "95 %", "p (Holm)", "detectable", "by layer", "verdict",
    )  # fmt: skip
    return markdown(heads, rows)


def spread(some: Sequence[float]) -> str:
    if not some:
        return ""
    return number(mean(some)) + (f" ±{stdev(some):.4f}" if len(some) > 1 else "")


def systems_table(known: Sequence[Known], valid: Valid, model: str, part: str) -> list[str]:
    """Mean and standard deviation over seeds of every measure, by system and layer."""
    places = dict.fromkeys(
        (one.job.system, one.job.layer) for one in known if one.job.model == model and one.job.part == part
    )
    rows = []
    for system, layer in places:
        cells = [list(values(valid, model, part, system, layer, measure).values()) for measure in COLUMNS]
        if cells[0]:
            rows.append([system, str(layer), str(len(cells[0])), *map(spread, cells)])
    return markdown(("system", "layer", "seeds", *COLUMNS), rows)


def tuning_table(design: Mapping[str, Any], known: Sequence[Known], valid: Valid, model: str) -> list[str]:
    systems = dict.fromkeys(one.job.system for one in known if one.job.model == model and one.job.part == "tune")
    rows = []
    for system in systems:
        jobs = [one.job for one in known if (one.job.model, one.job.part, one.job.system) == (model, "tune", system)]
        cells = []
        for job in jobs:
            record = valid.get(job.id)
            if record is None or "failed" in record:
                cells.append("" if record is None else "failed")
            else:
                kl, l0 = (record["metrics"][name]["value"] for name in ("kl", "l0"))
                cells.append(f"{kl:.4f} (L0 {l0:.1f})")
        choice = choose_rate(design, model, system, valid)
        about = [] if choice is None else [f"{choice.rate:g}", *["end of the grid"] * choice.at_end]
        about += ["every L0 missed"] * bool(choice and choice.missed)
        rows.append([system, *cells, ", ".join(about)])
    return markdown(("system", *(f"{rate:g}" for rate in design["fixed"]["rates"]), "chosen"), rows)


def frontier_table(design: Mapping[str, Any], known: Sequence[Known], valid: Valid, model: str) -> list[str]:
    """KL score and EV of seed 0 at each L0."""
    about = design["model"][model]
    targets = sorted({*about["frontier"], about["l0"]})
    systems = dict.fromkeys(one.job.system for one in known if one.job.model == model and one.job.part == "frontier")
    rows = []
    for system in systems:
        cells = []
        for l0 in targets:
            place = f"L{about['main_layer']}-l0_{l0:g}-s0" if l0 != about["l0"] else f"L{about['main_layer']}-s0"
            part = "frontier" if l0 != about["l0"] else "middle"
            record = valid.get(f"{model}/{part}/{system}/{place}", {})
            found = [record["metrics"][name]["value"] for name in ("l0", "kl", "ev")] if "metrics" in record else []
            cells.append(f"{found[0]:.1f}: {found[1]:.4f}, {found[2]:.4f}" if found else "")
        rows.append([system, *cells])
    return markdown(("system; L0: KL score, EV", *map(str, targets)), rows) if rows else []


def stability_table(known: Sequence[Known], valid: Valid, model: str) -> list[str]:
    rows = []
    for one in known:
        record = valid.get(one.job.id, {})
        if one.job.model == model and one.job.part == "stability" and "metrics" in record:
            cells = [record["metrics"].get(name, []) for name in ("decoder_pw_mcc", "decoder_pw_mcc_null", "recurring")]
            rows.append([one.job.system, str(one.job.layer), *map(spread, cells)])
    return markdown(("system", "layer", "decoder PW-MCC", "null", "recurring"), rows)


def page(design: Mapping[str, Any], known: Sequence[Known], valid: Valid) -> list[str]:
    lines = ["# The comparison of the five papers: tables", "", "Made by `benchmarks/papers/tables.py` from records/."]
    texts = texts_of(valid)
    titles = {"K": "KL score, all pairs", "C": "The papers' own measures", "O": "The papers' own readings"}
    for model in design["model"]:
        some = [one for one in known if one.job.model == model]
        states = {state: sum(one.state == state for one in some) for state in ("done", "failed", "outdated", "open")}
        hours = sum(sum(valid[one.job.id]["seconds"].values()) for one in some if one.job.id in valid) / 3600
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        lines += ["", f"## {model}", "", f"{counts}; {hours:.2f} hours."]
        if len(texts.get(model, ())) > 1:
            lines += ["", "**The records are of several training texts, so their runs must not be compared.**"]
        for name, family in families(design, known, valid, model).items():
            lines += ["", f"### {titles[name]} (family {name})", "", *family_table(family)]
        for part, title in (("middle", "Systems at the middle L0"), ("also", "Other layers"), ("own", "Own readings")):
            lines += ["", f"### {title}", "", *systems_table(known, valid, model, part)]
        lines += [
            "",
            "### Other systems at the L0 of the own readings",
            "",
            *systems_table(known, valid, model, "beside"),
        ]
        lines += ["", "### Tuning: KL score on the tuning documents", "", *tuning_table(design, known, valid, model)]
        if frontier := frontier_table(design, known, valid, model):
            lines += ["", "### Frontier, one seed", "", *frontier]
        lines += ["", "### Stability", "", *stability_table(known, valid, model)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--design", type=Path, default=HERE / "design.toml")
    args = parser.parse_args()
    import group_topk  # noqa: F401  (registers its recipe, whose defaults are part of a record's digest)

    import sae.train.variants  # noqa: F401  (and the others)

    design = load_design(args.design)
    print(*page(design, *survey(design, make_jobs(design), args.records)), sep="\n")


if __name__ == "__main__":
    main()
