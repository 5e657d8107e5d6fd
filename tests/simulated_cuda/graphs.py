"""CUDA graphs: each launch runs the captured kernels again, on the same memory that they used during the capture.

As on a GPU, a launch sees stale values of tensors that were rebound or created outside the graph, and of numbers that
the host computed. A capture has no effect: at its end, memory that operations have written gets its old values back.
During a capture it is an error to read a value, to copy from or to host memory, or to use a stream that did not wait
for the capture's stream. At its end it is an error if the capture's stream does not wait for another one that was used.
That a graph may use the same memory twice is not simulated.
"""

import contextlib
from functools import partial
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import streams
from .cost import launches_nothing
from .ledger import refusing
from .tensors import CPU, GPU, SimulatedTensor, held, mapped, tensors_of

CAPTURING = "operation not permitted when stream is capturing"


class CUDAGraph:
    """Replaces torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.origin: streams.Stream | None = None
        self.jobs: dict[streams.Stream, list[streams.Job]] = {}

    def replay(self) -> None:
        streams.current_stream().push(self.run)

    def run(self) -> None:
        assert self.origin is not None, "nothing was captured"
        for stream, jobs in self.jobs.items():
            stream.jobs, stream.done = list(jobs), 0
        with _disable_current_modes(), torch.no_grad():
            self.origin.synchronize()
        for stream in self.jobs:
            stream.jobs, stream.done = [], 0

    def joined(self) -> bool:
        """Whether the capture's stream waits, directly or indirectly, for all work of the other streams."""
        assert self.origin is not None
        reached = dict.fromkeys(self.jobs, 0)
        ahead = [(self.origin, len(self.jobs[self.origin]))]
        while ahead:
            stream, until = ahead.pop()
            waits = [getattr(job, "__self__", None) for job in self.jobs[stream][reached[stream] : until]]
            ahead += [(one.stream, one.until) for one in waits if isinstance(one, streams.Event) and one.stream]
            reached[stream] = max(reached[stream], until)
        return all(reached[stream] == len(jobs) for stream, jobs in self.jobs.items())


class graph:  # noqa: N801  (in the place of torch.cuda.graph)
    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: streams.Stream | None = None, **_: object
    ) -> None:
        self.graph, self.origin = cuda_graph, stream or streams.Stream()
        self.stack = contextlib.ExitStack()
        self.recorder = Recorder()

    def __enter__(self) -> None:
        streams.current_stream().synchronize()
        assert not streams.captured, "a capture inside a capture"
        streams.captured.append(self.origin)
        self.stack.callback(streams.captured.clear)
        self.stack.enter_context(streams.use_stream(self.origin))
        self.stack.enter_context(refusing(CAPTURING))
        # The optimizer asks these whether its step is being captured.
        for name, answer in (("current_accelerator", GPU), ("current_stream", self.origin)):
            self.stack.enter_context(mock.patch.object(torch.accelerator, name, lambda *_, answer=answer, **__: answer))
        self.stack.enter_context(self.recorder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.graph.origin = self.origin
        self.graph.jobs = {stream: list(stream.jobs) for stream in streams.captured}
        for stream in streams.captured:
            stream.jobs, stream.done = [], 0
        self.stack.__exit__(kind, error, trace)
        self.recorder.put_back()
        if kind is None and not self.graph.joined():
            raise RuntimeError("CUDA error: capturing stream has unjoined work")


class Recorder(TorchDispatchMode):
    """Queues each kernel, with its memory, on the current stream, and discards what it computes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        result = func(*args, **kwargs)
        if not any(isinstance(tensor, SimulatedTensor) for tensor in tensors_of((args, kwargs, result))):
            return result  # the host's
        if launches_nothing(func):
            return result
        stream = streams.current_stream()
        if stream not in streams.captured:
            raise RuntimeError(f"CUDA error: {CAPTURING}: a stream that did not wait for the capture's has work")
        if func.overloadpacket.__name__ == "copy_":  # it has queued itself, and later operations need its values
            held(args[0]).copy_(held(args[1]))
        else:
            outputs = tensors_of(fixed(result))
            stream.push(partial(run_kernel, func, fixed(args), fixed(kwargs), outputs))
        return result

    def put_back(self) -> None:
        for storage, values in self.before.values():
            storage.copy_(values)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes, with their values."""
    schema = func._schema.arguments
    given = [*zip(schema, args, strict=False), *[(one, kwargs[one.name]) for one in schema if one.name in kwargs]]
    changed = [value for one, value in given if one.alias_info is not None and one.alias_info.is_write]
    return [held(tensor) for tensor in tensors_of(changed) if isinstance(tensor, SimulatedTensor)]


def fixed(tree: Any) -> Any:
    """The arguments or results of a kernel: GPU memory with its current shape, and copies of the host's values."""
    return mapped(lambda tensor: tensor.held.detach() if isinstance(tensor, SimulatedTensor) else tensor.clone(), tree)


def run_kernel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
    kwargs = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "non_blocking")}
    if kwargs.get("device") is not None:
        kwargs["device"] = CPU
    for target, result in zip(outputs, tensors_of(func(*args, **kwargs)), strict=False):
        if target.data_ptr() != result.data_ptr():
            target.copy_(result)
