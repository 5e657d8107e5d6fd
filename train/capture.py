"""`sae train --capture`: run the steps of all runs of a pass as one CUDA graph.

An eager step launches a hundred or more kernels, one after the other. For a small SAE, the host takes longer to launch
them than the GPU takes to run them. A graph contains the kernels for one step of every run, with a separate stream per
run. One launch starts them all.

Each launch of a graph runs the same kernels on the same memory. So everything that changes between steps is updated in
place, on the device: the batch is copied to where the graph reads it; the learning rate and all coefficients are
computed from the step index; counters, averages and metrics are added up in place. When the shapes of a step change
(`Mechanism.shape_key`), a new graph is captured. The first step with new shapes runs eagerly; it also creates Adam's
moments and loads the kernels. The second step is captured. A capture computes nothing, so the graph is launched
afterwards to compute the second step.

The results equal those of eager steps bit for bit. The tests show this on a simulated GPU. No real GPU was available,
so neither the equality nor the speed has been measured on one.
"""

import copy
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..common.errors import first_line
from .loop import Trainer
from .optimizer import capturable
from .step import Step


class CapturedSteps:
    """A CUDA graph of the steps of several trainers, captured when possible and captured again when shapes change.

    If a step cannot be captured, `say` is called with the reason, and all further steps are eager. No step is lost,
    since nothing is computed during a capture.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.refused = False
        self._key: Hashable = None  # the key of the graph; before there is a graph, the key of the last eager step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._x_BD: Tensor  # the memory from which the graph reads the batch
        self._steps: dict[Trainer, Step] = {}  # in the memory of the graph

    def replay(self, trainers: Sequence[Trainer], x_BD: Tensor) -> dict[Trainer, Step]:
        """Launch a step of every trainer on a batch (B, d_in).

        Returns each trainer's `Step`, for the mechanisms that act between steps; an empty dict if no steps were taken.
        In that case the caller has to run the steps one by one.
        """
        key = (x_BD.shape, *((trainer, trainer.variant.shape_key()) for trainer in trainers))
        if self.refused:
            return {}
        if key != self._key:
            self._forget()
            self._key = key
            return {}
        if self._graph is None:
            try:
                self._capture(trainers, x_BD)
            except RuntimeError as error:  # CUDA cannot capture the steps, or memory ran out
                self._give_up(trainers, error)
                return {}
        assert self._graph is not None
        self._x_BD.copy_(x_BD)
        for trainer in trainers:
            trainer.changing = True
        self._graph.replay()
        # Return copies, because values that a step computes lazily for mechanisms are valid for that step alone.
        return {trainer: copy.copy(step) for trainer, step in self._steps.items()}

    def _capture(self, trainers: Sequence[Trainer], x_BD: Tensor) -> None:
        self._x_BD = torch.empty_like(x_BD)
        graph, origin = torch.cuda.CUDAGraph(), torch.cuda.Stream(x_BD.device)
        streams = [torch.cuda.Stream(x_BD.device) for _ in trainers]
        # During the capture, other threads copy batches and checkpoints. In the mode thread_local, these threads are
        # allowed to wait for the device, and their work is not captured.
        with torch.cuda.graph(graph, stream=origin, capture_error_mode="thread_local"):
            for trainer, stream in zip(trainers, streams, strict=True):
                stream.wait_stream(origin)
                with torch.cuda.stream(stream), capturable(trainer.optimizer):
                    self._steps[trainer] = detached(trainer.step(self._x_BD))
            for stream in streams:
                origin.wait_stream(stream)
        self._graph = graph

    def _give_up(self, trainers: Sequence[Trainer], error: Exception) -> None:
        self.refused = True
        self._forget()
        for trainer in trainers:
            trainer.optimizer.zero_grad(set_to_none=True)
            trainer.changing = False
        self.say(f"Steps are launched one by one, as they cannot be captured in a CUDA graph: {first_line(error)}")

    def _forget(self) -> None:
        """Free the graph and its memory."""
        self._steps.clear()
        self._graph = None


def detached(step: Step) -> Step:
    """A copy of a step without the step's autograd graph, which would otherwise outlive the capture.

    The copy shares the memory of the step's tensors.
    """
    kept = copy.copy(step)
    vars(kept).update(tree_map_only(Tensor, Tensor.detach, vars(step)))
    return kept
