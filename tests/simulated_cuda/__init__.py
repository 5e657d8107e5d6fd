"""A simulated GPU for machines without one: tensors that report the device cuda:0 and hold real values in CPU memory.

It can test whatever does not depend on the arithmetic of a GPU: that tensors on two devices are never combined, that
the host waits for nothing inside a step, that copies are ordered, and that values equal those on the CPU. It measures
nothing.

    cuda_hooks.cpp   what torch asks of CUDA before it differentiates a tensor that says it is there
    build.py         builds it, once for each version of torch
    tensors.py       the tensors, and what each operation does with them
    functions.py     what never reaches an operation: torch.tensor, pinned memory, streams, the properties of the GPU
    ledger.py        what the host read and copied, with the line of the package that did it
    graphs.py        CUDA graphs, which run the captured operations on the same memory again
    streams.py       streams and events whose copies run as late as they can
    worker.py        the process that has the GPU; `gpu.py` calls its functions from the tests
    cost.py          what each operation costs on a GPU: launches, FLOPs, bytes
    counting.py      counts a training step, with shapes and no values; see benchmarks/step_budget.py
    training.py, harvesting.py, evaluating.py, ...   what the tests let it do
"""
