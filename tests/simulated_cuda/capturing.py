"""Steps captured in CUDA graphs, to compare with the same steps taken eagerly, both on the simulated GPU."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from sae.train import capture
from sae.train.capture import CapturedSteps
from sae.train.checkpoint import load_training_state, training_state
from sae.train.loop import Trainer, train_loop
from sae.train.mechanisms import DeadLatents
from sae.train.step import Step

from . import faults, streams
from .cost import Counter
from .functions import simulated_gpu
from .graphs import CUDAGraph
from .training import BATCH, D_SAE, Walk, batches, differences, on_cpu, same_arithmetic

STEPS, RESUMED = 8, 5
LOGGED = (0, 3, 7)


class CountedSteps(CapturedSteps):
    """Counts its graphs and their launches."""

    made = launched = 0

    def replay(self, trainers: Sequence[Trainer], x_BD: Tensor) -> dict[Trainer, Step]:
        before = self._graph
        taken = super().replay(trainers, x_BD)
        self.made += self._graph not in (before, None)
        self.launched += bool(taken)
        return taken


def compare(
    recipes: Sequence[str],
    options: tuple[str, ...] = (),
    parts: int = 1,
    l0: float | None = None,
    precision: str = "float32",
    sparse: bool = True,
    resumed: bool = False,
    fault: str = "",
    kernels: bool = False,
) -> dict[str, Any]:
    """Compare captured steps with eager steps of some recipes that share a pass.

    Both passes include mechanisms that act between steps, changing lists of dead latents, and logs. With `resumed`, the
    captured pass stops after some steps, and new trainers resume from its state. `fault` is a mistake that both passes
    make. Returns the differences between their results (`apart`), the numbers of graphs (`made`) and of launches of
    graphs (`launched`), and the messages (`said`).
    """
    said: list[str] = []
    captured = [CountedSteps(said.append), CountedSteps(said.append)] if resumed else [CountedSteps(said.append)]
    with simulated_gpu(), same_arithmetic(sparse), broken(fault):
        walks = [Walk(recipe, options, False, D_SAE, "cuda", Path(), parts, precision, kernels) for recipe in recipes]
        for walk in walks:
            walk.config = walk.config._replace(l0=l0)
        apart = differences(train(walks, [None]), train(walks, captured))
    made, launched = (sum(getattr(one, name) for one in captured) for name in ("made", "launched"))
    return {"apart": apart, "made": made, "launched": launched, "said": said}


def train(walks: Sequence[Walk], passes: Sequence[CapturedSteps | None]) -> dict[str, Any]:
    """The final state and the logged metrics of one pass, or of two passes, the second of which resumes the first."""
    logged: dict[str, Any] = {}
    stops = [RESUMED, STEPS][-len(passes) :]
    state: list[dict[str, Tensor]] = []
    for captured, start, stop in zip(passes, [0, *stops], stops, strict=False):
        trainers = [walk.new_trainer() for walk in walks]
        for trainer, tensors in zip(trainers, state, strict=False):
            load_training_state(trainer, tensors)
        rows = iter([x_BD.to("cuda") for x_BD in batches(STEPS, BATCH)[start:stop]])
        train_loop(trainers, rows, range(start, stop), partial(log, trainers, logged), captured and captured.replay)
        state = [on_cpu(training_state(trainer)) for trainer in trainers]
    return {"logged": logged, "state": {walk.recipe: tensors for walk, tensors in zip(walks, state, strict=True)}}


def log(trainers: Sequence[Trainer], logged: dict[str, Any], number: int) -> bool:
    if number in LOGGED or number == RESUMED - 1:  # a resumed run starts its sums of metrics anew
        logged[str(number)] = {str(n): t.pop_metrics(reset=number > 0) for n, t in enumerate(trainers)}
    return False


def launches(recipes: Sequence[str]) -> dict[str, int]:
    """The numbers of launches in an eager step of these recipes, and in a captured one."""
    counted = {}
    with simulated_gpu():
        trainers = [Walk(recipe, (), False, D_SAE, "cuda", Path(), 1).new_trainer() for recipe in recipes]
        captured = CapturedSteps(print)
        for x_BD in (x_BD.to("cuda") for x_BD in batches(4, BATCH)):
            with Counter() as counter, mock.patch.object(CUDAGraph, "replay", autospec=True) as replay:
                replay.side_effect = CUDAGraph.run
                eager = not captured.replay(trainers, x_BD)
                for trainer in trainers if eager else ():
                    trainer.step(x_BD)
            launched = sum(operation.cost.launches for operation in counter.operations) + replay.call_count
            counted["eager" if eager else "captured"] = launched
    return counted


# --- mistakes ---------------------------------------------------------------------------------------------------------


def rebinds_a_counter(dead: DeadLatents, step: Step) -> None:
    dead.since_F = (dead.since_F + step.tokens) * ~step.fired_F


def counts_on_the_host(dead: DeadLatents, step: Step) -> None:
    dead.after_tokens += 1
    dead.since_F.copy_((dead.since_F + step.tokens + dead.after_tokens) * ~step.fired_F)


def lists_anew(dead: DeadLatents) -> None:
    RESTORE(dead)
    dead.index_A, dead.real_A = dead.index_A.clone(), dead.real_A.clone()


def sums_anew(trainer: Trainer, *given: Any) -> None:
    ADD_METRICS(trainer, *given)
    trainer.metrics.sums = {name: total + 0 for name, total in trainer.metrics.sums.items()}


def waits_for_no_fork(stream: streams.Stream, other: streams.Stream) -> None:
    if stream in streams.captured:
        WAIT(stream, other)


def waits_for_no_join(stream: streams.Stream, other: streams.Stream) -> None:
    if stream not in streams.captured:
        WAIT(stream, other)


def computes_between(dead: DeadLatents, step: Step) -> None:
    """This is not a mistake. The error is computed at its first use, here between two steps."""
    assert step._error_BD is None
    BETWEEN(dead, step)
    dead.since_F.add_((1000 * step.error_BD.square().sum()).long())


RESTORE, BETWEEN = DeadLatents.after_restore, DeadLatents.every_n_steps
ADD_METRICS, WAIT = Trainer._add_metrics, streams.Stream.wait_stream
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "rebinds_a_counter": (DeadLatents, "after_step", rebinds_a_counter),
    "counts_on_the_host": (DeadLatents, "after_step", counts_on_the_host),
    "lists_anew": (DeadLatents, "after_restore", lists_anew),
    "sums_anew": (Trainer, "_add_metrics", sums_anew),
    "waits_for_no_fork": (streams.Stream, "wait_stream", waits_for_no_fork),
    "waits_for_no_join": (streams.Stream, "wait_stream", waits_for_no_join),
    "is_not_capturable": (capture, "capturable", contextlib.nullcontext),
    "computes_between": (DeadLatents, "every_n_steps", computes_between),
}


@contextlib.contextmanager
def broken(fault: str) -> Iterator[None]:
    if not fault:
        yield
    elif fault in FAULTS:
        with mock.patch.object(*FAULTS[fault]):
            yield
    else:
        with faults.after_each_step(fault):
            yield
