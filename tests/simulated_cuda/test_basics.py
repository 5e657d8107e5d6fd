"""The simulated GPU does what CUDA is known to do with single operations."""

import pytest

from .gpu import Failed, SimulatedGPU

READ, PAGEABLE, QUEUED = "the host reads", "pageable memory", "a copy is queued"
WAITING = (
    "item", "float", "if", "tolist", "cpu", "nonzero", "mask", "equal", "unique", "cholesky", "repeat_interleave",
    "copy_ to pageable memory", "copy_ that blocks",
)  # fmt: skip
COPIES = (
    "to", "to without blocking", "to of pinned memory that blocks", "tensor", "as_tensor", "new_tensor", "copy_",
    "index", "index by a list", "assigned at an index",
)  # fmt: skip
FREE = (
    "full", "arange", "number of the host", "fill_", "index of its own", "slice", "topk", "pinned",
    "pinned by pin_memory", "copy_ to pinned memory", "cholesky_ex",
)  # fmt: skip
REFUSED = {
    "generator": "Expected a 'cuda' device type for generator but found 'cpu'",
    "numpy": "can't convert cuda:0 device type tensor to numpy",
    "index of a CPU tensor": "indices should be either on cpu or on the same device as the indexed tensor (cpu)",
    **dict.fromkeys(
        ("add", "matmul", "matmul the other way", "cat", "stack of numbers", "value at an index", "out", "foreach"),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    ),
}


def test_what_waits_for_the_gpu_is_written_down(gpu: SimulatedGPU) -> None:
    for name in WAITING:
        assert any(READ in line for line in gpu("basics.seen_by", kind="WAITING", name=name)), name


def test_what_copies_pageable_memory_is_written_down(gpu: SimulatedGPU) -> None:
    for name in COPIES:
        seen = gpu("basics.seen_by", kind="PAGEABLE", name=name)
        assert seen and all(PAGEABLE in line and line.startswith("tests/simulated_cuda/basics.py:") for line in seen)


def test_what_waits_for_nothing_is_not(gpu: SimulatedGPU) -> None:
    for name in FREE:
        assert not [line for line in gpu("basics.seen_by", kind="FREE", name=name) if QUEUED not in line], name


@pytest.mark.parametrize("name", REFUSED)
def test_devices_do_not_mix(gpu: SimulatedGPU, name: str) -> None:
    message = gpu("basics.refusal", name=name)
    assert message.startswith(REFUSED[name]) and "tests/simulated_cuda/basics.py:" in message


def test_gradients_are_those_of_the_cpu(gpu: SimulatedGPU) -> None:
    cpu, found, dtype = gpu("basics.gradients_of_both")
    assert cpu == found and dtype == "torch.bfloat16"


def test_a_module_is_moved_as_by_torch(gpu: SimulatedGPU) -> None:
    assert gpu("basics.module_on_both") == [True, "cuda:0", "cuda:0", True]


def test_an_error_in_the_other_process_has_its_traceback(gpu: SimulatedGPU) -> None:
    with pytest.raises(Failed, match=r"basics\.py.*in seen_by(.|\n)*KeyError: 'none'"):
        gpu("basics.seen_by", kind="FREE", name="none")
