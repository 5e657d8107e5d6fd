"""Runs are dealt to processes: each run once, no later than stated bounds. Streams are divided only where that pays."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.common import memory
from sae.train import shares as shares_module
from sae.train.deal import RankShare, Work, cut, deal, end_of, merge, passes, to_the_first_done
from sae.train.memory import run_memory
from sae.train.passes import FREE_SHARE, pass_memory
from sae.train.plan import TrainPlan, plan_training
from sae.train.shares import describe_shares, steps_left

from .runs import make_config, train

SECONDS = st.integers(1, 60).map(float)


@st.composite
def works(draw, reading: bool = True, most: int = 7) -> list[Work]:
    """Runs from up to three streams. All runs of a stream have the same reading time."""
    readings = [draw(SECONDS) if reading else 0.0 for _ in range(3)]
    streams = draw(st.lists(st.integers(0, 2), min_size=1, max_size=most))
    return [Work((n,), stream, draw(SECONDS), readings[stream]) for n, stream in enumerate(streams)]


def seconds_of(runs: list[Work]) -> float:
    """The seconds of a rank by definition: the steps of all its runs, and each of its streams read once."""
    return sum(run.seconds for run in runs) + sum({run.stream: run.reading for run in runs}.values())


def best_end(runs: list[Work], ranks: int) -> float:
    """The earliest possible end, found by trying all deals."""
    return min(
        max(seconds_of([run for run, rank in zip(runs, dealt, strict=True) if rank == one]) for one in range(ranks))
        for dealt in itertools.product(range(ranks), repeat=len(runs))
    )


def whole_streams(runs: list[Work], ranks: int) -> float:
    """When the last rank ends if streams are dealt whole, the longest first, each to the least loaded rank."""
    loads = [0.0] * ranks
    for stream in sorted({run.stream for run in runs}, key=lambda s: -seconds_of([r for r in runs if r.stream == s])):
        loads[loads.index(min(loads))] += seconds_of([run for run in runs if run.stream == stream])
    return max(loads)


@settings(max_examples=80, deadline=None)
@given(works(most=30), st.integers(1, 9))
def test_every_run_is_dealt_once_and_shares_know_their_time(runs: list[Work], ranks: int) -> None:
    shares = deal(runs, ranks)
    assert len(shares) == ranks
    assert Counter(number for share in shares for number in share.runs) == Counter(range(len(runs)))
    for share in shares:
        mine = [runs[number] for number in share.runs]
        assert share.seconds == pytest.approx(seconds_of(mine))
        assert share.readings == len({run.stream for run in mine})
    longest, total = max(run.alone for run in runs), sum(run.alone for run in runs)
    assert end_of(shares) <= total / ranks + longest * (1 - 1 / ranks) + 1e-5  # Graham's bound for any list


@settings(max_examples=60, deadline=None)
@given(works(reading=False, most=6), st.integers(1, 3))
def test_without_reading_the_end_is_at_most_a_third_later_than_the_best(runs: list[Work], ranks: int) -> None:
    assert end_of(deal(runs, ranks)) <= (4 / 3 - 1 / (3 * ranks)) * best_end(runs, ranks) + 1e-5


@settings(max_examples=60, deadline=None)
@given(works(most=6), st.integers(1, 3))
def test_a_stream_is_divided_only_if_all_is_done_earlier(runs: list[Work], ranks: int) -> None:
    shares, whole = deal(runs, ranks), whole_streams(runs, ranks)
    divided = sum(share.readings for share in shares) > len({run.stream for run in runs})
    assert end_of(shares) < whole if divided else end_of(shares) <= whole + 1e-5
    assert end_of(shares) >= best_end(runs, ranks) - 1e-5


@settings(max_examples=60, deadline=None)
@given(works(most=6), st.integers(1, 3))
def test_a_cut_in_order_is_the_best_cut(runs: list[Work], ranks: int) -> None:
    shares = cut(runs, ranks)
    assert [number for share in shares for number in share.runs] == list(range(len(runs)))
    cuts = itertools.combinations_with_replacement(range(len(runs) + 1), ranks - 1)
    ends = [[0, *at, len(runs)] for at in cuts]
    best = min(max(seconds_of(runs[a:b]) for a, b in itertools.pairwise(at)) for at in ends)
    assert end_of(shares) == pytest.approx(best, abs=1e-4)


def test_streams_stay_together_where_nothing_is_lost() -> None:
    """Two streams of four equal runs are dealt to two ranks, and each rank reads one stream."""
    runs = [Work((n,), n % 2, 10.0, 3.0) for n in range(8)]
    assert sorted(sorted(share.runs) for share in deal(runs, 2)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert sorted(share.readings for share in deal(runs, 3)) == [1, 1, 2] and end_of(deal(runs, 3)) == 33
    assert sorted(len(share.runs) for share in deal(runs[::2], 2)) == [2, 2]  # a single stream is divided


def test_more_ranks_than_runs_leave_some_without() -> None:
    assert sorted(share.runs for share in deal([Work((0,), "a", 5.0, 1.0), Work((1,), "a", 5.0, 1.0)], 4)) == [
        [], [], [0], [1],
    ]  # fmt: skip
    assert [share.runs for share in deal([], 2)] == [[], []]


def test_runs_that_do_not_fit_into_one_pass_read_again() -> None:
    runs = [Work((n,), "a", 10.0, 4.0, 0.4) for n in range(4)]
    assert [passes(part) for part in (0.0, 0.4, 1.0, 1.0 + 1e-12, 1.2, 2.5)] == [1, 1, 1, 1, 2, 3]
    assert merge(runs).alone == 40 + 2 * 4 and RankShare(runs).seconds == 48 and RankShare(runs).readings == 2
    shares = to_the_first_done(runs[:3], 1)
    assert shares[0].seconds == 30 + 2 * 4
    assert shares[0].seconds_with(runs[3]) == 48


def plan_of(sparse_cache, tmp_path, monkeypatch, **changes) -> TrainPlan:
    config = make_config(sparse_cache, "relu", "topk", seeds=[0, 1, 2], layers=[0, 1], out=tmp_path, **changes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    times = {"relu": 1.0, "topk": 2.0}
    monkeypatch.setattr(shares_module, "step_times", lambda runs, device: [times[run.recipe.name] for run in runs])
    return plan_training(config)


def test_finished_runs_do_not_change_the_deal(sparse_cache, tmp_path, monkeypatch) -> None:
    """This holds whichever runs are finished and in whatever order the runs are listed."""
    plan, rng = plan_of(sparse_cache, tmp_path, monkeypatch), random.Random(0)
    done, left = plan.runs[::3], [run for number, run in enumerate(plan.runs) if number % 3]
    for run in done:
        run.folder.mkdir()
        (run.folder / "sae.json").touch()

    def dealt(runs: list) -> list[list[str]]:
        made = TrainPlan(plan.config, runs)
        return [[runs[number].name for number in share.runs] for share in made.shares]

    expected = dealt(left)
    assert sum(map(len, expected)) == 8
    for _ in range(10):
        mixed = list(left)
        for run in rng.sample(done, len(done)):
            mixed.insert(rng.randrange(len(mixed) + 1), run)
        assert dealt(mixed) == expected


def test_only_the_steps_that_are_left_count(sparse_cache, tmp_path, monkeypatch) -> None:
    (folder,) = train(make_config(sparse_cache, "relu", out=tmp_path))
    (folder / "sae.json").unlink()
    config = make_config(sparse_cache, "relu", out=tmp_path, steps=12)
    (run,) = plan_training(config).runs
    assert steps_left(run) == 0
    (folder / "checkpoints/step-00000012/state.json").unlink()  # a kill before it was whole
    (folder / "checkpoints/step-x").mkdir()
    (folder / "checkpoints/step-x/state.json").touch()
    assert steps_left(run) == 4
    monkeypatch.setattr(shares_module, "step_times", lambda runs, device: [3.0])
    monkeypatch.setattr(shares_module, "READ_RATE", 64 * 2 * 32 / 7)  # a batch in 7 seconds
    assert plan_training(config).shares[0].seconds == 4 * (3 + 7)


def test_what_is_read_of_a_store_takes_longer(sparse_cache, tmp_path, monkeypatch) -> None:
    """Runs that share batches therefore stay together when they read a store, where the deal for a disk divides them.

    The plan states the speed that it assumes.
    """
    plan = plan_of(sparse_cache, tmp_path, monkeypatch)
    large = [run for run in plan.runs if run.hook.layer == 0]  # 9 seconds a step for six runs
    small = [run for run in plan.runs if run.hook.layer == 1 and run.recipe.name == "relu"][:2]  # 2 seconds
    of_a_disk = TrainPlan(plan.config, large + small).shares
    assert sum(share.readings for share in of_a_disk) == 3
    monkeypatch.setattr(shares_module, "STORE_RATE", 64 * 2 * 32 / 9)  # a batch in 9 seconds
    monkeypatch.setattr(shares_module, "places_of", lambda cache: ["activations/other", "s3://bucket/pile"])
    of_a_store = TrainPlan(plan.config, large + small).shares
    assert [sorted(share.runs) for share in of_a_store] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    monkeypatch.undo()
    monkeypatch.setattr(shares_module, "places_of", lambda cache: ["s3://bucket/pile"])
    (line, *_) = describe_shares(of_a_store, large + small, "cpu", memory=False)
    assert line.endswith(", assuming that each process reads 0.15 GB per second from a store")


def test_the_memory_of_a_pass_counts(sparse_cache, tmp_path, monkeypatch) -> None:
    """A pass has room for two of the six runs of a stream, so each of three runs takes half of it."""
    plan = plan_of(sparse_cache, tmp_path, monkeypatch)
    stream = [run for run in plan.runs if run.hook.layer == 0 and run.recipe.name == "relu"]
    assert shares_module.memory_parts(stream, "cpu") == [0.0] * 3
    two = pass_memory(stream[:2], "cpu").total
    monkeypatch.setenv(memory.LIMIT, repr(two / FREE_SHARE / 1e9 * (1 + 1e-9)))
    state = run_memory(stream[0], "cpu").state
    assert shares_module.memory_parts(stream, "cpu") == pytest.approx([0.5] * 3, rel=1e-6) and state


def test_the_plan_says_what_each_process_trains(sparse_cache, tmp_path, monkeypatch) -> None:
    plan = plan_of(sparse_cache, tmp_path, monkeypatch, steps=600)
    lines = describe_shares(plan.shares, plan.runs, "cpu", memory=True)
    assert lines[0] == "deal     12 runs to 2 processes, by timing a few steps of each recipe"
    for rank, line in enumerate(lines[1:]):
        one = [run for run in plan.runs if run.hook.layer == rank]  # each layer is one stream
        size = pass_memory(one, "cpu").total / 1e9
        assert line.startswith(f"rank {rank}   6 runs in 1 pass, about 90.0 min, {size:.2f} GB on cpu and ")
    assert [line for line in plan.describe() if line[:4] in ("deal", "rank")] == [
        lines[0], *(f"rank {rank}   6 runs in 1 pass, about 90.0 min" for rank in (0, 1)),
    ]  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "13")
    assert TrainPlan(plan.config, plan.runs).describe()[-1] == "rank 12  nothing"
    monkeypatch.setenv("RANK", "1")
    assert plan.describe(time=True) == []


def test_runs_too_large_to_time_are_dealt_by_their_operations(sparse_cache, tmp_path, monkeypatch) -> None:
    plan = plan_training(make_config(sparse_cache, "relu", "topk", out=tmp_path))
    monkeypatch.setattr("sae.train.estimate.MEMORY_SHARE", 0.0)
    assert shares_module.step_times(plan.runs, "cpu") == [10 * 64 * 32 * 128 / 2e11] * 2


def test_a_run_goes_to_the_process_that_is_done_with_it_first() -> None:
    """That process already has the stream of the run; the other process has less to do."""
    runs = [Work((0,), "a", 5.0, 10.0), Work((1,), "b", 12.0, 0.0), Work((2,), "a", 1.0, 10.0)]
    assert [share.runs for share in to_the_first_done(runs, 2)] == [[0, 2], [1]]
