"""Training behind a harvest: all runs on one group of windows, a checkpoint of each, then the group is removed.

Runs that read other batches, of another layer or batch size or because they stopped elsewhere, are streams of their
own, but there is room for two groups only: so the groups are the outer loop, and in each the streams take turns.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from ..cache.ring import RingCache
from ..common.device import resolve_device
from ..common.files import writer_lock
from .plan import Run, TrainConfig
from .run import (
    RunTrainer,
    SharedPass,
    TrainProgress,
    prepare_trainer,
    raise_problems,
    set_normalization,
    shared_passes,
    stop_on_signal,
    unfinished_runs,
)

Harvest = Callable[[range, Callable[[str], None]], AbstractContextManager[None]]  # makes these groups while it is open


def train_streaming(runs: Sequence[Run], request: TrainConfig, report: TrainProgress, harvest: Harvest) -> None:
    """Train what is not done yet on the request's ring, from the group on that the last of them needs.

    The constants of normalisation are the first group's: later rows are not known when training begins. Raises
    Interrupted after Ctrl-C or SIGTERM and what the harvest raised, both with checkpoints written, and SaeError at the
    end when a run failed.
    """
    ring, device = request.ring, resolve_device(request.device)
    assert ring is not None
    begun: dict[tuple[Any, ...], list[tuple[RunTrainer, int]]] = {}
    with stop_on_signal() as stopping, ExitStack() as held:
        for run in unfinished_runs(runs, report):
            held.enter_context(writer_lock(run.folder, "sae train", report.say))
            begun.setdefault(run.order, []).append(prepare_trainer(run, device, report))
        streams = [stream for each in begun.values() for stream in shared_passes(each, request, report, stopping)]
        if not streams:
            return
        first = min(group_of(ring, stream, stream.taken) for stream in streams)
        last = max(group_of(ring, stream, stream.longest) for stream in streams)
        held.enter_context(harvest(range(first, last + 1), report.say))
        for group in range(first, last + 1):
            waited = ring.wait_for_group(group, stopping)
            for stream in streams:
                stream.waited += waited
                if group_of(ring, stream, stream.taken) == group:
                    train_on_group(ring, stream)
            ring.release_group(group)
            if not any(stream.active for stream in streams):
                break
    raise_problems(runs)


def group_of(ring: RingCache, stream: SharedPass, step: int) -> int:
    """The group that a stream reads after so many steps; after its last, the one that it read last."""
    return ring.group_at(min(step, stream.longest - 1), stream.batch_size)


def train_on_group(ring: RingCache, stream: SharedPass) -> None:
    """Take a stream to the end of the group that is there."""
    assert ring.current_group is not None
    if not stream.taken:
        for training in stream.active:
            set_normalization(training, ring.current_group)
    stream.train(min(ring.cumulative_batches(stream.batch_size)[ring.current_group.number], stream.longest))
