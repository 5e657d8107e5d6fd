"""Dealing SAEs to ranks: each SAE once, systems kept together, and the longest share as short as possible."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from sae.cache.reader import Cache
from sae.cli.evaluate import ranks_lines
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate import deal
from sae.evaluate.deal import RATE, REFERENCES, Unit, deal_work, describe_deal, ordered_units, split
from sae.evaluate.measure import no_progress_bar
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.ranks import Measured, join, measure_share
from sae.evaluate.run import evaluate, run_evaluation
from sae.train.sae import save_sae

from ..run_records import write_run_record
from .metrics.test_stability import make_sae


def units(*seconds: float) -> list[Unit]:
    return [Unit((Path(str(place)),), ("core",), seconds=one) for place, one in enumerate(seconds)]


def loads(shares) -> list[float]:
    return [sum(unit.seconds for unit in share) for share in shares]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "seconds", [(3, 1, 1, 1), (1, 1, 1, 1, 4), (2, 2, 2), (5, 4, 3, 2, 1, 1), (0, 0, 0), ()], ids=str
)
def test_the_longest_share_is_as_short_as_any_cut_can_make_it(seconds, count) -> None:
    shares = split(units(*seconds), count)
    assert [unit for share in shares for unit in share] == units(*seconds) and len(shares) == count
    cuts = itertools.combinations_with_replacement(range(len(seconds) + 1), count - 1)
    best = min(
        max(sum(seconds[a:b]) for a, b in itertools.pairwise([0, *places, len(seconds)])) for places in cuts
    )  # fmt: skip
    assert max(loads(shares)) == pytest.approx(best)
    assert sum(map(bool, shares)) == min(count, len(seconds))  # no process is idle if there is work for it


@pytest.fixture
def config(tiny_cache: Cache, home: Path) -> EvaluateConfig:
    """Two systems of three seeds each: one with 48 latents at layer 0, one with 64 latents at layer 1."""
    for layer, seed in itertools.product(range(2), range(3)):
        folder = home / f"{'ab'[layer]}-{seed}"
        origin = {"model": tiny_cache.identity["model"], "layer": layer, "cache": str(tiny_cache.folder)}
        save_sae(make_sae(seed, latents=48 + 16 * layer), folder, origin | {"fingerprint": tiny_cache.fingerprint})
        write_run_record(folder, d_in=32, d_sae=48 + 16 * layer, layer=layer, variant="topk", seed=seed)
    runs = [home / f"{system}-{seed}" for seed in range(3) for system in "ab"]
    options = ["core.batch_contexts=4", "stability.tokens=50", "stability.draws=1"]
    return EvaluateConfig(runs, "core,stability", tokens=100, device="cpu", options=options)


def work(shares) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
    return [(tuple(run.name for run in u.runs), u.metrics, u.beside) for share in shares for u in share]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
def test_each_run_is_dealt_once_for_each_metric_and_a_system_whole(config, count) -> None:
    shares = deal_work(plan_evaluation(config), count)
    assert len(shares) == count
    dealt = [
        (run, metric) for runs, metrics, beside in work(shares) if not beside for run in runs for metric in metrics
    ]
    assert sorted(dealt) == sorted((run.name, metric) for run in config.runs for metric in ("core", "stability"))
    systems = [set(runs) for runs, metrics, _ in work(shares) if metrics == ("stability",)]
    assert sorted(map(sorted, systems)) == [["a-0", "a-1", "a-2"], ["b-0", "b-1", "b-2"]]
    assert sum(beside == REFERENCES for _, _, beside in work(shares)) == 2  # one for each layer
    assert sum(map(bool, shares)) == min(count, 8) or count > 8  # six runs and two sets of reference rows


def test_runs_of_a_hook_stand_together(config) -> None:
    shares = deal_work(plan_evaluation(replace(config, suite="core", references=False, options=())), 2)
    assert [sorted(run.name for unit in share for run in unit.runs) for share in shares] == [
        ["a-0", "a-1", "a-2"], ["b-0", "b-1", "b-2"],
    ]  # fmt: skip


def test_a_wider_sae_and_an_earlier_layer_take_longer(config) -> None:
    def seconds(suite: str) -> dict[str, float]:
        plan = plan_evaluation(replace(config, suite=suite, references=False, options=()))
        return {unit.runs[0].name: unit.seconds for share in deal_work(plan, 1) for unit in share}

    core, absorption = seconds("core"), seconds("absorption")
    assert 0 < absorption["a-0"] < absorption["b-0"] and absorption["a-0"] == absorption["a-2"]
    assert core["a-0"] > core["b-0"]  # a-0 is narrower, but a block of the model runs after its layer
    assert seconds("core,absorption") == {run: core[run] + absorption[run] for run in core}
    tokens = int(plan_evaluation(replace(config, suite="core", options=())).groups[0].ctx.contexts.length.sum())
    after_the_last_layer = 8192 * 32 + 2 * 32 * 64  # the unembedding and the SAE, no further blocks
    assert core["b-0"] == pytest.approx(2 * tokens * after_the_last_layer / RATE["cpu"])


def test_at_each_hook_the_longest_comes_first(config) -> None:
    plan = plan_evaluation(replace(config, suite="core", options=()))
    assert [unit.beside for unit in ordered_units(plan, plan.groups[0])] == [REFERENCES, "", "", ""] * 2


def test_of_ranks_that_are_as_busy_the_one_with_the_runs_of_a_system_measures_it(config, monkeypatch) -> None:
    monkeypatch.setattr(deal, "seconds_of", lambda *_: 1.0)
    plan = plan_evaluation(replace(config, runs=config.runs[::-1], references=False))
    shares = deal_work(plan, 2)
    assert [{run.name[0] for unit in share for run in unit.runs} for share in shares] == [{"a"}, {"b"}]


def test_what_is_measured_already_is_not_dealt(config) -> None:
    config = replace(config, runs=config.runs[:3], tokens=30, references=False)
    evaluate(replace(config, suite="core", runs=config.runs[:2], options=config.options[:1]))
    shares = deal_work(plan_evaluation(config), 3)
    assert sorted(work(shares)) == [(("a-0", "a-1"), ("stability",), ""), (("a-1",), ("core",), "")]
    again = deal_work(plan_evaluation(replace(config, force=True)), 3)
    assert sum(metrics == ("core",) for _, metrics, _ in work(again)) == 3


def test_what_a_rank_has_measured_does_not_stay_in_memory(config, monkeypatch) -> None:
    monkeypatch.setattr("sae.evaluate.plan.rank_and_count", lambda: (0, 2))
    options = config.options[:1]
    plan = plan_evaluation(replace(config, runs=config.runs[:3], suite="core", references=False, options=options))
    (config.runs[2] / "sae.safetensors").write_bytes(b"")
    measured = measure_share(plan, deal_work(plan, 1)[0], no_progress_bar)
    assert all(row.target.sae.W_enc.is_meta for row in plan.rows)
    assert [list(row.results) for row in plan.rows] == [["core"], ["core"], []]
    assert list(measured.errors) == [(config.runs[2], "core")]  # sent to the other ranks


def test_that_nothing_was_measured_is_said_by_who_has_all_rows(config, monkeypatch) -> None:
    plan = plan_evaluation(replace(config, runs=config.runs[:1], suite="core", references=False, options=()))
    plan.rows[0].errors["core"] = UnavailableError("No memory")
    monkeypatch.setattr("sae.evaluate.run.measure_here", lambda plan, progress: [plan.rows])
    assert run_evaluation(plan, all_rows=False) == plan.rows
    with pytest.raises(UnavailableError, match="No memory"):
        run_evaluation(plan)


def test_reference_rows_stand_in_one_order_whoever_measured_them(config) -> None:
    plan = plan_evaluation(replace(config, suite="core", options=config.options[:1]))
    places = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0)]
    found = [Measured(references={place: replace(plan.rows[0], name=str(place))}) for place in reversed(places)]
    (rows,) = join(plan, found, all_rows=False)
    assert [row.name for row in rows] == [*(row.name for row in plan.rows), *map(str, places)]


def test_a_folder_that_is_no_control_is_refused(config) -> None:
    with pytest.raises(UsageError, match="is not a control"):
        deal_work(plan_evaluation(replace(config, controls=config.runs[:1])), 2)


def test_a_plan_deals_controls_once_they_are_trained(config, home: Path, monkeypatch) -> None:
    plan = plan_evaluation(replace(config, suite="core", options=(), controls=[home / "untrained"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    header, *lines = ranks_lines(plan)
    assert header.startswith("deal     6 SAEs to 2 processes") and "control" not in "".join(lines)


def test_the_plan_names_the_share_of_each_rank(config) -> None:
    plan = plan_evaluation(replace(config, suite="core", options=()))
    header, *lines = describe_deal(plan, deal_work(plan, 20))
    assert header == "deal     6 SAEs to 20 processes, by width and metrics"
    assert [line.split()[1] for line in lines] == [str(rank) for rank in range(20)]
    assert (
        sum("1 SAE after layer 0" in line for line in lines)
        == 3
        == sum("1 SAE after layer 1" in line for line in lines)
    )
    assert (
        sum(line.endswith(" nothing") for line in lines) == 12 and sum("reference rows" in line for line in lines) == 2
    )
    bare = next(line for line in lines if "1 SAE after layer 0" in line and "reference" not in line)
    sae, embedding = 2 * 32 * 48 + 48 + 32, 8192 * 32  # numbers of elements; most of the model is its embedding
    assert 1 < float(bare.split(", ")[-1].split()[0]) / (4 * (sae + embedding) / 1e6) < 1.3
    _, whole = describe_deal(plan, deal_work(plan, 1))  # all SAEs share one model
    assert float(whole.split(", ")[-1].split()[0]) < 1.5 * float(bare.split(", ")[-1].split()[0])
