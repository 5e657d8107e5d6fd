"""Estimate the memory of training by tracing two steps on tensors that have shapes but no values.

A trace runs the actual code of a step, so it works for every recipe, however the recipe computes its matrix products.
A trace misses scratch memory inside single operations (except for `topk` on a CPU). It also misses the memory that
mechanisms use between steps for work that depends on values, so mechanisms declare this memory
(`Mechanism.between_bytes`).
"""

import json
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kernels.choice import reason_against_kernels
from .loop import Trainer
from .recipe import Recipe
from .variant import RunConfig, Variant

DEAD_SHARE = 0.5  # share of latents assumed to be dead: the more are dead, the more memory AuxK takes
SAMPLE_ROWS = 10_000  # rows that a variant reads before its first step if it `reads_rows`
SAMPLE_BYTES = 2 + 2 + 4 + 8 + 4  # per element: in a batch, in all rows joined, in float32, in float64, normalized
SORTED_BYTES = 16  # per element: to sort, `topk` on a CPU copies each element and its index
KEPT_VARIANTS = 256  # maximum number of variants without values that are kept
CHECKPOINT_COPIES = 2  # copies of the state in host memory while a checkpoint is read: its bytes and its tensors

# The factors in `memory_bound`, in this order: the number of training states; the number of elements per (token,
# latent) pair; per (token, input dimension) pair; per pair of latents; and the number of all other elements.
BOUND_STATES, BOUND_LATENTS, BOUND_INPUTS, BOUND_PAIRS, BOUND_OTHER = 4, 40, 20, 16, 4 * 2**24


class BuildableRun(Protocol):
    """Those parts of a run from which a variant is built. `plan.Run` implements this."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def stored(self) -> Mapping[str, Any] | None: ...
    @property
    def config(self) -> RunConfig: ...


class RunMemory(NamedTuple):
    """The memory of a run in bytes: on the device, and in host memory if that is separate."""

    state: int  # kept between steps: weights, moments, buffers, and tensors that mechanisms keep
    step: int  # additional, at the peak of a step or of the work between two steps
    host: int  # additional, in host memory while the first rows or a checkpoint are read


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operations have allocated (`now`), and the `peak` of this count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default and args[0].device.type == "cpu":
            dimension = args[2] if len(args) > 2 else -1
            self.peak = max(self.peak, self.now + SORTED_BYTES * args[0].shape[dimension])
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:  # views and in-place operations share the storage of their input
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# On the device "meta". The recipe is stored too: while it is referenced, no other recipe gets its id(), which is part
# of the key.
_untrained: dict[Any, tuple[Recipe, Variant]] = {}


def untrained_variant(run: BuildableRun, device: str) -> Variant:
    """The untrained variant of a run.

    The device "meta" allocates nothing. There, runs that differ only by seed and data share one: do not modify it.
    """
    with torch.random.fork_rng(devices=[]):
        if device != "meta":
            with torch.device("cpu"):
                return run.recipe.make(run.config, run.options, run.stored).to(device)
        key = id(run.recipe), options_key(run), run.config
        if key not in _untrained:
            if len(_untrained) == KEPT_VARIANTS:
                _untrained.clear()
            with torch.device("meta"):
                _untrained[key] = run.recipe, run.recipe.make(run.config, run.options, run.stored).to(device)
        return _untrained[key][1]


def options_key(run: BuildableRun) -> str:
    """The options of a run as one string, which is equal for equal options."""
    return json.dumps([run.options, run.stored], sort_keys=True)


def tensor_bytes(module: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a module's parameters, and of its buffers."""
    return sum(p.nbytes for p in module.parameters()), sum(b.nbytes for b in module.buffers())


def state_bytes(variant: Variant) -> int:
    """Bytes of a checkpoint: weights, buffers and the two moments of AdamW for the weights that are trained."""
    weights, buffers = tensor_bytes(variant)
    return weights + buffers + 2 * sum(p.nbytes for p in variant.parameters() if p.requires_grad)


_traced: dict[Any, RunMemory] = {}


def run_memory(run: BuildableRun, device: str, rows: int | None = None) -> RunMemory:
    """The memory of a run on a device, traced with `rows` rows in a batch; None: the batch size of the run.

    Runs that differ only by seed and data are traced once.
    """
    rows = run.config.batch_size if rows is None else rows
    key = run.recipe.name, options_key(run), run.config, device, rows
    if key not in _traced:
        kernels = not reason_against_kernels(device)
        with FakeTensorMode(), LiveBytes() as live:
            traced = trace_steps(live, run, device, rows, kernels)
        state = traced.state - 2 * rows * run.config.d_in  # without the batch
        step = max(traced.peak, traced.between) - traced.state
        _traced[key] = RunMemory(state, step, host_bytes(run))
    return _traced[key]


class TracedSteps(NamedTuple):
    """The bytes in use during two steps, including the batch."""

    peak: int  # in a step, or while metrics are read
    between: int  # while mechanisms act between two steps
    state: int  # after the steps


def trace_steps(live: LiveBytes, run: BuildableRun, device: str, rows: int, kernels: bool = False) -> TracedSteps:
    """Take two steps and read the metrics. Two steps are needed because the first one allocates the moments."""
    config = run.config
    parts = config.accumulate if rows % config.accumulate == 0 else 1
    with torch.random.fork_rng(devices=[]), torch.device(device):  # a fake tensor cannot be moved to the device later
        variant = run.recipe.make(config, run.options, run.stored)
    if kernels:
        variant.use_kernels()
    trainer = Trainer(variant, config.steps, device, parts, config.precision)
    variant.dead.index_A = torch.zeros(round(DEAD_SHARE * config.d_sae), dtype=torch.int64, device=device)
    variant.dead.real_A = torch.zeros(len(variant.dead.index_A), device=device)
    x_BD = torch.ones(rows, config.d_in, dtype=torch.bfloat16, device=device)
    live.peak = live.now
    trainer.step(x_BD)
    step = trainer.step(x_BD)
    between = live.now + max(mechanism.between_bytes(variant.sae, rows) for mechanism in variant.mechanisms)
    del step
    state = live.now
    variant.scalars()
    return TracedSteps(live.peak, between, state)


def host_bytes(run: BuildableRun) -> int:
    """The bytes of host memory that a run takes while it reads the first rows or a checkpoint."""
    variant = untrained_variant(run, "meta")
    sample = SAMPLE_ROWS * run.config.d_in * SAMPLE_BYTES if variant.reads_rows else 0
    return max(sample, CHECKPOINT_COPIES * state_bytes(variant))


def memory_bound(run: BuildableRun) -> int:
    """A generous upper bound on the total of `run_memory`, found without tracing steps. Used if memory is plentiful."""
    config, variant = run.config, untrained_variant(run, "meta")
    rows = config.batch_size * (BOUND_LATENTS * config.d_sae + BOUND_INPUTS * config.d_in)
    start = SAMPLE_ROWS * config.d_in * SAMPLE_BYTES
    return BOUND_STATES * state_bytes(variant) + 4 * (rows + BOUND_PAIRS * config.d_sae**2 + BOUND_OTHER) + start
