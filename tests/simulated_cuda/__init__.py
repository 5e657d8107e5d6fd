"""A simulated GPU for machines without one: tensors that report the device cuda:0 and hold real values in CPU memory.

It can test whatever does not depend on the arithmetic of a GPU: that tensors on two devices are never combined, that
the host waits for nothing inside a step, that copies are ordered, and that values equal those on the CPU. It measures
nothing.

    cuda_hooks.cpp   the CUDA functions that torch calls before it differentiates a tensor on cuda:0
    build.py         builds it, once for each version of torch
    tensors.py       the tensors, and what each operation does with them
    functions.py     what is not dispatched as an operation: torch.tensor, pinned memory, streams, GPU properties
    ledger.py        records what the host reads and copies, with the line of the package that does it
    graphs.py        CUDA graphs, which run the captured operations on the same memory again
    streams.py       streams and events whose jobs run as late as possible
    worker.py        the process that has the GPU; `gpu.py` calls its functions from the tests
    cost.py          what each operation costs on a GPU: launches, FLOPs, bytes
    counting.py      counts a training step from shapes, without values; see benchmarks/step_budget.py
    training.py, harvesting.py, evaluating.py, ...   what the tests run on it
"""
