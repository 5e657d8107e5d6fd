"""Memory is planned: a trace finds what a step takes, runs are divided into passes that fit, and others are refused."""

import re
import signal
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from sae.common import memory as common_memory
from sae.common.errors import Interrupted, UnavailableError
from sae.train import passes
from sae.train.memory import LiveBytes, RunMemory, memory_bound, run_memory, trace_steps
from sae.train.passes import FREE_SHARE, Resized, add_up, largest_batch, pass_memory, plan_passes, split_by_memory
from sae.train.plan import plan_training
from sae.train.recipe import RECIPES, find_recipe
from sae.train.run import TrainProgress, run_training
from sae.train.variant import RunConfig

from .runs import make_config, train

find_recipe("relu")  # registers them all
QUICK = ["topk", "competition", "collapse-10"]
OTHERS = ["relu", "batchtopk", "jumprelu", "gated", "matryoshka", "decorrelation", "hierarchical", "progressive"]


def spec(name: str, width: int = 512, batch: int = 256, d_in: int = 64, **options) -> Resized:
    return Resized(find_recipe(name), options, None, RunConfig(d_in, width, 100, batch))


@pytest.fixture
def limit_memory(monkeypatch):
    """A function that sets how many bytes a plan may take in all, not counting libraries."""
    monkeypatch.setitem(passes.WORKSPACE, "cpu", 0)

    def limit(budget: float) -> None:
        monkeypatch.setenv(common_memory.LIMIT, repr(budget / FREE_SHARE / 1e9 * (1 + 1e-12)))

    return limit


def allocated_peak(call) -> int:
    """The largest number of bytes that torch's allocator had handed out while `call` ran, by its own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    now = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_step_takes_what_its_trace_says(name: str) -> None:
    """The tensors of real steps are those of the trace, byte for byte, with half of the latents dead.

    The allocator's own record differs, because single operations allocate memory inside and free or reuse it earlier.
    In decorrelation's sort of all pairs, torch copies less than is planned.
    """
    run = spec(name)
    with FakeTensorMode(), LiveBytes() as live:
        traced = trace_steps(live, run, "cpu", run.config.batch_size)
    with LiveBytes() as live:
        assert trace_steps(live, run, "cpu", run.config.batch_size) == traced
    outside = LiveBytes()  # not entered, so it counts nothing
    peak = allocated_peak(lambda: trace_steps(outside, run, "cpu", run.config.batch_size))
    assert (0.55 if name == "decorrelation" else 0.7) <= peak / traced.peak <= 1.1


def test_sorting_a_whole_batch_counts() -> None:
    """`topk` on a CPU copies what it sorts, at 16 bytes per element.

    It sorts rows one after the other, so it copies one row at a time.
    """
    x_BF = torch.zeros(64, 1000)
    for values, copied in ((x_BF.flatten(), 64_000), (x_BF, 1000)):
        with LiveBytes() as live:
            values.topk(10)
        assert live.peak == 16 * copied


@pytest.mark.parametrize(
    "name", ["hierarchical", "competition", "collapse-10", "collapse-10 near_scope=dictionary", "collapse-01"]
)
def test_what_happens_between_steps_takes_no_more_than_it_says(name: str, make_trainer, batches) -> None:
    """Mechanisms act on real tensors, with weights among which latents are merged and pairs are found."""
    trainer = make_trainer(name)
    with LiveBytes() as live:
        for number in range(8):
            step = trainer.step(batches[number])
            before = live.peak = live.now
            trainer.run_periodic(number, step)
            if (number + 1) % 4 == 0:
                said = [m.between_bytes(trainer.variant.sae, len(batches[0])) for m in trainer.variant.mechanisms]
                few = 16 * 8 * trainer.variant.sae.d_sae
                assert 0.3 * max(said) <= live.peak - before <= max(said) + few


@pytest.mark.parametrize("name", QUICK)
def test_the_bound_is_never_below_the_trace(name: str) -> None:
    for run in (spec(name, 512, 256), spec(name, 128, 2048)):
        assert memory_bound(run) >= pass_memory([run], "cpu").total


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_bound_of_every_recipe_is_above_its_trace(name: str) -> None:
    for run in (spec(name, 2304, 512, 144), spec(name, 16384, 64, 1024)):  # group sizes that Gram-Schmidt can take
        assert memory_bound(run) >= pass_memory([run], "cpu").total


def test_runs_share_one_step_and_add_their_states() -> None:
    one, two = (run_memory(spec(name), "cpu") for name in ("relu", "collapse-10"))
    together = pass_memory([spec("relu"), spec("collapse-10"), spec("relu")], "cpu")
    assert together.state == 2 * one.state + two.state
    assert together.step == max(one.step, two.step, one.host, two.host)
    assert together.batches == 4 * 256 * 64 * 2 + passes.WORKSPACE["cpu"]


def test_what_happens_between_two_steps_counts_where_it_takes_more() -> None:
    run = spec("competition", 512, 4)
    with FakeTensorMode(), LiveBytes() as live:
        traced = trace_steps(live, run, "cpu", 4)
    assert run_memory(run, "cpu").step == traced.between - traced.state > traced.peak - traced.state


def test_fewer_rows_take_less() -> None:
    run = spec("relu", 384)
    assert run_memory(run, "cpu", 8).step < run_memory(run, "cpu").step == run_memory(run, "cpu", 256).step


def test_what_reads_a_checkpoint_takes_memory_of_the_host() -> None:
    memories = [RunMemory(1, 2, 5), RunMemory(1, 3, 4)]
    assert add_up(memories, spec("relu").config, "cpu").step == 5
    assert add_up(memories, spec("relu").config, "cuda").step == 3


# --- passes ---------------------------------------------------------------------------------------------------------

RUNS = ["relu", "topk", "jumprelu"]


def test_runs_that_do_not_fit_together_take_several_passes_with_the_same_result(
    sparse_cache, tmp_path: Path, limit_memory
) -> None:
    whole = train(make_config(sparse_cache, *RUNS, out=tmp_path / "whole"))
    config = make_config(sparse_cache, *RUNS, out=tmp_path / "parts")
    runs = plan_training(config).runs
    limit_memory(pass_memory(runs, "cpu").total)
    assert len(plan_training(config).passes) == 1
    limit_memory(pass_memory(runs, "cpu").total - 1)
    plan = plan_training(config)
    assert [[run.recipe.name for run in one] for one in plan.passes] == [["relu", "topk"], ["jumprelu"]]
    (line,) = [line for line in plan.describe() if line.startswith("passes")]
    numbers = r"passes   2 over the same batches, since 3 runs take [\d.]+ MB together and 90% of the [\d.]+ MB that"
    assert re.match(numbers + r" are free on cpu can be used: 2 runs \([\d.]+ MB\), 1 run \([\d.]+ MB\)$", line)
    parts = train(config)
    for one, other in zip(whole, parts, strict=True):
        assert (one / "sae.safetensors").read_bytes() == (other / "sae.safetensors").read_bytes()


def test_a_run_is_in_the_first_pass_with_room_for_it() -> None:
    large, small = spec("relu", 2048), spec("relu", 128)
    free = pass_memory([large, small], "cpu").total / FREE_SHARE * (1 + 1e-9)
    assert split_by_memory([large, large, small], "cpu", free) == [[large, small], [large]]


def test_a_smaller_batch_would_fit_undivided() -> None:
    run = spec("relu", batch=1024)
    divided = run._replace(config=run.config._replace(accumulate=2))
    half_in_parts = divided._replace(config=divided.config._replace(batch_size=512))
    budget = pass_memory([half_in_parts], "cpu").total
    assert largest_batch(divided, "cpu", budget) == largest_batch(run, "cpu", budget) == 256


@pytest.mark.parametrize("stop_in", RUNS[1:])
def test_a_run_that_is_stopped_in_any_pass_goes_on(sparse_cache, tmp_path: Path, limit_memory, stop_in: str) -> None:
    whole = train(make_config(sparse_cache, *RUNS, out=tmp_path / "whole"))
    config = make_config(sparse_cache, *RUNS, out=tmp_path / "parts")
    runs = plan_training(config).runs
    limit_memory(max(pass_memory([run], "cpu").total for run in runs))
    assert len(plan_training(config).passes) == 3

    def stop(step: int, steps: int, metrics: dict) -> None:
        if step == 6 and next(iter(metrics)).startswith(stop_in):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="Stopped after step 7"):
        run_training(plan_training(config), TrainProgress(step=stop))
    done = [run.done for run in plan_training(config).runs]
    assert done == [RUNS.index(name) < RUNS.index(stop_in) for name in RUNS]
    for one, other in zip(whole, train(config), strict=True):
        assert (one / "sae.safetensors").read_bytes() == (other / "sae.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_with_what_would(sparse_cache, tmp_path: Path, limit_memory) -> None:
    config = make_config(sparse_cache, "relu", width="256", batch_size=256, out=tmp_path / "runs")
    (run,) = plan_training(config).runs
    limit_memory(pass_memory([run], "cpu").total)
    assert plan_training(config).runs
    limit_memory(0.8 * pass_memory([run], "cpu").total)
    with pytest.raises(UnavailableError, match="relu with 256 latents takes .* in a step of 256 tokens") as refused:
        plan_training(config)
    assert not (tmp_path / "runs").exists()
    width = int(re.search(r"--width (\d+), the largest that fits", str(refused.value))[1])
    assert width % 64 == 0 and plan_training(make_config(sparse_cache, "relu", width=str(width), batch_size=256)).runs
    with pytest.raises(UnavailableError, match=f"--width {width}, the largest"):
        plan_training(make_config(sparse_cache, "relu", width=str(width + 64), batch_size=256))
    tokens = int(re.search(r"--batch-size (\d+)", str(refused.value))[1])
    assert plan_training(make_config(sparse_cache, "relu", width="256", batch_size=tokens)).runs
    parts = int(re.search(r"--accumulate (\d+)", str(refused.value))[1])
    assert plan_training(make_config(sparse_cache, "relu", width="256", batch_size=256, accumulate=parts)).runs
    limit_memory(1e4)
    with pytest.raises(UnavailableError, match="No width fits: free memory, or increase SAE_MEMORY_GB if it is set"):
        plan_training(config)


def test_a_stream_is_read_once(sparse_cache, limit_memory) -> None:
    runs = plan_training(make_config(sparse_cache, *RUNS)).runs
    limit_memory(pass_memory(runs, "cpu").total)
    assert plan_passes(runs, "cpu", streaming=True) == [runs] and plan_passes([], "cpu", streaming=True) == []
    limit_memory(pass_memory(runs, "cpu").total - 1)
    with pytest.raises(UnavailableError, match="3 runs take .* --stream trains all of them at once: train fewer"):
        plan_passes(runs, "cpu", streaming=True)


def test_the_plan_says_what_memory_is_made_of(sparse_cache) -> None:
    plan = plan_training(make_config(sparse_cache, "relu", "topk"))
    (line,) = [line for line in plan.describe(time=True) if line.startswith("memory")]
    size = r"[\d.]+ [MG]B"
    parts = f"{size} of weights, moments and buffers of 2 runs, {size} more in a step, {size} for batches and libraries"
    assert re.fullmatch(f"memory   {size} on cpu: {parts}; {size} free", line)
