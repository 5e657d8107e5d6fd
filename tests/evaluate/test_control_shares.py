"""How much of a number a control has, by hand; where that is not said; and which controls are named in a note."""

import json
from pathlib import Path

import pytest

from sae.cache.layout import Hook
from sae.evaluate.control_shares import SHARE_NOTE, control_notes, share, share_lines
from sae.evaluate.controls import conditions_digest, conditions_of, distinct_names
from sae.evaluate.metrics.base import EvalTarget, MetricColumn, MetricResult
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.reference_saes import Zero
from sae.evaluate.rows import EvalRow
from sae.evaluate.tables import notes, tables

from ..run_records import write_run_record

IMPORTED = {"format": "saelens", "sha256": {}, "path": "folder"}
UP, DOWN = (MetricColumn("one", "c", "n", better=better, floor=0.5, ceiling=1) for better in ("up", "down"))


@pytest.mark.parametrize(
    ("run", "control", "expected"), [(0.9, 0.7, 0.5), (0.9, 0.9, 1.0), (0.6, 0.7, 2.0), (0.75, 0.45, -0.2)]
)
def test_a_share_by_hand(run: float, control: float, expected: float) -> None:
    """Of what the run has above the floor of 0.5."""
    assert share(run, control, UP) == pytest.approx(expected)


def test_there_is_no_share_of_what_is_not_above_a_floor() -> None:
    assert share(0.5, 0.7, UP) is None and share(0.4, 0.7, UP) is None
    assert share(0.52, 0.51, UP, half=0.021) is None and share(0.52, 0.51, UP, half=0.019) == pytest.approx(0.5)
    assert share(0.9, 0.7, DOWN) is None
    assert share(0.9, 0.7, MetricColumn("one", "c", "n", better="up")) is None
    assert share(0.9, 0.7, MetricColumn("one", "c", "n", floor=0.5)) is None
    assert share(0.9, 0.7, MetricColumn("one", "c", "n", better="up", floor=0.5, shared=False)) is None
    columns = [column for name in ("ravel", "stability") for column in METRICS[name].columns]
    assert {one.name for one in columns if one.better and one.shared} == {"disentanglement_score", "recurring"}


def row(
    name: str, conditions: str = "x", *, reference: bool = False, control: bool = False, **numbers: float
) -> EvalRow:
    """A row with L0, EV, KL, correlation, alive, and the accuracy of one latent; `_half` is half an interval."""
    places = {
        "l0": ("core", "sparsity", "l0"),
        "ev": ("core", "reconstruction_quality", "fve"),
        "kl": ("core", "model_behavior_preservation", "kl_div_with_sae"),
        "alive": ("core", "misc_metrics", "frac_alive"),
        "k1": ("sparse_probing_stdlib", "sae", "sae_top_1_test_accuracy"),
        "llm": ("sparse_probing_stdlib", "llm", "llm_top_1_test_accuracy"),
    }
    results: dict[str, MetricResult] = {}
    for key, value in numbers.items():
        if key.endswith("_half"):
            continue
        metric, category, number = places[key]
        result = results.setdefault(metric, MetricResult({}))
        result.metrics.setdefault(category, {})[number] = value
        if half := numbers.get(f"{key}_half"):
            result.intervals.setdefault(category, {})[number] = [value - half, value + half]
    target = EvalTarget(Zero(), Hook(0), reference=reference)
    return EvalRow(name, target, results=results, conditions=conditions, is_control=control)


def control(name: str, conditions: str = "x", **numbers: float) -> EvalRow:
    return row(name, conditions, reference=True, control=True, **numbers)


COLUMNS = [(metric, column) for metric in ("core", "sparse_probing_stdlib") for column in METRICS[metric].columns]


def shares_of(line: list[str]) -> dict[str, str]:
    """Heading -> share, for the columns that have one."""
    return {column.heading: cell for (_, column), cell in zip(COLUMNS, line[1:], strict=True) if cell}


def test_a_line_for_each_system_and_each_of_its_controls() -> None:
    """Means over seeds; only controls of the same conditions; not L0, KL, alive or the model's own accuracy."""
    seeds = [
        row(f"topk-s{n}", l0=32, ev=ev, kl=0.1, alive=0.9, k1=k1, llm=0.9)
        for n, (ev, k1) in enumerate([(0.8, 0.72), (0.9, 0.68)])
    ]
    systems = {
        "topk": seeds,
        "relu": [row("relu", "y", ev=0.5)],
        "pca-32": [row("pca-32", "", reference=True, ev=0.6)],
        "frozen": [control("frozen", l0=32, ev=0.34, kl=0.5, alive=1.0, k1=0.69, llm=0.9)],
        "soft": [row(f"soft-s{n}", control=True, ev=ev) for n, ev in enumerate([0.80, 0.73])],
        "other": [control("other", "z", ev=0.3)],
    }
    lines = share_lines(systems, COLUMNS)
    assert [line[0] for line in lines] == ["share of topk that frozen has", "share of topk that soft has"]
    assert shares_of(lines[0]) == {"EV": "40%", "SAE k=1": "95%"}  # 0.34 / 0.85 and 0.19 / 0.20
    assert shares_of(lines[1]) == {"EV": "90%"}
    assert share_lines({"imported": [row("imported", "", ev=0.9)], "odd": [control("odd", "", ev=0.1)]}, COLUMNS) == []


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


def test_a_control_that_is_as_good_or_better_is_named_with_both_numbers() -> None:
    """A difference counts from half the interval of two independent numbers on: sqrt(.03^2 + .04^2) = .05."""
    run = row("topk", l0=32, ev=0.80, ev_half=0.03, kl=0.20, k1=0.70, alive=0.9, llm=0.8)
    near = control("near", l0=32, ev=0.751, ev_half=0.04, kl=0.21, k1=0.60, alive=1.0, llm=0.8)
    (note,) = control_notes(run, [run, near])
    assert note.startswith("topk cannot be told from a control, or is below it, in core EV (0.8000; near 0.7510). ")
    far = control("far", l0=32, ev=0.749, ev_half=0.04, kl=0.21, k1=0.60)
    assert control_notes(run, [run, far]) == []
    better = control("better", l0=32, ev=0.9, kl=0.20, k1=0.70)
    (note,) = control_notes(run, [near, better, far])
    assert "in core KL (0.2000; better 0.2000); core EV (0.8000; better 0.9000); sparse_probing_stdlib SAE k=1" in note
    for one in (control("other", "y", l0=32, ev=0.9), row("pca-32", "", reference=True, ev=0.9)):
        assert control_notes(run, [run, one]) == []
    assert control_notes(better, [run, better, near]) == []


def test_a_control_of_another_l0_on_the_text_is_named() -> None:
    run = row("topk", l0=32, ev=0.8)
    for l0, count in ((29.2, 0), (35.1, 0), (28.9, 1), (35.3, 1)):
        found = control_notes(run, [control("c", l0=l0, ev=0.1)])
        assert len(found) == count, l0
    assert found == ["c has L0 35.3 on this text and topk 32.0: the shares include the effect of that difference."]


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
    """The width is 512. Without an L0, after --stream and after an import there are no controls."""
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
