"""Training on activations while they are harvested: all runs train on a group of windows, which is then removed.

Runs that read different batches (because of a different layer, batch size, or step at which they resume) form separate
passes, but the disk has room for only two groups. So the outer loop iterates over groups, and on each group the passes
train one after the other.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from ..cache.ring import RingCache
from ..common.device import keep_freed_memory, resolve_device
from ..common.locks import writer_lock
from .checkpoint_writer import CheckpointWriter
from .plan import TrainPlan
from .progress import TrainProgress
from .run import mention_finished, prepare_trainer, raise_problems, set_normalization
from .run_trainer import RunTrainer
from .shared_pass import SharedPass, shared_passes
from .signals import stop_on_signal

Harvest = Callable[[range, Callable[[str], None]], AbstractContextManager[None]]
"""Called with a range of groups. Returns a context manager, inside which these groups are harvested."""


def train_streaming(plan: TrainPlan, progress: TrainProgress, harvest: Harvest) -> None:
    """Train the unfinished runs of a plan whose source is a RingCache, starting at the earliest group that a run needs.

    The normalization constants are computed from the first group, since later rows are not known when training begins.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, once checkpoints have been written.
        SaeError: a run failed; raised when all other runs are done.
        Exception: any error that the harvest raised, once checkpoints have been written.
    """
    ring, device = plan.config.source, resolve_device(plan.config.device)
    assert isinstance(ring, RingCache)
    keep_freed_memory()
    trainers: dict[tuple[Any, ...], list[RunTrainer]] = {}
    with stop_on_signal() as should_stop, ExitStack() as stack:
        mention_finished(plan, progress)
        for run in plan.unfinished:
            stack.enter_context(writer_lock(run.folder, "sae train", progress.say))
            trainers.setdefault(run.batches_key, []).append(prepare_trainer(run, device, progress))
        writer = stack.enter_context(CheckpointWriter(device, plan.in_background))
        passes = [
            one
            for group in trainers.values()
            for one in shared_passes(group, plan.config, progress, should_stop, writer, not plan.eager_because)
        ]
        if not passes:
            return
        first = min(group_at(ring, one, one.steps_done) for one in passes)
        last = max(group_at(ring, one, one.max_steps) for one in passes)
        stack.enter_context(harvest(range(first, last + 1), progress.say))
        for group in range(first, last + 1):
            waited = ring.wait_for_group(group, should_stop)
            for one in passes:
                one.seconds_waited += waited
                if group_at(ring, one, one.steps_done) == group:
                    train_on_group(ring, one)
            ring.release_group(group)
            if not any(one.active for one in passes):
                break
    raise_problems(plan)


def group_at(ring: RingCache, shared_pass: SharedPass, step: int) -> int:
    """The group that a pass reads at a step; after the last step, the group that it read last."""
    return ring.group_at(min(step, shared_pass.max_steps - 1), shared_pass.batch_size)


def train_on_group(ring: RingCache, shared_pass: SharedPass) -> None:
    """Train the runs of a pass on the rest of the group that is open at the moment."""
    assert ring.current_group is not None
    if not shared_pass.steps_done:
        for trainer in shared_pass.active:
            set_normalization(trainer, ring.current_group)
    shared_pass.train(
        min(ring.cumulative_batches(shared_pass.batch_size)[ring.current_group.number], shared_pass.max_steps)
    )
