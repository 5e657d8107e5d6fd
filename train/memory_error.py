"""When training runs out of memory, save the runs as they were before the step; the raised error says what to reduce.

Until the optimizer changes the weights, a step has changed nothing that a checkpoint contains. If memory ran out while
the weights were being changed, or while mechanisms were acting between two steps, the state of the run is inconsistent.
Such a run continues from its newest checkpoint on the disk.
"""

from collections.abc import Sequence

from ..cache.ring import RingCache
from ..common.errors import SaeError, UnavailableError, first_line
from ..common.escaping import quote
from ..common.memory import LIMIT, out_of_memory, release
from .accumulate import reasons_against
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .passes import pass_memory
from .run_trainer import RunTrainer


def save_after_running_out(trainers: Sequence[RunTrainer], error: BaseException, config: TrainConfig) -> SaeError:
    """Save the runs of a pass in which memory ran out, and return the error to raise."""
    device, said = trainers[0].device, first_line(error).rstrip(".")
    for trainer in trainers:
        trainer.optimizer.zero_grad(set_to_none=True)
    release(error, device)
    steps = [f"{trainer.run.name} continues from step {save_if_whole(trainer):,}" for trainer in trainers]
    return UnavailableError(
        f"{device} is out of memory ({said}). Nothing is lost: {', '.join(steps)}. {describe_ways_on(trainers, config)}"
    )


def save_if_whole(trainer: RunTrainer) -> int:
    """Write a checkpoint, unless memory ran out while a step was changing the state of the run.

    Returns the step at which the run will continue.
    """
    step = int(trainer.i)
    if step and not trainer.changing:
        try:
            save_checkpoint(trainer, trainer.run.folder, step, trainer.digest)
        except (SaeError, RuntimeError, MemoryError) as error:  # the disk is full, or memory too small
            if not (isinstance(error, SaeError) or out_of_memory(error)):
                raise
        else:
            return step
    saved = trainer.run.folder.glob("checkpoints/step-*/state.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in saved), default=0)


def describe_ways_on(trainers: Sequence[RunTrainer], config: TrainConfig) -> str:
    """What the user can do to continue with less memory."""
    streaming = isinstance(config.source, RingCache)
    folders = " ".join(f"--resume {quote(trainer.run.folder)}" for trainer in trainers)
    command = "the same command" if streaming else f"`sae train {folders}`"
    ways = ["free memory on the device"]
    if len(trainers) > 1 and not streaming:
        planned = pass_memory([trainer.run for trainer in trainers], trainers[0].device).total / 1e9
        ways.append(f"set {LIMIT}={planned:.2g} to get passes with fewer runs")
    parts = 2 * max(trainer.parts for trainer in trainers)
    if not streaming and all(may_divide(trainer, parts) for trainer in trainers):
        ways.append(f"add --accumulate {parts}, which gives the same result up to rounding")
    return (
        f"To continue, first {' or '.join(ways)}, then run {command}. A new run can also have a smaller --batch-size "
        "or --width."
    )


def may_divide(trainer: RunTrainer, parts: int) -> bool:
    """Whether the batches of a run can be computed in `parts` parts."""
    config = trainer.run.config
    return config.batch_size % parts == 0 and not trainer.run.compiled and not reasons_against(trainer.variant)
