"""Copies that run in parallel with the steps, on streams that run as late as they can, in random orders."""

import contextlib
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load

from sae.cache.loader import BatchLoader, HostToDevice, as_uint16
from sae.cache.measure import measure_rows
from sae.cache.reader import Cache
from sae.harvest.device_copy import DeviceCopy
from sae.harvest.device_window import DeviceWindow, host_memory
from sae.train import checkpoint_writer
from sae.train.checkpoint_writer import CheckpointWriter, StateFile

from . import streams
from .functions import simulated_gpu
from .tensors import GPU, SimulatedTensor, pin

WIDTH, STEPS, SLOTS = 3, 40, 4


def wrong_batches(orders: int, without: str = "") -> list[int]:
    """The seeds of the random orders in which a step reads a wrong batch from `HostToDevice`, `without` one wait."""
    with simulated_gpu():
        return [seed for seed in range(orders) if not all(send_batches(random.Random(seed), without))]


def send_batches(chance: random.Random, without: str) -> list[bool]:
    """Interleave the reads of a loader and the steps of a training loop at random.

    Steps are queued on a stream that runs late too, so a copy can run too early as well as too late. Returns for each
    step whether its batch is right.
    """
    compute = streams.Stream()
    with streams.use_stream(compute), removed(without, compute):
        slots = [pin(torch.full((WIDTH,), -1.0)) for _ in range(SLOTS)]
        copier = HostToDevice(slots, GPU)
        copier.stream.hurries = lambda: chance.random() < 0.3  # some jobs run late, others at once
        if without == "copy waits for the step":
            copier.stream.wait_event = lambda event: None  # type: ignore[method-assign]
        free, filled, lent, right = list(range(SLOTS)), {}, None, []

        def read() -> None:
            if free:
                slot = free.pop(0)
                copier.wait_until_copied(slot)
                number = len(filled)
                slots[slot].fill_(number)
                filled[number] = slot

        for number in range(STEPS):
            if lent is not None:
                free.append(lent)
            for _ in range(chance.randrange(4)):
                read()
            while number not in filled:
                read()
            lent = filled[number]
            batch = copier.take(number, lent, filled.get(number + 1))
            assert isinstance(batch, SimulatedTensor)
            compute.push(lambda held=batch.held, n=number: right.append(bool((held == n).all())))
            for stream in (compute, copier.stream):
                if chance.random() < 0.3:
                    stream.drain(chance.randrange(stream.done, len(stream.jobs) + 1))
        compute.synchronize()
    assert len(right) == STEPS
    return right


def wrong_batches_of_a_loader(folder: Path, count: int) -> list[int]:
    """The batches of a cache that steps read wrongly. All steps run after the last one has been queued."""
    cache, compute = Cache(folder), streams.Stream()
    with BatchLoader(cache, "layer_00", 64) as batches:
        expected = [next(batches).clone() for _ in range(count)]
    wrong: list[int] = []

    def step(held: torch.Tensor, number: int) -> None:
        if not torch.equal(held, expected[number]):
            wrong.append(number)

    with simulated_gpu(), streams.use_stream(compute):
        with BatchLoader(cache, "layer_00", 64, device="cuda") as batches:
            for number in range(count):
                batch = next(batches)
                assert isinstance(batch, SimulatedTensor)
                compute.push(partial(step, batch.held, number))
            compute.synchronize()
    return wrong


def wrong_windows(orders: int, without: str = "") -> list[int]:
    """The seeds of the random orders in which `DeviceCopy` puts other rows into a window than those that were sent."""
    with simulated_gpu():
        return [seed for seed in range(orders) if not send_rows(random.Random(seed), without)]


def send_rows(chance: random.Random, without: str) -> bool:
    """Send the rows of forward passes whose results are late, and reuse their memory as soon as torch would."""
    compute, passes, rows = streams.Stream(), 12, 5
    window = np.zeros((passes * rows, WIDTH), np.uint16)
    slot = np.random.default_rng(chance.randrange(1 << 30)).permutation(len(window))
    sent = torch.arange(window.size, dtype=torch.float32).reshape(window.shape).bfloat16()
    with streams.use_stream(compute), removed(without, compute):
        copy = DeviceCopy(GPU)
        assert copy.cuda_stream is not None
        copy.cuda_stream.hurries = lambda: chance.random() < 0.3  # some jobs run late, others at once
        if without == "copy waits for the pass":
            copy.cuda_stream.wait_stream = lambda other: None  # type: ignore[method-assign]
        if without == "host waits for the copy":
            copy.cuda_stream.record_event = lambda event=None: streams.Event()  # type: ignore[method-assign]
        for number in range(passes):
            part = slice(number * rows, number * rows + chance.randrange(1, rows + 1))
            x = SimulatedTensor(torch.full_like(sent[part], -1))
            compute.push(lambda held=x.held, values=sent[part]: held.copy_(values))
            copy.send({"layer": x}, slot[part], {"layer": window})
            if copy.cuda_stream not in x.used_by:
                compute.push(lambda held=x.held: held.fill_(-2))
            window[slot[part.stop : (number + 1) * rows]] = as_uint16(sent[part.stop : (number + 1) * rows])
            if chance.random() < 0.3:
                compute.drain(chance.randrange(compute.done, len(compute.jobs) + 1))
        copy.wait()
    return bool((window[slot] == as_uint16(sent)).all())


def wrong_windows_of_a_gpu(orders: int, without: str = "") -> list[int]:
    """The seeds of the random orders in which a GPU window, or its norms and moments, arrive with wrong values."""
    with simulated_gpu():
        return [seed for seed in range(orders) if not send_windows(random.Random(seed), without)]


def send_windows(chance: random.Random, without: str) -> bool:
    """Send windows of one `DeviceWindow`, and receive each at a random time before its memory is needed again."""
    rows, chunk_rows = 10, 4
    with contextlib.ExitStack() as stack:
        if without == "placing waits for the copy":
            stack.enter_context(mock.patch.object(DeviceWindow, "_wait_for_copy", lambda self: None))
        if without == "host waits for the copy":
            stack.enter_context(mock.patch.object(streams.Event, "synchronize", lambda self: None))
        window = DeviceWindow(GPU, rows)
        assert isinstance(window.stream, streams.Stream)
        window.stream.hurries = lambda: chance.random() < 0.3
        window.begin({"layer": WIDTH})
        memory = [host_memory(rows, {"layer": WIDTH}, pinned=True) for _ in range(2)]
        right, pending = [], []
        for number in range(STEPS):
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(number))
            x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number)).bfloat16()
            count = rows - number % 3  # some windows are shorter
            for part in order[order < count].split(4):
                window.place({"layer": x[part].to("cuda")}, part.to("cuda"))
            pending.append((window.send(memory[number % 2], count, chunk_rows), memory[number % 2]["layer"], x[:count]))
            while pending and (len(pending) == 2 or chance.random() < 0.5):
                receive, received, expected = pending.pop(0)
                norms, moments = receive()["layer"]
                alone = measure_rows(as_uint16(expected), chunk_rows)
                right.append(
                    torch.equal(received[: len(expected)], expected)
                    and bool((norms == alone.norms).all() and (moments == alone.moments).all())
                )
    return all(right)


def wrong_checkpoints(orders: int, without: str = "") -> list[int]:
    """The seeds of the random orders in which `CheckpointWriter` writes another state than the one it was given."""
    with simulated_gpu():
        return [seed for seed in range(orders) if not save_states(random.Random(seed), without)]


def save_states(chance: random.Random, without: str) -> bool:
    """Run steps that change a state in place, on a stream that runs late, and save checkpoints between them."""
    compute, other = streams.Stream(), streams.Stream()
    state = {name: SimulatedTensor(torch.full((WIDTH,), -1.0)) for name in ("weights", "moments")}
    written: dict[int, list[float]] = {}
    pauses = [chance.choice((0.0, 0.002)) for _ in range(STEPS)]

    def write(_folder: Path, step: int, data: memoryview, _run: str) -> None:
        time.sleep(pauses[step])
        written[step] = [float(value) for tensor in load(bytes(data)).values() for value in tensor]
        time.sleep(pauses[step])

    trainer = mock.Mock(digest="", run=mock.Mock(folder=Path()))
    patches = [
        mock.patch.object(checkpoint_writer, "training_state", lambda _: state),
        mock.patch.object(checkpoint_writer, "write_checkpoint", write),
    ]
    if without == "thread waits for the copies":
        patches.append(mock.patch.object(CheckpointWriter, "_mark", lambda self: None))
    if without == "next waits for the one before":
        patches.append(mock.patch.object(CheckpointWriter, "wait", lambda self: None))
    if without == "copies are on the stream of training":
        copy = StateFile.copy

        def beside(file: StateFile, tensors: dict[str, torch.Tensor]) -> None:
            other.wait_stream(compute)
            with streams.use_stream(other):
                copy(file, tensors)

        patches.append(mock.patch.object(StateFile, "copy", beside))
        patches.append(mock.patch.object(CheckpointWriter, "_mark", lambda self: other.record_event()))
    saved = []
    with streams.use_stream(compute), contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        with CheckpointWriter(GPU) as writer:
            for number in range(STEPS):
                for tensor in state.values():
                    compute.push(lambda held=tensor.held, n=number: held.fill_(n))
                if chance.random() < 0.3:
                    writer.save([trainer], number)
                    saved.append(number)
                if chance.random() < 0.3:
                    compute.drain(chance.randrange(compute.done, len(compute.jobs) + 1))
    return written == {number: [float(number)] * 2 * WIDTH for number in saved}


@contextlib.contextmanager
def removed(what: str, compute: streams.Stream) -> Iterator[None]:
    """Remove the wait with this name. Names not listed here are handled where the streams are created."""
    patches = {
        "step waits for the copy": (compute, "wait_event"),
        "reader waits for the copy": (HostToDevice, "wait_until_copied"),
        "memory is kept": (SimulatedTensor, "record_stream"),
    }
    with contextlib.ExitStack() as stack:
        if what in patches:
            stack.enter_context(mock.patch.object(*patches[what], lambda *_: None))
        yield
