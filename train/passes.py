"""Group runs into passes: runs that read the same batches share a pass if they fit into free memory together.

Runs do not depend on each other, so several passes give the same results as one pass, bit for bit on a CPU.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from ..common.errors import UnavailableError, UsageError
from ..common.formatting import format_bytes, format_count
from ..common.memory import LIMIT, available_memory
from ..common.packages import EXTRAS, installed_version
from .accumulate import reasons_against
from .kernels.choice import reason_against_kernels
from .memory import BuildableRun, RunMemory, host_bytes, memory_bound, run_memory, state_bytes, untrained_variant
from .recipe import Recipe
from .variant import RunConfig

FREE_SHARE = 0.9  # share of the free memory that a planned pass may use; allocators and libraries need the rest
SLOTS, DEVICE_BUFFERS = 4, 2  # batches that a loader holds in host memory, and on a GPU
WORKSPACE = {"cpu": 128 << 20, "cuda": 96 << 20}
"""Bytes needed in addition to tensors. cpu: glibc keeps freed blocks of up to 32 MB, some unused; measured by
benchmarks/step_memory.py. cuda: about the size of the cuBLAS workspace; not measured."""
WIDTH_STEP = 64


class PassRun(BuildableRun, Protocol):
    """A run that shares passes. `plan.Run` implements this."""

    @property
    def batches_key(self) -> tuple[Any, ...]: ...
    @property
    def compiled(self) -> bool: ...


AnyRun = TypeVar("AnyRun", bound=PassRun)


class Resized(NamedTuple):
    """A run with another config."""

    recipe: Recipe
    options: Mapping[str, Any]
    stored: Mapping[str, Any] | None
    config: RunConfig


class PassMemory(NamedTuple):
    """The device memory, in bytes, that the runs of one pass take."""

    state: int  # total of all runs
    step: int  # additional during a step: the largest of any run, since runs take turns
    batches: int  # the batches that the loader holds, and `WORKSPACE`

    @property
    def total(self) -> int:
        return sum(self)


def group_by_pass(runs: Iterable[AnyRun]) -> list[list[AnyRun]]:
    """The runs grouped by the batches that they read, regardless of memory."""
    groups: dict[tuple[Any, ...], list[AnyRun]] = {}
    for run in runs:
        groups.setdefault(run.batches_key, []).append(run)
    return list(groups.values())


def pass_memory(runs: Sequence[BuildableRun], device: str) -> PassMemory:
    """The memory of runs that are on the device together."""
    return add_up([run_memory(run, device) for run in runs], runs[0].config, device)


def add_up(memories: Sequence[RunMemory], config: RunConfig, device: str) -> PassMemory:
    """The total memory of runs with these sizes.

    `config` is the config of one of the runs, which all have the same batch size.
    """
    kind = torch.device(device).type
    batch = 2 * config.batch_size * config.d_in
    step = max(memory.step for memory in memories)
    if kind == "cpu":  # the host is the device
        step = max(step, max(memory.host for memory in memories))
    slots = SLOTS if kind == "cpu" else DEVICE_BUFFERS
    return PassMemory(sum(memory.state for memory in memories), step, slots * batch + WORKSPACE[kind])


def captured_memory(runs: Sequence[BuildableRun], device: str) -> int:
    """The memory, in bytes, that runs take if the steps of all of them are captured in one CUDA graph.

    The runs execute at the same time, each on its own stream with its own workspace. The graph has its own copy of the
    batch.
    """
    state, _, batches = pass_memory(runs, device)
    steps = sum(run_memory(run, device).step for run in runs)
    return state + steps + batches + len(runs) * WORKSPACE["cuda"] + 2 * runs[0].config.batch_size * runs[0].config.d_in


def reserved_memory(runs: Sequence[BuildableRun], device: str, captured: bool = False) -> int:
    """The bytes to leave free for runs: a generous bound if memory is plentiful, otherwise the estimate."""
    bound = sum(map(memory_bound, runs))
    if bound < available_memory(device) / 2:
        return bound
    return captured_memory(runs, device) if captured else pass_memory(runs, device).total


def split_by_memory(runs: Sequence[AnyRun], device: str, free: float) -> list[list[AnyRun]]:
    """Split the runs of a pass into passes that fit into memory. Each run goes into the first pass with room for it.

    Raises UnavailableError for a run that does not fit alone; the message says what would fit.
    """
    budget = FREE_SHARE * free
    if sum(map(memory_bound, runs)) <= budget:
        return [list(runs)]
    passes: list[list[AnyRun]] = []
    for run in runs:
        for one in passes:
            if pass_memory([*one, run], device).total <= budget:
                one.append(run)
                break
        else:
            if pass_memory([run], device).total > budget:
                raise UnavailableError(describe_refusal(run, device, free))
            passes.append([run])
    return passes


def plan_passes(runs: Sequence[AnyRun], device: str, streaming: bool = False) -> list[list[AnyRun]]:
    """Divide runs into passes, each of which fits into the memory that is free on a device now.

    If `streaming` is set, all runs have to fit into one pass.

    Raises:
        UnavailableError: a run does not fit alone, or `streaming` is set and the runs do not fit together.
    """
    free = available_memory(device)
    if not streaming:
        return [one for group in group_by_pass(runs) for one in split_by_memory(group, device, free)]
    if runs and len(split_by_memory(runs, device, free)) > 1:
        raise UnavailableError(
            f"{format_count(len(runs), 'run')} take {format_bytes(pass_memory(runs, device).total)} together, and "
            f"{describe_free(device, free)}. --stream trains all of them at once: train fewer, or harvest first "
            "(`sae harvest`) and train from the cache, which takes several passes if necessary."
        )
    return [list(runs)] if runs else []


def describe_kernels(runs: Iterable[BuildableRun], device: str) -> str:
    """For a GPU, the plan's line about kernels: what they do, or why none are used. "" if there are no runs."""
    variants = [untrained_variant(run, "meta") for run in runs]
    of_latents = ["select latents", "decode them", "compute gradients of JumpReLU and gated SAEs"]
    work = ["normalize batches", "compute errors"]
    work += of_latents if any(variant.with_kernels for variant in variants) else []
    work += ["update the weights"] if any(variant.updates_at_once for variant in variants) else []
    if not variants:
        return ""
    if reason := reason_against_kernels(device):
        return f"kernels  not used: {reason}"
    listed = " and ".join(filter(None, (", ".join(work[:-1]), work[-1])))
    return f"kernels  {listed}, with Triton {installed_version(EXTRAS['kernels'])}"


def reason_against_capture(passes: Sequence[Sequence[PassRun]], device: str) -> str:
    """The reason not to capture steps in CUDA graphs, worded as the end of a sentence; "" if they are captured."""
    if torch.device(device).type != "cuda":
        return f"the device is {device}, which has no CUDA graphs"
    runs = [run for one in passes for run in one]
    if any(run.compiled for run in runs):
        return "--compile and CUDA graphs have not been tried together"
    own = f"{__package__}.variants."
    if foreign := [run.recipe.name for run in runs if not run.recipe.declared_by.__module__.startswith(own)]:
        return f"{foreign[0]} is not a recipe of this package, and it is not known whether its step can be captured"
    free = available_memory(device)
    for one in passes:
        if sum(map(memory_bound, one)) > FREE_SHARE * free and captured_memory(one, device) > FREE_SHARE * free:
            taken = format_bytes(captured_memory(one, device))
            return f"{format_count(len(one), 'run')} in one graph take {taken}, and {describe_free(device, free)}"
    return ""


def copied_bytes(runs: Sequence[BuildableRun], device: str) -> int:
    """The bytes of host memory for copies of the runs' states. Checkpoints are written from them during training.

    For a GPU the copies are in pinned memory, which torch allocates in powers of two.
    """
    sizes = [state_bytes(untrained_variant(run, "meta")) for run in runs]
    return sum(1 << (size - 1).bit_length() if torch.device(device).type == "cuda" else size for size in sizes)


def copies_fit(runs: Sequence[BuildableRun], device: str) -> bool:
    """Whether the free host memory has room for the copies of states and everything else that a pass needs there."""
    copies, budget = copied_bytes(runs, device), FREE_SHARE * available_memory("cpu")
    if torch.device(device).type == "cuda":
        return copies + max(map(host_bytes, runs)) <= budget
    return copies + sum(map(memory_bound, runs)) <= budget or copies + pass_memory(runs, device).total <= budget


def describe_copies(passes: Sequence[Sequence[BuildableRun]], device: str, in_background: bool) -> str:
    """The plan's line about how checkpoints are written."""
    size = format_bytes(max(copied_bytes(runs, device) for runs in passes))
    if in_background:
        return f"saved    while training continues, from copies of the states that take {size} of host memory"
    return (
        f"saved    between two steps, while training waits: copies of the states would take {size}, and only "
        f"{format_bytes(available_memory('cpu'))} of host memory are free"
    )


def describe_memory(passes: Sequence[Sequence[BuildableRun]], device: str) -> str:
    """The plan's line about the memory of the largest pass."""
    largest = max(passes, key=lambda runs: pass_memory(runs, device).total)
    memory = pass_memory(largest, device)
    return (
        f"memory   {format_bytes(memory.total)} on {device}: {format_bytes(memory.state)} of weights, moments and "
        f"buffers of {format_count(len(largest), 'run')}, {format_bytes(memory.step)} more in a step, "
        f"{format_bytes(memory.batches)} for batches and libraries; {format_bytes(available_memory(device))} free"
    )


def describe_passes(passes: Sequence[Sequence[PassRun]], device: str) -> Iterator[str]:
    """Yield a line of a plan for each group of runs that needs several passes to fit into memory."""
    for group in group_by_pass(run for runs in passes for run in runs):
        parts = [runs for runs in passes if runs[0].batches_key == group[0].batches_key]
        if len(parts) > 1:
            whole = format_bytes(pass_memory(group, device).total)
            each = ", ".join(
                f"{format_count(len(runs), 'run')} ({format_bytes(pass_memory(runs, device).total)})" for runs in parts
            )
            free = available_memory(device)
            yield (
                f"passes   {len(parts)} over the same batches, since {format_count(len(group), 'run')} take {whole} "
                f"together and {describe_free(device, free)}: {each}"
            )


def describe_free(device: str, free: float) -> str:
    return f"{FREE_SHARE:.0%} of the {format_bytes(free)} that are free on {device} can be used"


def describe_refusal(run: PassRun, device: str, free: float) -> str:
    """Explain why a run does not fit, and which sizes would fit."""
    config, memory = run.config, pass_memory([run], device)
    lines = [
        f"{run.recipe.name} with {config.d_sae:,} latents takes {format_bytes(memory.total)} of memory "
        f"({format_bytes(memory.state)} of weights, moments and buffers, {format_bytes(memory.step)} in a step of "
        f"{config.batch_size:,} tokens), and {describe_free(device, free)}."
    ]
    ways = []
    if (width := largest_width(run, device, FREE_SHARE * free)) is not None:
        ways.append(f"--width {width}, the largest that fits")
    if (parts := fewest_parts(run, device, FREE_SHARE * free)) is not None:
        ways.append(f"--accumulate {parts}, which gives the same result up to rounding")
    if (tokens := largest_batch(run, device, FREE_SHARE * free)) is not None:
        ways.append(f"--batch-size {tokens}")
    lines.append(
        f"Give {', or '.join(ways)}." if ways else f"No width fits: free memory, or increase {LIMIT} if it is set."
    )
    return " ".join(lines)


def fits(run: BuildableRun, config: RunConfig, device: str, budget: float) -> bool:
    """Whether a run would fit into `budget` bytes if it had this config. False if its recipe rejects the config."""
    try:
        return pass_memory([Resized(run.recipe, run.options, run.stored, config)], device).total <= budget
    except UsageError:
        return False


def largest_width(run: BuildableRun, device: str, budget: float) -> int | None:
    """The largest width at which the run would fit, out of the multiples of 64 below its width; None if none fits."""
    low, high = 0, -(-run.config.d_sae // WIDTH_STEP)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(run, run.config._replace(d_sae=middle * WIDTH_STEP), device, budget):
            low = middle
        else:
            high = middle
    return low * WIDTH_STEP or None


def fewest_parts(run: BuildableRun, device: str, budget: float) -> int | None:
    """The smallest number of parts with which a run would fit: 2, 4, 8, ... times its current number, or None."""
    config = run.config
    parts = 2 * config.accumulate
    if reasons_against(untrained_variant(run, "meta")):
        return None
    while config.batch_size % parts == 0:
        if fits(run, config._replace(accumulate=parts), device, budget):
            return parts
        parts *= 2
    return None


def largest_batch(run: BuildableRun, device: str, budget: float) -> int | None:
    """The largest batch size that would fit, among 1/2, 1/4, ... of the run's batch size; None if none fits."""
    tokens = run.config.batch_size // 2
    while tokens and not fits(run, run.config._replace(batch_size=tokens, accumulate=1), device, budget):
        tokens //= 2
    return tokens or None
