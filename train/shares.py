"""Assign the runs of a plan to several processes, using estimates of time and memory, and describe the assignment."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import torch

from ..cache.object_store import is_url
from ..common.device import fix_cublas_workspace, resolve_device
from ..common.errors import UnavailableError
from ..common.formatting import format_bytes, format_count, format_duration
from ..common.memory import available_memory
from .deal import RankShare, Work, deal
from .estimate import MAX_OPERATIONS, OPERATIONS, RunInFolder, seconds_per_step
from .memory import memory_bound, run_memory
from .passes import FREE_SHARE, PassRun, add_up, copied_bytes, copies_fit, pass_memory, plan_passes
from .sources import AnyCache, places_of

# Approximate bytes per second at which a process reads batches. Disk: measured by benchmarks/bench_cache.py. Store:
# assumes a link of 10 Gbit/s that eight processes share. In fact, a chunk that fits into the local folder is pulled
# only once for all processes on a machine. The rate does not take this into account. So it seems slower than it is to
# divide runs that share batches among several processes, and such runs tend to be assigned to one process.
READ_RATE, STORE_RATE = 2e9, 150e6


class DealtRun(PassRun, RunInFolder, Protocol):
    """A run that can be assigned to a process. `plan.Run` implements this."""

    @property
    def cache(self) -> AnyCache: ...


def deal_runs(runs: Mapping[int, DealtRun], device: str, ranks: int) -> list[RankShare]:
    """Assign runs, given as number -> run, to `ranks` processes, each with a device like this one."""
    seconds = dict(zip(runs, step_times(list(runs.values()), device), strict=True))
    streams: dict[Hashable, list[int]] = {}
    for number, run in runs.items():
        streams.setdefault(run.batches_key, []).append(number)
    parts: dict[int, float] = {}
    for numbers in streams.values():
        parts |= zip(numbers, memory_parts([runs[number] for number in numbers], device), strict=True)
    works = []
    for number, run in runs.items():
        steps = steps_left(run)
        reading = steps * run.config.batch_size * 2 * run.config.d_in / read_rate(run)
        works.append(Work((number,), run.batches_key, steps * seconds[number], reading, parts[number]))
    return deal(works, ranks)


def read_rate(run: DealtRun) -> float:
    """The approximate bytes per second at which a process reads the batches of a run."""
    return STORE_RATE if any(map(is_url, places_of(run.cache))) else READ_RATE


def steps_left(run: RunInFolder) -> int:
    """The steps that a run still has to take after its newest checkpoint. Reads only file names."""
    names = [path.parent.name.removeprefix("step-") for path in run.folder.glob("checkpoints/step-*/state.json")]
    return max(0, run.config.steps - max((int(name) for name in names if name.isdecimal()), default=0))


def step_times(runs: Sequence[DealtRun], device: str) -> list[float]:
    """Seconds per step of each run: measured, or estimated from operations if a run is too large to be timed."""
    fix_cublas_workspace(device)  # has to come before the first steps of the process, which are timed below
    try:
        return seconds_per_step(runs, device)
    except UnavailableError:
        rate = MAX_OPERATIONS[torch.device(device).type]  # operations in one or two seconds
        return [OPERATIONS * c.batch_size * c.d_in * c.d_sae / rate for c in (run.config for run in runs)]


def memory_parts(stream: Sequence[DealtRun], device: str) -> list[float]:
    """The fraction of a pass's memory that each run of a stream takes between steps; 0 if one pass holds all runs."""
    budget = FREE_SHARE * available_memory(device)
    if sum(map(memory_bound, stream)) <= budget:
        return [0.0] * len(stream)
    memories = [run_memory(run, device) for run in stream]
    whole = add_up(memories, stream[0].config, device)
    room = budget - whole.step - whole.batches
    return [memory.state / room for memory in memories]


def describe_shares(shares: Sequence[RankShare], runs: Sequence[DealtRun], device: str, memory: bool) -> list[str]:
    """The plan's lines about the runs of each process and, if `memory` is set, about the memory of these runs."""
    device = resolve_device(device)
    count = sum(len(share.runs) for share in shares)
    lines = [f"deal     {format_count(count, 'run')} to {len(shares)} processes, by timing a few steps of each recipe"]
    if any(read_rate(run) == STORE_RATE for run in runs):
        lines[0] += f", assuming that each process reads {format_bytes(STORE_RATE)} per second from a store"
    for rank, share in enumerate(shares):
        dealt = [runs[number] for number in sorted(share.runs)]
        lines.append(f"rank {rank:<3} {describe_share(dealt, share.seconds, device, memory) if dealt else 'nothing'}")
    return lines


def describe_share(runs: Sequence[DealtRun], seconds: float, device: str, memory: bool) -> str:
    """Describe the runs that one process trains."""
    passes = plan_passes(runs, device)
    line = f"{format_count(len(runs), 'run')} in {len(passes)} pass{'es' if len(passes) > 1 else ''}"
    line += f", about {format_duration(seconds)}"
    if not memory:
        return line
    line += f", {format_bytes(max(pass_memory(one, device).total for one in passes))} on {device.partition(':')[0]}"
    if not all(copies_fit(one, device) for one in passes):
        return f"{line}; training waits while checkpoints are written"
    return f"{line} and {format_bytes(max(copied_bytes(one, device) for one in passes))} for copies of the states"
