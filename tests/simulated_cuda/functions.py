"""Replacements for what is not dispatched as an operation: torch.tensor, pinned memory, streams, GPU properties."""

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
from torch.overrides import TorchFunctionMode

from sae.train.kernels import choice

from . import graphs, streams
from .tensors import Dispatch, SimulatedTensor, is_pinned, on_gpu, pin

GIB = 1 << 30
# From numbers, or from memory that torch does not own: made on the CPU, then copied by a call that waits.
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray)
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class Functions(TorchFunctionMode):
    """Handles torch functions that depend on the device before they dispatch an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FROM_HOST and on_gpu(kwargs.get("device")):
            if isinstance(args[0], SimulatedTensor):
                return args[0].to(kwargs.get("dtype") or args[0].dtype)
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.new_tensor and isinstance(args[0], SimulatedTensor) and "device" not in kwargs:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        if func in INDEXING and isinstance(args[0], SimulatedTensor):
            return func(args[0], listed(args[1]), *args[2:])
        if func is torch.Tensor.pin_memory:
            return pin(args[0].clone())
        if func is torch.Tensor.is_pinned:
            return is_pinned(args[0])
        if kwargs.get("pin_memory"):
            return pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)


def listed(index: Any) -> Any:
    """An index whose lists are replaced by CPU tensors; CUDA also copies lists from the host."""
    if isinstance(index, tuple):
        return tuple(listed(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


class Memory:
    """The numbers that torch.cuda.mem_get_info returns, in bytes."""

    free = 100 * GIB
    total = 140 * GIB


def install() -> None:
    """Give torch.cuda a simulated GPU. Nothing is restored afterwards, so call it only in a separate process."""
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda device=None: "simulated GPU"
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="simulated GPU", total_memory=Memory.total, major=9, minor=0, multi_processor_count=132
    )
    cuda.memory_reserved = lambda device=None: 0
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.is_current_stream_capturing = lambda: streams.current_stream().is_capturing()
    cuda.mem_get_info = lambda device=None: (Memory.free, Memory.total)
    cuda.memory_allocated = lambda device=None: 0
    cuda.get_rng_state, cuda.set_rng_state = (lambda *_: torch.get_rng_state()), (lambda *_: None)
    cuda.empty_cache = lambda: None
    cuda.synchronize = lambda device=None: streams.current_stream().synchronize()
    cuda.Stream, cuda.Event, cuda.stream = streams.Stream, streams.Event, streams.use_stream
    cuda.current_stream = streams.current_stream
    cuda.CUDAGraph, cuda.graph = graphs.CUDAGraph, graphs.graph
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    choice.reason_against_triton = lambda: "the simulated GPU runs no kernels"
    torch.autograd.set_multithreading_enabled(False)  # so that a backward pass runs on the stack of its caller


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """A context in which the device "cuda" exists, also in threads that are started inside."""
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with Functions(), Dispatch():
            run(thread)

    with mock.patch.object(threading.Thread, "run", run_there), Functions(), Dispatch():
        yield
