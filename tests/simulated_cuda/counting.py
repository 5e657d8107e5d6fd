"""The cost of one training step of a recipe on a GPU, counted without computing values."""

import contextlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.common.errors import UsageError
from sae.train import loop
from sae.train.activation_functions import KeepTopK
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig, Variant

from . import faults
from .cost import Cost, Counter, Operation
from .functions import simulated_gpu
from .tensors import META, Values

STEPS = 4882  # of the run that the step is taken from: ten million tokens in batches of 2,048


class Counted(NamedTuple):
    """The operations of one step, and the numbers that determine the smallest possible cost."""

    operations: list[Operation]
    parameters: int
    kept: float | None  # latents per token that the activation keeps, if that number is fixed


def count_step(
    recipe: str,
    d_in: int,
    d_sae: int,
    batch: int,
    options: dict[str, Any] | None = None,
    dead: int = 0,
    fault: str | None = None,
) -> Counted | str:
    """Count a step with forward and backward pass, optimizer, mechanisms and metrics, under autocast.

    Tensors have shapes but no values. `dead` latents are dead; `fault` is a mistake of faults.py. Returns why the
    recipe cannot be built at this size, if it cannot.
    """
    config = RunConfig(d_in, d_sae, STEPS, batch, variance=24.0)
    with simulated_gpu(), mock.patch.object(Values, "device", META), with_fault(fault):
        try:
            with torch.device(META):
                variant = find_recipe(recipe).make(config, options or {})
        except UsageError as error:
            return str(error)
        variant.use_kernels()
        with mock.patch.object(loop, "make_optimizer", optimizer_without_values):
            trainer = Trainer(variant.to("cuda"), STEPS, "cuda")
        (counted,) = count_steps(trainer, batch, dead, 1)
    return counted


def count_values(recipe: str, d_in: int, d_sae: int, batch: int, dead: int) -> list[Counted]:
    """Count the second and the third step of a run, on tensors that have values."""
    with simulated_gpu():
        variant = find_recipe(recipe).make(RunConfig(d_in, d_sae, STEPS, batch, variance=24.0), {})
        variant.use_kernels()
        trainer = Trainer(variant.to("cuda"), STEPS, "cuda")
        return count_steps(trainer, batch, dead, 2)


def count_steps(trainer: Trainer, batch: int, dead: int, steps: int) -> list[Counted]:
    """Count the steps after the first, which also creates the moments and the sums of the metrics."""
    variant, counted = trainer.variant, []
    variant.dead.index_A = torch.zeros(dead, dtype=torch.int64, device="cuda")
    variant.dead.real_A = torch.ones(dead, device="cuda")
    x_BD = torch.ones(batch, variant.sae.d_in, dtype=torch.bfloat16, device="cuda")
    activation = variant.sae.activation[0]
    kept = activation.k if isinstance(activation, KeepTopK) else None
    trainer.step(x_BD)
    for _ in range(steps):
        with Counter() as counter:
            trainer.step(x_BD)
        counted.append(Counted(counter.operations, sum(one.numel() for one in variant.parameters()), kept))
    return counted


MAKE_OPTIMIZER = loop.make_optimizer


def optimizer_without_values(variant: Variant, device: str) -> torch.optim.Optimizer:
    """The constructor of the optimizer reads the learning rate, so it gets one with a value, which is then replaced."""
    optimizer: Any = MAKE_OPTIMIZER(variant, "cpu")
    rate = torch.full((), variant.optimization.lr, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def with_fault(fault: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if fault is None else faults.after_each_step(fault)


def count_elsewhere(recipe: str, d_in: int, d_sae: int, batch: int) -> Counted | str:
    """`count_step` on a simulated other machine, with another CPU and another GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 3)
    other = SimpleNamespace(name="another GPU", total_memory=1, major=7, minor=0, multi_processor_count=1)
    try:
        with contextlib.ExitStack() as stack:
            for module, name, value in (
                (torch.cuda, "get_device_properties", other),
                (torch.cuda, "get_device_capability", (7, 0)),
                (torch.cuda, "get_device_name", "another GPU"),
                (torch.cuda, "mem_get_info", (1, 1)),
                (torch.backends.cpu, "get_cpu_capability", "DEFAULT"),
                (os, "cpu_count", 97),
            ):
                stack.enter_context(mock.patch.object(module, name, lambda *_, value=value: value))
            return count_step(recipe, d_in, d_sae, batch)
    finally:
        torch.set_num_threads(threads)


# --- single operations ------------------------------------------------------------------------------------------------


def a() -> Tensor:
    return torch.zeros(6, 4, device="cuda")


def rows() -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device="cuda")


EXAMPLES: dict[str, Callable[..., Any]] = {
    "copy": lambda a: a.clone(),
    "copy into another type": lambda a: a.bfloat16(),
    "copy into another tensor": lambda a, b: a.copy_(b),
    "view": lambda a: a.T[1:].reshape(3, 2, 3).squeeze().detach().expand(3, 2, 3),
    "memory": lambda a: torch.empty_like(a),
    "fill": lambda a: a.zero_(),
    "add": lambda a, b: a + b,
    "square": lambda a: a * a,
    "add a repeated row": lambda a, b: a + b[0].expand(6, 4),
    "expanded": lambda a: a[0].expand(6, 4).contiguous(),
    "sum": lambda a: a.sum(),
    "in place": lambda a: a.mul_(2),
    "product": lambda a, b: a @ b.T,
    "batch of products": lambda a, b: a.view(2, 3, 4) @ b.view(2, 3, 4).transpose(1, 2),
    "product and sum": lambda a, b: torch.addmm(a.view(4, 6)[0], a, b.T),
    "rows": lambda a, b, rows: a[rows],
    "rows added": lambda a, b, rows: a.index_add_(0, rows, b[:2]),
    "rows added to a copy": lambda a, b, rows: a.index_add(0, rows, b[:2]),
    "topk": lambda a: a.topk(2),
    "sort": lambda a: a.sort(),
    "solver": lambda a: torch.linalg.cholesky_ex(a.new_empty(6, 6)),
    "a list": lambda a, b: torch._foreach_mul_([a, b, a.new_empty(6, 4)], 2.0),
    "norms of a list": lambda a, b: torch._foreach_norm([a, b, a.new_empty(6, 4)]),
}


def costs_of_examples() -> dict[str, list[Cost]]:
    """The costs of the examples, for tensors of shape (6, 4) and two row indices."""
    found = {}
    with simulated_gpu(), mock.patch.object(Values, "device", META):
        given = (a(), a(), rows())
        for name, example in EXAMPLES.items():
            with Counter() as counter:
                example(*given[: example.__code__.co_argcount])
            found[name] = [operation.cost for operation in counter.operations]
    return found
