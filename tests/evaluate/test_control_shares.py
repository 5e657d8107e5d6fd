"""The share of a run's number that its control reaches, worked by hand, and the notes on runs and their controls."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from sae.cache.hooks import Hook
from sae.cli.main import app
from sae.common.schemas import RUN_RECORD, SAE_RECORD
from sae.evaluate.compare import compare_runs
from sae.evaluate.control_notes import KnownVerdicts, best_control, control_notes, unlike_l0
from sae.evaluate.control_shares import SHARE_NOTE, controls_of, find_share, share_lines
from sae.evaluate.controls import base_of, conditions_digest, conditions_of, distinct_names
from sae.evaluate.metrics.base import EvalTarget, MetricColumn, MetricResult
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.reference_saes import Zero
from sae.evaluate.rows import EvalRow
from sae.evaluate.statistics import fieller_interval
from sae.evaluate.tables import notes, tables

from ..run_records import change_record, write_run_record
from .test_compare import make_run as make_compared

IMPORTED = {"format": "saelens", "sha256": {}, "path": "folder"}
EV = next(column for column in METRICS["core"].columns if column.name == "fve")
K1 = next(c for c in METRICS["sparse_probing_stdlib"].columns if c.name == "sae_top_1_test_accuracy")  # floor 0.5


def of(*values: float, name: str = "r", reference: bool = False) -> dict[int, EvalRow]:
    """A system with one number per run; each value is the run of one seed."""
    return {n: row(f"{name}-s{n}", reference=reference, k1=value) for n, value in enumerate(values)}


def ratio(ours: float, theirs: float, column: MetricColumn = K1) -> float | None:
    """The share of one run's number that another reaches, for runs without values by unit."""
    found = find_share(of(ours), of(theirs), "sparse_probing_stdlib", column)
    assert found is None or found.interval is None
    return found and found.part


@pytest.mark.parametrize(
    ("run", "control", "expected"), [(0.9, 0.7, 0.5), (0.9, 0.9, 1.0), (0.6, 0.7, 2.0), (0.75, 0.45, -0.2)]
)
def test_a_share_by_hand(run: float, control: float, expected: float) -> None:
    """The share is taken of the run's number above the floor of 0.5."""
    assert ratio(run, control) == pytest.approx(expected)


def test_there_is_no_share_of_what_is_not_above_a_floor() -> None:
    assert ratio(0.5, 0.7) is None and ratio(0.4, 0.7) is None
    for half, expected in ((0.021, None), (0.019, "50%")):
        found = find_share({0: row("r", k1=0.52, k1_half=half)}, of(0.51), "sparse_probing_stdlib", K1)
        assert (found and str(found)) == expected
    seeds = {n: row(f"r-s{n}", k1=0.52, k1_half=half) for n, half in enumerate((0.03, 0.019))}
    assert find_share(seeds, {2: row("c", k1=0.51)}, "sparse_probing_stdlib", K1) is None  # no seed in common
    for changes in ({"better": "down"}, {"floor": None}, {"better": ""}, {"shared": False}):
        assert ratio(0.9, 0.7, replace(K1, **changes)) is None
    for category in ("llm", "misc_metrics"):
        assert ratio(0.9, 0.7, replace(K1, category=category)) is None
    assert find_share(of(0.9), {0: row("none", ev=0.5)}, "sparse_probing_stdlib", K1) is None
    columns = [column for name in ("ravel", "stability") for column in METRICS[name].columns]
    assert {one.name for one in columns if one.better and one.shared} == {"disentanglement_score", "recurring"}


def test_a_share_has_the_interval_over_what_is_paired() -> None:
    """Pairs are documents or seeds; a reference is one fixed SAE, which is paired with every seed."""
    ours, theirs = [0.8, 0.6, 0.9, 0.7], [0.5, 0.4, 0.6, 0.45]
    found = find_share({0: row("r", ev=ours)}, {0: row("c", ev=theirs)}, "core", EV)
    assert found.part == pytest.approx(sum(theirs) / sum(ours)) and found.interval == fieller_interval(theirs, ours)
    assert re.fullmatch(r"65% \(\d\d to \d\d\)", str(found))
    seeds = find_share(of(0.9, 0.92, 0.91), of(0.7, 0.71, 0.72, 0.4), "sparse_probing_stdlib", K1)
    assert seeds.part == pytest.approx(0.63 / 1.23) and seeds.interval is not None
    fixed = find_share(of(0.9, 0.92, 0.91), of(0.7, reference=True), "sparse_probing_stdlib", K1)
    assert fixed.interval == pytest.approx(fieller_interval([0.2] * 3, [0.4, 0.42, 0.41]))
    assert find_share(of(0.9, 0.52, 0.6), of(0.7, 0.7, 0.7), "sparse_probing_stdlib", K1) is None  # above 0.5 by chance


def row(
    name: str, conditions: str = "x", *, reference: bool = False, control: bool = False, base: str = "batchtopk",
    **numbers: float | list[float],
) -> EvalRow:  # fmt: skip
    """A row with L0, EV, KL, alive and the accuracy of one latent; `<name>_half` is half the width of its interval.

    A number of core can be a list of its values by document.
    """
    places = {
        "l0": ("core", "sparsity", "l0"),
        "ev": ("core", "reconstruction_quality", "fve"),
        "kl": ("core", "model_behavior_preservation", "kl_div_score"),
        "alive": ("core", "misc_metrics", "frac_alive"),
        "k1": ("sparse_probing_stdlib", "sae", "sae_top_1_test_accuracy"),
        "llm": ("sparse_probing_stdlib", "llm", "llm_top_1_test_accuracy"),
    }
    results: dict[str, MetricResult] = {}
    for key, value in numbers.items():
        if key.endswith("_half"):
            continue
        metric, category, number = places[key]
        extra = {"text": "t", "unit": "document", "values": {}}
        result = results.setdefault(metric, MetricResult({}, extra=extra))
        if isinstance(value, list):
            result.extra["values"][number] = value
            value = sum(value) / len(value)
        result.metrics.setdefault(category, {})[number] = value
        if half := numbers.get(f"{key}_half"):
            result.intervals.setdefault(category, {})[number] = [value - half, value + half]
    target = EvalTarget(Zero(), Hook(0), reference=reference)
    return EvalRow(name, target, results=results, conditions=conditions, is_control=control, base=base)


def control(name: str, conditions: str = "x", **numbers: float | list[float] | str) -> EvalRow:
    return row(name, conditions, reference=True, control=True, **numbers)


COLUMNS = [(metric, column) for metric in ("core", "sparse_probing_stdlib") for column in METRICS[metric].columns]


def shares_of(line: list[str]) -> dict[str, str]:
    """A mapping from heading to share, for the columns with a share."""
    return {column.heading: cell for (_, column), cell in zip(COLUMNS, line[1:], strict=True) if cell}


def alone(*rows: EvalRow) -> dict[str, dict[str, EvalRow]]:
    return {one.name: {one.name: one} for one in rows}


def test_a_line_for_each_system_and_each_of_its_controls() -> None:
    """Only controls trained under the same conditions get a line; L0, alive and the model's accuracy get no share."""
    seeds = {
        n: row(f"topk-s{n}", l0=32, ev=ev, alive=0.9, k1=k1, llm=0.9)
        for n, (ev, k1) in enumerate([(0.84, 0.71), (0.85, 0.70), (0.86, 0.69)])
    }
    systems = {
        "topk": seeds,
        **alone(row("relu", "y", ev=0.5), row("pca-32", "", reference=True, ev=0.6)),
        **alone(control("frozen", l0=32, ev=0.34, alive=1.0, k1=0.69, llm=0.9), control("other", "z", ev=0.3)),
        "soft": {n: row(f"soft-s{n}", control=True, ev=ev) for n, ev in enumerate([0.76, 0.765])},
    }
    lines = share_lines(systems, COLUMNS)
    assert [line[0] for line in lines] == ["share of topk that frozen has", "share of topk that soft has"]
    assert {head: cell.split()[0] for head, cell in shares_of(lines[0]).items()} == {"EV": "40%", "SAE k=1": "95%"}
    assert shares_of(lines[1])["EV"].startswith("90% (")  # over the seeds that exist for both
    assert share_lines(alone(row("imported", "", ev=0.9), control("odd", "", ev=0.1)), COLUMNS) == []


def test_controls_of_its_own_base_stand_for_a_run_where_there_are_any() -> None:
    plain, own = control("frozen-4", ev=0.4), control("frozen-topk-4", base="topk", ev=0.2)
    for base, expected in (("topk", ["frozen-topk-4"]), ("batchtopk", ["frozen-4"])):
        run = row("run", base=base, ev=0.8)
        assert list(controls_of({0: run}, alone(run, plain, own))) == expected
        assert list(controls_of({0: run}, alone(run, plain))) == ["frozen-4"]


def test_a_table_has_these_lines_below_its_rows_and_a_note_says_what_they_are() -> None:
    rows = [
        row("topk", l0=32, ev=0.8),
        row("zero", "", reference=True, ev=-0.1),
        control("frozen-decoder-32", l0=32, ev=0.6),
    ]
    ((_, heads, lines),) = tables(rows)
    assert [line[0] for line in lines] == [
        "topk",
        "zero",
        "frozen-decoder-32",
        "share of topk that frozen-decoder-32 has",
    ]
    assert dict(zip(heads, lines[-1], strict=True))["EV ↑\n0..1"] == "75%"
    assert notes(rows)[-1] == SHARE_NOTE
    assert SHARE_NOTE not in notes(rows[:2]) + notes(rows[2:])


def test_flags_that_differ_in_the_letters_they_list_are_one_note() -> None:
    rows = [row(name, ev=0.8) for name in "abc"]
    for one, flag in zip(
        rows, ["2 fail (below 0.5: a, b)", "1 fail (below 0.5: z)", "3 fail (below 0.5: c, d, e)"], strict=True
    ):
        one.results["core"].flags.append(flag)
    assert notes(rows) == ["core, a and 2 more: 2 fail (below 0.5: a, b)"]
    rows[2].results["core"].flags[0] = "3 fail (below 0.5: words)"
    assert notes(rows) == ["core, a and 1 more: 2 fail (below 0.5: a, b)", "core, c: 3 fail (below 0.5: words)"]


WAVE = [0.01, -0.02, 0.015, -0.005]  # deviations of a number in four documents


def values(mean: float, spread: float = 0.0) -> list[float]:
    return [mean + wave + spread * sign for wave, sign in zip(WAVE, (1, 1, -1, -1), strict=True)]


def note_of(run: EvalRow, *controls: EvalRow, known: KnownVerdicts = {}) -> list[str]:  # noqa: B006
    return control_notes(alone(run, *controls), COLUMNS, known).get(run.name, [])


def test_the_words_of_a_note_are_the_verdicts_of_paired_tests() -> None:
    """Both intervals are wide, but the paired test finds a difference of 0.01, which is similar in every document."""
    run = row("topk", l0=32, ev=values(0.80), ev_half=0.1, kl=values(0.7), k1=0.70, alive=0.9, llm=0.8)
    below = control("frozen", l0=32, ev=values(0.79, 1e-4), ev_half=0.1, kl=values(0.6, 1e-4), alive=1.0, llm=0.8)
    assert note_of(run, below) == []
    (note,) = note_of(run, control("frozen", l0=32, ev=values(0.81, 1e-4), kl=values(0.69, 0.05), k1=0.60, llm=0.9))
    assert note == (
        "topk against its best control: better in 0 of 2 tested numbers; worse in EV ↑ (0.8000; frozen 0.8100); "
        "not distinguishable in KL score ↑ (0.7000; frozen 0.6900). A number that a control also reaches does not show "
        "learned features."
    )
    (note,) = note_of(run, control("frozen", ev=values(0.8), kl=values(0.7001, 2e-4)))
    assert (
        "equivalent in KL score ↑" in note
        and "same in every pair in EV ↑" in note
        and "better in 0 of 2 tested" in note
    )
    (note,) = note_of(run, control("frozen", ev=values(0.81, 1e-4), kl=values(0.6, 1e-4)))
    assert "better in 1 of 2 tested numbers; worse in EV ↑ (0.8000; frozen 0.8100). " in note and "KL" not in note
    for one in (control("other", "y", ev=values(0.9)), row("pca-32", "", reference=True, ev=values(0.9))):
        assert note_of(run, one) == []
    assert note_of(below, run) == []  # controls have no note


def test_a_number_that_cannot_be_tested_is_named_where_the_control_is_as_good() -> None:
    """One run without values by document cannot be tested; a note appears only if the control is not below it."""
    run = row("topk", ev=0.80, k1=0.70)
    assert note_of(run, control("frozen", ev=0.7, k1=0.60)) == []
    for ev in (0.80, 0.81):
        (note,) = note_of(run, control("frozen", ev=ev, k1=0.60))
        assert note.startswith(
            f"topk against its best control: not tested, and no better, in EV ↑ (0.8000; frozen {ev:.4f}). "
        )


def test_a_system_is_set_against_the_best_of_its_controls_in_each_number() -> None:
    run = row("topk", ev=values(0.80), kl=values(0.7))
    first = control("a", ev=values(0.9, 1e-4), kl=values(0.8, 1e-4))
    other = control("b", ev=values(0.85, 1e-4), kl=values(0.9, 1e-4))
    (note,) = note_of(run, first, other)
    assert "better in 0 of 2 tested numbers; worse in KL score ↑ (0.7000; b 0.9000), EV ↑ (0.8000; a 0.9000). " in note
    found = best_control("topk", {0: run}, alone(first, other), "core", replace(EV, better="down"))
    assert found.control == "b" and best_control("topk", {0: run}, {}, "core", EV) is None


def test_the_level_is_shared_by_all_numbers_of_a_note() -> None:
    """A difference with p = 0.01 is significant alone but not among many comparisons."""
    ours, theirs = [0.80, 0.81, 0.79, 0.80], [0.79, 0.79, 0.78, 0.787]
    run, weak = row("topk", ev=ours), control("c", ev=theirs)
    assert 0.005 < ttest_rel(ours, theirs).pvalue < 0.05
    assert note_of(run, weak) == []
    many = {f"run{n}": {0: row(f"run{n}", ev=ours)} for n in range(12)}
    found = control_notes({**many, "c": {"c": weak}}, COLUMNS, {})
    assert "not distinguishable in EV" in found["run3"][0]


def test_a_note_says_what_a_table_says_of_the_same_pair() -> None:
    run, other = row("topk", ev=values(0.80)), control("frozen", ev=values(0.7, 1e-4))
    assert note_of(run, other) == []
    for pair, verdict, said in (
        (("topk", "frozen"), "not distinguishable", "not distinguishable in EV"),
        (("frozen", "topk"), "not distinguishable", "not distinguishable in EV"),
        (("frozen", "topk"), "better", "worse in EV"),
        (("topk", "other"), "worse", None),
        (("frozen", "topk"), "worse", None),
    ):
        found = note_of(run, other, known={(*pair, "core", EV): verdict})
        assert (said in found[0]) if said else found == [], (pair, verdict)


def test_several_seeds_of_both_are_paired_by_seed_and_have_one_note() -> None:
    def system(name: str, *scores: float, **changes: bool) -> dict[int, EvalRow]:
        return {n: row(f"{name}-s{n}", ev=score, **changes) for n, score in enumerate(scores)}

    ours = system("topk", 0.70, 0.80, 0.90)
    for theirs, expected in (
        (system("frozen", 0.601, 0.70, 0.80, control=True), None),
        (
            system("frozen", 0.72, 0.75, 0.88, control=True),
            "topk against its best control: better in 0 of 1 tested number",
        ),
        (system("frozen", 0.65, control=True, reference=True), "not distinguishable in EV ↑ (0.8000; frozen 0.6500)"),
    ):
        found = control_notes({"topk": ours, "frozen": theirs}, COLUMNS, {})
        assert (expected in found["topk"][0]) if expected else not found, expected
    uneven = {"uneven": of(0.9, 0.5), "even": of(0.8, 0.8)}
    assert best_control("topk", of(0.9), uneven, "sparse_probing_stdlib", K1).control == "even"


def test_a_control_of_another_l0_on_the_text_is_named() -> None:
    """The L0 of a system is the mean over its seeds."""
    runs = {n: row(f"topk-s{n}", l0=l0, ev=0.8) for n, l0 in enumerate((30.0, 34.0))}
    for l0, count in ((29.2, 0), (35.1, 0), (28.9, 1), (35.3, 1)):
        found = list(unlike_l0("topk", runs, {"c": {0: control("c", l0=l0, ev=0.1)}}))
        assert len(found) == count, l0
    assert found == ["c has L0 35.3 on this text and topk 32.0: the shares include the effect of that difference."]
    both = note_of(row("topk", l0=32, ev=values(0.8)), control("c", l0=16, ev=values(0.9, 1e-4)))
    assert len(both) == 2 and "worse in EV" in both[0] and "c has L0 16.0 on this text" in both[1]


def test_a_control_that_trained_to_the_same_sae_is_named() -> None:
    """In a short run, no decoder row turns far enough for the limit of the soft-frozen decoder to act."""
    run = row("topk", l0=32, ev=values(0.8), k1=0.7, alive=0.9, llm=0.9)
    same, other = (
        control("soft", l0=32, ev=values(0.8), k1=0.7, alive=1.0, llm=0.9),
        control("hard", l0=32, ev=values(0.8), k1=0.6),
    )
    (first, second) = note_of(run, same, other)
    assert "same in every pair in EV" in first
    assert second == (
        "soft has the same value as topk in every number: its frozen part never had an effect in training, so it is "
        "not a control. Train both longer."
    )
    assert len(note_of(row("topk", l0=32), control("soft", l0=32))) == 0  # only L0 was measured
    (note,) = note_of(row("topk", ev=0.8), control("soft", ev=0.8))  # a single number can be equal by chance
    assert note.startswith("topk against its best control: not tested, and no better, in EV")


def test_the_same_verdict_in_the_table_of_against_and_in_the_note(tmp_path) -> None:
    """The difference is significant alone, but not among the three comparisons of the table; the note says the same."""
    runs = [make_compared(tmp_path, seed=n, kl=kl) for n, kl in enumerate((0.90, 0.80, 0.70))]
    frozen = [make_compared(tmp_path, "frozen-decoder", seed=n, kl=kl) for n, kl in enumerate((0.893, 0.789, 0.692))]
    for folder in frozen:
        change_record(SAE_RECORD, folder / "sae.json", lambda record: record["origin"].update(variant="frozen-decoder"))
    others = [make_compared(tmp_path, "relu", seed=n, kl=0.5 + n / 7) for n in range(3)]
    others += [make_compared(tmp_path, "gated", seed=n, kl=0.6 + n / 9) for n in range(3)]
    for folder in others:
        change_record(RUN_RECORD, folder / "run.json", {"steps": 999})

    def printed(*words: str) -> str:
        done = CliRunner().invoke(app, ["compare", *map(str, [*runs, *frozen, *others]), *words])
        assert done.exit_code == 0, done.output
        return done.output

    assert "against its best control" not in printed()
    labels = [system.label for system in compare_runs([*runs, *frozen, *others]).systems]
    topk, frozen_label = labels[0], labels[1]
    out = [tmp_path / f"all.{ending}" for ending in ("json", "html")]
    shown = printed("--against", frozen_label, "--out", str(out[0]), "--out", str(out[1]))
    line = next(line for line in shown.splitlines() if line.strip(" │┃|").startswith(topk) and "KL score" in line)
    assert "not distinguishable" in line
    sentence = f"{topk} against its best control: better in 0 of 1 tested number; not distinguishable in KL score"
    assert shown.count(sentence) == 1
    assert f"note     {frozen_label} is a control: a part of it kept its random initial weights" in shown
    assert out[1].read_text().count(sentence) == 1
    noted = [any(sentence in note for note in record["notes"]) for record in json.loads(out[0].read_text())]
    assert noted == [True] * 3 + [False] * 9
    turned = printed("--against", topk)
    assert "is a control" not in turned and sentence in turned


def write_run(folder: Path, log: list[float] | None = None, **changes: object) -> Path:
    folder.mkdir(parents=True)
    write_run_record(folder, **changes)
    if log is not None:
        lines = [json.dumps({"step": n, "l0": l0}) for n, l0 in enumerate(log)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "l0')
    return folder


@pytest.mark.parametrize(
    ("changes", "log", "l0"),
    [
        ({"l0": 16.0, "resolved": {"k": 4}}, None, 16),
        ({"resolved": {"k": 4, "l0": None}}, [7], 4),
        ({"resolved": {"l0": 2.5}}, [7], 2.5),
        ({"resolved": {"l0": None}}, [90, 7.6], 8),
        ({}, [0.2], 1),
        ({}, [1000], 512),
        ({}, None, None),
        ({"l0": 16.0, "ring": 4}, None, None),
        (
            {"l0": 16.0, "imported_from": IMPORTED, **dict.fromkeys(("steps", "batch_size", "order_seed", "cache"))},
            None,
            None,
        ),
    ],
)
def test_the_l0_of_a_run_is_what_it_was_asked_for_or_ended_at(tmp_path, changes, log, l0) -> None:
    """The width is 512. Runs without an L0, with --stream or from an import have no controls."""
    found = conditions_of(write_run(tmp_path / "run", log, **changes))
    assert found is None if l0 is None else found is not None and found["l0"] == l0


def test_conditions_are_shared_by_runs_that_differ_in_recipe_and_seed_alone(tmp_path) -> None:
    def digest(**changes: object) -> str:
        folder = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), **{"l0": 32.0, **changes})
        return conditions_digest(conditions_of(folder))

    assert digest() == digest(variant="relu", seed=3, options={"lr": 1e-3}) != ""
    changes = [
        {"l0": 33.0}, {"d_sae": 1024}, {"steps": 11}, {"batch_size": 64}, {"layer": 5}, {"site": "mlp_out"},
        {"order_seed": 1}, {"cache": "1" * 64},
    ]  # fmt: skip
    assert len({digest(), *(digest(**one) for one in changes)}) == 1 + len(changes)
    assert conditions_digest(None) == ""


def test_controls_of_one_name_are_told_apart() -> None:
    first, wider, longer = {"d_sae": 64, "steps": 5}, {"d_sae": 128, "steps": 5}, {"d_sae": 64, "steps": 6}
    assert distinct_names(["a-8", "b-8"], [first, first]) == ["a-8", "b-8"]
    assert distinct_names(["a-8", "a-8", "b-8"], [first, wider, first]) == ["a-8-n64", "a-8-n128", "b-8"]
    names = distinct_names(["a-8", "a-8", "a-8"], [first, wider, longer])
    assert names[1] == "a-8-n128" and names[0] != names[2]
    assert names[0] == f"a-8-n64-{conditions_digest(first)[:6]}"


def test_the_base_of_controls_is_the_recipe_of_the_run_where_there_is_one() -> None:
    for variant, options, base in (
        ("topk", {}, "topk"),
        ("batchtopk", {}, "batchtopk"),
        ("jumprelu", {}, "batchtopk"),
        ("frozen-encoder", {}, "batchtopk"),
        ("frozen-encoder", {"base": "topk"}, "topk"),
    ):
        assert base_of({"variant": variant, "options": options}) == base
    assert base_of(None) == "batchtopk"
