"""Plans on the simulated GPU: memory, captured steps, sparse products and kernels."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from sae.train import memory as memory_module
from sae.train.kernels import choice
from sae.train.kernels.batch_operators import compare, normalize_batch
from sae.train.kernels.choice import reason_against_kernels
from sae.train.kernels.operators import largest
from sae.train.kernels.update_operator import update
from sae.train.memory import RunMemory, run_memory
from sae.train.passes import FREE_SHARE, Resized, captured_memory, pass_memory
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig

from .functions import Memory, simulated_gpu


def memory(recipe: str) -> dict[str, tuple[int, ...]]:
    """For each device, the memory that a run needs according to its trace, and the memory of its pass."""
    run = Resized(find_recipe(recipe), {}, None, RunConfig(64, 512, 100, 256))
    with simulated_gpu():
        planned = {device: (*run_memory(run, device), *pass_memory([run], device)) for device in ("cpu", "cuda")}
    return planned


def memory_with_kernels(recipe: str) -> list[RunMemory]:
    """The memory that a run needs on a GPU, without and with kernels."""
    run = Resized(find_recipe(recipe), {}, None, RunConfig(64, 512, 100, 256))
    planned = []
    with simulated_gpu():
        for reason in ("none here", ""):
            memory_module._traced.clear()
            with mock.patch.object(memory_module, "reason_against_kernels", lambda device, reason=reason: reason):
                planned.append(run_memory(run, "cuda"))
        memory_module._traced.clear()
    return planned


def about_steps(cache: Path, out: Path) -> dict[str, list[str]]:
    """For each special case, the lines of its plan about how steps are launched."""

    def plan(*recipes: str, **more: Any) -> list[str]:
        sizes = {"steps": 4, "batch_size": 64, "width": "4x", "precision": "float32", "device": "cuda"}
        config = TrainConfig(recipes or ("relu", "april"), layers=[0], caches=[cache], out=out, **{**sizes, **more})
        planned = plan_training(config)
        memories.append([captured_memory(runs, "cuda") for runs in planned.passes])
        return [line for line in planned.describe() if line.startswith(("steps ", "passes "))]

    memories: list[list[int]] = []
    own = replace(find_recipe("relu"), name="own", declared_by=about_steps)
    with simulated_gpu(), mock.patch.dict(RECIPES, {"own": own}):
        lines = {"a GPU": plan(), "off": plan(capture="off"), "compiled": plan(compiled=True)}
        lines |= {"a CPU": plan(device="cpu"), "a recipe from elsewhere": plan("relu", "own")}
        for name, spare in (("just enough memory", 1), ("too little memory", -1)):
            with mock.patch.object(Memory, "free", int(memories[0][0] / FREE_SHARE) + spare):
                lines[name] = plan()
    return lines


def about_products(cache: Path, out: Path) -> dict[str, list[str]]:
    """For each special case, the lines of its plan about sparse and dense products."""

    def plan(*recipes: str, **more: Any) -> list[str]:
        sizes = {"steps": 4, "batch_size": 64, "width": "2048", "device": "cuda"}
        config = TrainConfig(recipes, layers=[0], caches=[cache], out=out, **{**sizes, **more})
        return [line for line in plan_training(config).describe() if line.startswith("products of")]

    with simulated_gpu():
        return {
            "bfloat16": plan("topk", "relu"),
            "float32": plan("topk", precision="float32"),
            "in parts": plan("batchtopk", accumulate=2),
            "a CPU": plan("topk", device="cpu"),
        }


def about_kernels(cache: Path, out: Path) -> dict[str, list[str]]:
    """For each special case, the line of its plan about the kernels."""

    def plan(recipe: str, device: str = "cuda") -> list[str]:
        reason_against_kernels.cache_clear()
        config = TrainConfig((recipe,), layers=[0], caches=[cache], out=out, steps=4, batch_size=64, device=device)
        return [line for line in plan_training(config).describe() if line.startswith("kernels ")]

    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    def wrong_update(*given: Any) -> None:
        update(*given)
        weight = given[0][0]
        weight.mul_(1 + 1e-3 * (weight.device.type == "cuda"))

    def wrong(operator: Any) -> Any:
        def compute(*given: Any) -> Any:
            first, *others = operator(*given)
            return (first * (1 + 1e-2 * (first.device.type == "cuda")), *others)

        return compute

    there = mock.patch.object(choice, "reason_against_triton", lambda: "")
    with simulated_gpu():
        lines = {"without Triton": plan("topk")}
        with there:
            lines |= {
                "with Triton": plan("batchtopk"),
                "no latents to choose": plan("relu"),
                "no update of the weights": plan("progressive"),
                "a CPU": plan("topk", "cpu"),
            }
            with mock.patch.object(choice, "largest", fails):
                lines["broken"] = plan("topk")
            with mock.patch.object(choice, "largest", lambda z_RN, k: largest(z_RN, k) + (z_RN.device.type == "cuda")):
                lines["wrong"] = plan("topk")
            with mock.patch.object(choice, "update", wrong_update):
                lines["wrong update"] = plan("topk")
            with mock.patch.object(choice, "normalize_batch", wrong(normalize_batch)):
                lines["wrong batch"] = plan("topk")
            with mock.patch.object(choice, "compare", wrong(compare)):
                lines["wrong error"] = plan("topk")
        reason_against_kernels.cache_clear()
    return lines
