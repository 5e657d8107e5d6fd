"""benchmarks/scale.py: the simulations keep their invariants and agree with closed forms where these exist."""

import math
from dataclasses import replace

import numpy as np
import pytest

from sae.benchmarks.simulation.closed_forms import expected_seconds_with_failures, undisturbed_seconds
from sae.benchmarks.simulation.constants import Constants, describe, parse_settings
from sae.benchmarks.simulation.events import Clock, Link, Server
from sae.benchmarks.simulation.harvest import RANKS, SHARES, Harvest, HarvestRun, put_requests
from sae.benchmarks.simulation.sweep import GROUPS, Sweep, SweepRun, step_seconds
from sae.cache.chunk_schedule import ChunkSchedule
from sae.cache.consistency import window_files
from sae.train.deal import deal

FREE = 1e18
QUIET = replace(Constants(), node_failures=0, speed_spread=0)
UNLIMITED = replace(QUIET, put_rate=FREE, get_rate=FREE, node_link=FREE)
SMALL = Harvest(tokens=48 * 100_000, nodes=2, gpus=3, window=100_000, constants=UNLIMITED)


@pytest.mark.parametrize("way", [RANKS, SHARES])
@pytest.mark.parametrize("writer", [FREE, 3e8])  # the model is slower, then the writer
def test_without_failures_and_waits_a_harvest_takes_what_the_formula_says(way: str, writer: float) -> None:
    harvest = replace(SMALL, way=way, constants=replace(UNLIMITED, writer=writer))
    assert HarvestRun(harvest).run().windows_seconds == pytest.approx(undisturbed_seconds(harvest), rel=1e-9)


@pytest.mark.parametrize(
    ("resource", "limit"),
    [
        ("links", {"node_link": 2e8}),
        ("writes", {"put_rate": 4.0}),
        ("asking", {"get_rate": 0.003, "partitions": 1.0}),
        ("model", {"gpu_flops": 1e13}),
    ],
)
def test_the_scarcest_resource_decides_and_none_is_undercut(resource: str, limit: dict[str, float]) -> None:
    constants = replace(UNLIMITED, start=0, latency=0, connection=FREE, writer=FREE, **limit)
    harvest = replace(SMALL, way=SHARES, constants=constants)
    seconds, bounds = HarvestRun(harvest).run().windows_seconds, harvest.bounds
    assert max(bounds, key=lambda name: bounds[name]) == resource
    assert bounds[resource] <= seconds <= 1.15 * bounds[resource]


def test_failures_cost_on_average_what_the_formula_says() -> None:
    failing = replace(UNLIMITED, node_failures=120.0, restart=20, start=0, writer=FREE, latency=0, connection=FREE)
    harvest = Harvest(tokens=1_000_000, nodes=1, gpus=1, window=1_000_000, constants=failing)
    times = np.array([HarvestRun(harvest, seed).run().windows_seconds for seed in range(600)])
    expected = expected_seconds_with_failures(1_000_000 * harvest.token_seconds, 120 / 3600, 20)
    assert abs(times.mean() - expected) < 4 * times.std() / math.sqrt(len(times))


def test_a_failed_node_ends_every_rank_but_only_its_own_shares() -> None:
    results = {way: HarvestRun(replace(SMALL, way=way), fail_after=46.0).run() for way in (RANKS, SHARES)}
    without = HarvestRun(SMALL).run().windows_seconds
    assert results[RANKS].failures == results[SHARES].failures == 1
    assert 3 < results[RANKS].computed_again <= 12 and 0 < results[SHARES].computed_again <= 6
    assert without + QUIET.restart < results[SHARES].windows_seconds <= results[RANKS].windows_seconds


@pytest.mark.parametrize("shares", [1, 5, 6, 7, 48, 60])
def test_every_window_is_committed_whatever_the_number_of_shares(shares: int) -> None:
    run = HarvestRun(replace(SMALL, way=SHARES, shares=shares), fail_after=47.0)
    assert sorted(window for share in run.shares for window in share) == list(range(48))
    run.run()
    assert not run.missing


def test_fewer_shares_than_processes_leave_some_idle() -> None:
    one, all_of_them = (HarvestRun(replace(SMALL, way=SHARES, shares=n)).run().windows_seconds for n in (1, 6))
    assert undisturbed_seconds(replace(SMALL, nodes=1, gpus=1)) == pytest.approx(one)
    assert one > 3 * (all_of_them - QUIET.start)


def test_the_objects_of_a_window_are_its_files() -> None:
    harvest = Harvest(tokens=1_000_000)
    assert len(harvest.objects) == len(window_files(harvest.layout, harvest.widths, range(1)))
    rows = harvest.window * len(harvest.layers)
    assert 0 < harvest.window_bytes - rows * 2 * 2304 < 0.01 * harvest.window_bytes
    assert [put_requests(size) for size in (1, 64 << 20, (64 << 20) + 1)] == [1, 1, 4]


def test_transfers_share_a_link() -> None:
    ended: dict[str, float] = {}
    clock = Clock()
    link = Link(clock, rate=10.0, limit=6.0)
    for name, size, start in (("a", 10.0, 0.0), ("b", 30.0, 0.0), ("c", 12.0, 4.0)):
        clock.after(start, link.send, size, lambda name=name: ended.setdefault(name, clock.now))
    clock.run()
    # Until 2 s, a and b move 5 a second each, and a ends. Then b is alone and moves 6 a second; at 4 s it has moved 22.
    # Then b and c move 5 each, and b ends at 5.6 s, when c has moved 8. Then c moves 6 a second.
    assert ended == pytest.approx({"a": 2.0, "b": 5.6, "c": 5.6 + 4 / 6})
    assert link.bytes == 52


def test_a_node_that_fails_ends_its_transfers() -> None:
    clock, ended = Clock(), list[float]()
    link = Link(clock, rate=10.0)
    link.send(100.0, lambda: ended.append(-1.0))
    clock.after(3.0, link.drop_all)
    clock.after(4.0, link.send, 20.0, lambda: ended.append(clock.now))
    clock.run()
    assert ended == [6.0]


def test_requests_are_served_in_order() -> None:
    clock = Clock()
    server, waits = Server(clock, rate=4.0), list[float]()
    for start, requests in ((0.0, 8.0), (1.0, 4.0), (5.0, 2.0)):
        clock.after(start, lambda requests=requests: waits.append(server.serve(requests)))
    clock.run()
    assert waits == [2.0, 2.0, 0.5]


TINY = Sweep(gpus=4, recipes=("relu", "topk"), seeds=3, gpus_per_node=2, constants=UNLIMITED)


def test_where_pulling_takes_no_time_a_sweep_ends_with_its_longest_share() -> None:
    sweep = replace(TINY, constants=replace(UNLIMITED, connection=FREE, latency=0))
    longest = max(sum(sweep.works[number].seconds for number in share.runs) for share in deal(sweep.works, sweep.gpus))
    result = SweepRun(sweep).run()
    assert result.seconds == pytest.approx(QUIET.start + longest) and result.seconds >= sweep.bounds["steps"]
    assert result.efficiency == pytest.approx(sum(w.seconds for w in sweep.works) / 4 / result.seconds)


def test_a_slow_link_decides_how_long_a_sweep_takes() -> None:
    sweep = replace(TINY, gpus=2, recipes=("topk",), seeds=2, constants=replace(QUIET, node_link=1e8))
    result = SweepRun(sweep).run()
    assert result.pulled == pytest.approx(3 * sweep.layer_bytes, rel=1e-9)
    assert result.pulled / 1e8 <= result.seconds <= 1.1 * result.pulled / 1e8


def test_one_process_pulls_what_the_schedule_of_the_program_says() -> None:
    """Each layer takes two passes, because its runs do not fit on the GPU together."""
    memory = replace(UNLIMITED, gpu_memory=16e9, step_memory=10e9)
    sweep = Sweep(
        gpus=1, gpus_per_node=1, recipes=("topk",), seeds=6, layers=(5, 12), local_cache=3e11, constants=memory
    )  # fmt: skip
    run = SweepRun(sweep)
    (rank,) = run.ranks
    assert len(rank.passes) == 4
    files = np.array([one.layer * GROUPS + group for one in rank.passes for group in range(GROUPS)])
    steps = np.arange(len(files))
    schedule = ChunkSchedule(np.stack([files, steps, steps], 1), run.sizes)
    expected = schedule.pulled(np.zeros(len(run.sizes), bool), int(sweep.local_cache)).sum()
    assert 2 * GROUPS < expected < 4 * GROUPS  # part of what the second pass needs is still in the local cache
    assert run.run().pulled == expected * sweep.group_bytes


def test_processes_of_a_node_leave_each_other_what_they_need() -> None:
    """Two layers in a local cache of five files: each is pulled once."""
    sweep = replace(TINY, gpus=2, layers=(5, 12), recipes=("topk",), local_cache=5 * TINY.group_bytes)
    run = SweepRun(sweep)
    assert {one.layer for one in run.ranks[0].passes} != {one.layer for one in run.ranks[1].passes}
    assert run.run().pulled == 2 * GROUPS * sweep.group_bytes


def test_a_failed_node_costs_a_sweep_the_steps_since_the_checkpoints() -> None:
    quiet, failing = TINY, replace(TINY, constants=replace(UNLIMITED, node_failures=3.0))
    runs = [SweepRun(failing, seed) for seed in range(4)]
    results = [run.run() for run in runs]
    assert all(rank.is_done for run in runs for rank in run.ranks)
    quiet_result = SweepRun(quiet).run()
    without = quiet_result.seconds
    assert sum(one.failures for one in results) >= 4
    assert all(one.pulled > quiet_result.pulled for one in results if one.failures)  # the cache of a node is gone
    for one in results:
        assert one.seconds >= without + (QUIET.restart if one.failures else 0)
        assert one.seconds <= without + one.failures * (QUIET.restart + QUIET.start + 60)


def test_the_time_of_a_step_is_that_of_the_table() -> None:
    assert [1e3 * step_seconds()[name] for name in ("relu", "collapse-10")] == pytest.approx([4.02, 40.81])
    assert len(Sweep().works) == 600


def test_constants_can_be_set_by_name() -> None:
    constants = parse_settings(["node_link=1e9", "latency=0.02"])
    assert (constants.node_link, constants.latency) == (1e9, 0.02)
    assert sum(line.endswith("| --set |") for line in describe(constants)) == 2
    assert not any(line.endswith("| --set |") for line in describe(Constants()))
    for wrong in ("node_lnk=1", "latency=-1", "latency=fast", "latency"):
        with pytest.raises(ValueError):
            parse_settings([wrong])
