"""Free memory is the minimum of what the system, control groups and $SAE_MEMORY_GB leave. Errors of full memory."""

import math
import weakref
from pathlib import Path

import pytest
import torch

from sae.common import memory
from sae.common.errors import UsageError
from sae.common.memory import available_memory, out_of_memory, release


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine of 8 GiB, 4 GiB of them available, with the control groups that a test writes."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.delenv(memory.LIMIT, raising=False)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", f"MemTotal: {8 << 20} kB\nMemAvailable: {4 << 20} kB\n")
    return write


def test_without_limits_the_system_decides(machine):
    assert available_memory("cpu") == 4 << 30
    machine("proc/meminfo", f"MemTotal: {8 << 20} kB\n")
    assert available_memory("cpu") == math.inf


def test_the_processes_of_a_launcher_share_what_their_machine_has(machine, monkeypatch):
    """They do not share the limit that the environment variable sets: it applies to each process."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory("cpu") == 1 << 30
    monkeypatch.setenv(memory.LIMIT, "0.5")
    assert available_memory("cpu") == 0.5e9


def test_every_group_above_limits_too(machine):
    machine("proc/self/cgroup", "0::/user/job/task\n")
    machine("cgroup/user/job/task/memory.max", "max\n")
    machine("cgroup/user/job/task/memory.current", "1000\n")
    for name, text in {"max": 3 << 30, "current": 2 << 30, "stat": f"anon 5\ninactive_file {1 << 30}\n"}.items():
        machine(f"cgroup/user/job/memory.{name}", str(text))
    assert available_memory("cpu") == 2 << 30  # the free memory, and the cached files that can be dropped
    for name, text in {"max": 1 << 30, "current": 2 << 30, "stat": "inactive_file 0"}.items():
        machine(f"cgroup/user/memory.{name}", str(text))
    assert available_memory("cpu") == 0  # the group is over its limit; the result is not negative


@pytest.mark.parametrize("visible", [True, False])
def test_the_first_version_of_control_groups(machine, visible):
    """In a container, the path in /proc/self/cgroup is the host's, and only the root group is visible."""
    machine("proc/self/cgroup", "3:cpu,memory:/docker/abc\n2:cpuset:/x\n0::/\n")
    place = "docker/abc/" if visible else ""
    machine(f"cgroup/memory/{place}memory.limit_in_bytes", str(2 << 30))
    machine(f"cgroup/memory/{place}memory.usage_in_bytes", str(1 << 30))
    machine(f"cgroup/memory/{place}memory.stat", "total_inactive_file 7\n")
    assert available_memory("cpu") == (1 << 30) + 7


def test_the_variable_bounds_it(machine, monkeypatch):
    monkeypatch.setenv(memory.LIMIT, "1.5")
    assert available_memory("cpu") == 1.5e9
    monkeypatch.setenv(memory.LIMIT, "100")
    assert available_memory("cpu") == 4 << 30
    for text in ("0", "-1", "much", "nan"):
        monkeypatch.setenv(memory.LIMIT, text)
        with pytest.raises(UsageError, match=f"SAE_MEMORY_GB={text} is not a positive number of GB"):
            available_memory("cpu")


def test_a_gpu_says_itself(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    assert available_memory("cuda:1") == 3 << 30
    monkeypatch.setenv(memory.LIMIT, "2")
    assert available_memory("cuda") == 2e9


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_is_out_of_memory(error, is_one):
    assert out_of_memory(error) is is_one


def test_what_the_allocator_raises_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_what_an_error_keeps_alive_is_freed():
    freed = []

    def fill() -> None:
        tensor = torch.zeros(8)
        weakref.finalize(tensor, freed.append, "tensor")
        try:
            raise MemoryError("first")
        except MemoryError as first:
            raise RuntimeError("second") from first

    try:
        fill()
    except RuntimeError as error:
        assert not freed
        release(error, "cpu")
        assert freed == ["tensor"]
