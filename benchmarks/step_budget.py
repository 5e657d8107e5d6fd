"""The modelled cost of one training step of each recipe on a GPU, and whether it stays within its budget.

    python benchmarks/step_budget.py                                    every recipe at every size: a page in Markdown
    python benchmarks/step_budget.py topk --size 18432x4096             one recipe, at one size
    python benchmarks/step_budget.py topk --operations 15               also the operations that take the longest
    python benchmarks/step_budget.py --check                            list steps over or under budget; exit code 1
    python benchmarks/step_budget.py topk --renew                       set the budget to the current cost

Nothing here is measured, and no GPU is needed: times in milliseconds are computed by a cost model. The step runs on the
simulated GPU of the tests, on tensors that have shapes but no values: forward and backward pass, optimizer, mechanisms
and metrics, under autocast. Each operation that torch calls below autograd costs launches, FLOPs and bytes
(tests/simulated_cuda/cost.py). Its time is either the time for its FLOPs at the speed of their dtype or the time for
its bytes at the speed of memory, whichever is longer. The host queues launches while the GPU computes, so the time of a
step is the larger of two sums: the times of all launches, and the times of all operations on the GPU.

step_budget.json has the budgets: launches, FLOPs and bytes. These are counted, so they are equal on every machine with
the same torch. A test fails if a recipe exceeds its budget. The script needs a CPU build of torch and a C++ compiler.
"""

import argparse
import contextlib
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from common import commit
from sae.tests.simulated_cuda.build import CannotSimulate, build_hooks
from sae.tests.simulated_cuda.cost import Operation
from sae.tests.simulated_cuda.counting import Counted
from sae.tests.simulated_cuda.gpu import SimulatedGPU
from sae.train import variants  # noqa: F401  (registers the recipes)
from sae.train.recipe import RECIPES, find_recipe

# The limits of an H200. These values are never updated, so that tables of different days can be compared.
FLOPS_BFLOAT16, FLOPS_FLOAT32 = 790e12, 60e12  # per second
BANDWIDTH = 4.3e12  # bytes per second
LAUNCH = 5e-6  # seconds

D_IN = 2304
SIZES = ((2304, 2048), (18432, 4096), (65536, 4096))  # latents, tokens in a batch
KEPT = 100  # latents per token, for recipes with an option k whose default is smaller
BUDGETS = Path(__file__).with_name("step_budget.json")
QUANTITIES = ("launches", "flops", "bytes")
Budgets = dict[str, dict[str, dict[str, int]]]  # recipe -> size -> quantity


@dataclass(frozen=True)
class StepCost:
    """The cost of a recipe's step at one size. Times are modelled milliseconds."""

    recipe: str
    d_sae: int
    batch: int
    counted: Counted

    @property
    def size(self) -> str:
        return size_name(self.d_sae, self.batch)

    @property
    def totals(self) -> dict[str, int]:
        costs = [operation.cost for operation in self.counted.operations]
        return {name: sum(getattr(cost, name) for cost in costs) for name in QUANTITIES}

    @property
    def launch_ms(self) -> float:
        return 1e3 * LAUNCH * self.totals["launches"]

    @property
    def gpu_ms(self) -> float:
        return sum(map(milliseconds, self.counted.operations))

    @property
    def step_ms(self) -> float:
        return max(self.launch_ms, self.gpu_ms)

    @property
    def ideal_ms(self) -> float:
        """The least time that a step of this size can take, with dense products or, if they take less, sparse products.

        dense    five products of B x D x F in bfloat16, and four passes over the latents (written and read by the
                 forward pass, and their gradients by the backward pass)
        sparse   one product, which is written and read once, and four passes over the rows of k latents per token
        both     30 bytes for each parameter: Adam reads four numbers and writes three, and a copy in bfloat16
        """
        latents, product = self.batch * self.d_sae, 2 * self.batch * D_IN * self.d_sae / FLOPS_BFLOAT16
        ways = [5 * product + 4 * 2 * latents / BANDWIDTH]
        if self.counted.kept is not None:
            rows = self.batch * self.counted.kept * D_IN
            ways.append(product + 2 * 2 * latents / BANDWIDTH + 4 * 2 * rows / BANDWIDTH)
        return 1e3 * (min(ways) + 30 * self.counted.parameters / BANDWIDTH)


def milliseconds(operation: Operation) -> float:
    """The time of one operation on the GPU, without its launch."""
    speed = FLOPS_BFLOAT16 if operation.dtype == "bfloat16" else FLOPS_FLOAT32
    return 1e3 * max(operation.cost.flops / speed, operation.cost.bytes / BANDWIDTH)


def size_name(d_sae: int, batch: int) -> str:
    return f"{d_sae}x{batch}"


def options_of(recipe: str) -> dict[str, Any]:
    """The options of a recipe in this script: its defaults, without a memory limit, and with k = 100 if the default k
    is smaller."""
    defaults = find_recipe(recipe).options
    k = {"k": KEPT} if isinstance(defaults.get("k"), int) and defaults["k"] < KEPT else {}
    return k | ({"memory_gb": 1000.0} if "memory_gb" in defaults else {})


def count(gpu: SimulatedGPU, recipe: str, d_sae: int, batch: int, **arguments: Any) -> StepCost | str:
    """A step's cost, or why the recipe cannot be built at this size."""
    found = gpu(
        "counting.count_step", recipe=recipe, d_in=D_IN, d_sae=d_sae, batch=batch, options=options_of(recipe),
        **arguments,
    )  # fmt: skip
    return found if isinstance(found, str) else StepCost(recipe, d_sae, batch, found)


# --- budgets ----------------------------------------------------------------------------------------------------------


def torch_release() -> str:
    """The release of torch, such as 2.13, since another release may launch other kernels."""
    return ".".join(importlib.metadata.version("torch").split(".")[:2])


def read_budgets() -> tuple[str, Budgets]:
    """The release of torch for which the budgets were written, and the budgets."""
    content = json.loads(BUDGETS.read_text())
    return content["torch"], content["budgets"]


def write_budgets(budgets: Budgets) -> None:
    """Write one line per size, in the order of the registry, so that a diff shows which recipes changed."""
    blocks = []
    for recipe in sorted(budgets, key=list(RECIPES).index):
        lines = [f'      "{size}": {json.dumps(budget)}' for size, budget in budgets[recipe].items()]
        blocks.append(f'    "{recipe}": {{\n' + ",\n".join(lines) + "\n    }")
    text = f'{{\n  "torch": "{torch_release()}",\n  "budgets": {{\n' + ",\n".join(blocks) + "\n  }\n}\n"
    BUDGETS.write_text(text)


def over_budget(cost: StepCost, budgets: Budgets) -> list[str]:
    """A message for each quantity over the recipe's budget, including what to do about it; a single message if there is
    no budget."""
    how = f"python benchmarks/step_budget.py {cost.recipe} --renew"
    budget = budgets.get(cost.recipe, {}).get(cost.size)
    where = f"{cost.recipe} with {cost.d_sae:,} latents and {cost.batch:,} tokens"
    if budget is None:
        return [f"{where} has no budget. Give it one: {how}"]
    return [
        f"{where}: a step has {value:,} {name}, {value - budget[name]:,} ({value / budget[name] - 1:.1%}) over its "
        f"budget of {budget[name]:,}. To see them by line: python benchmarks/step_budget.py {cost.recipe} "
        f"--size {cost.size} --operations 20. If the step is meant to cost more: {how}, and say why in the commit."
        for name, value in cost.totals.items()
        if value > budget[name]
    ]


def under_budget(cost: StepCost, budgets: Budgets) -> list[str]:
    """A message for each quantity below its budget, because the saving could be lost again unnoticed."""
    budget = budgets.get(cost.recipe, {}).get(cost.size, {})
    return [
        f"{cost.recipe} with {cost.d_sae:,} latents and {cost.batch:,} tokens: a step has {value:,} {name}, "
        f"{budget[name] - value:,} under its budget of {budget[name]:,}. Keep what was saved: "
        f"python benchmarks/step_budget.py {cost.recipe} --renew"
        for name, value in cost.totals.items()
        if name in budget and value < budget[name]
    ]


# --- pages ------------------------------------------------------------------------------------------------------------


def page(costs: Sequence[StepCost], refused: Mapping[str, str]) -> str:
    """The page for benchmarks/results, in Markdown."""
    lines = [
        "# What a training step costs on a GPU, by a model\n",
        f"`python benchmarks/step_budget.py`, {date.today()}, torch {torch_release()}, commit {commit()}.\n",
        "**Milliseconds are a model, not measured: no GPU was at hand.** Launches, FLOPs and bytes are counted from",
        "the operations of one step: forward and backward pass, optimizer, mechanisms and metrics, under autocast.",
        f"d_in {D_IN}, k = {KEPT} where the default is smaller, no dead latents. The model assumes",
        f"{FLOPS_BFLOAT16 / 1e12:.0f} TFLOP/s in bfloat16, {FLOPS_FLOAT32 / 1e12:.0f} in float32,",
        f"{BANDWIDTH / 1e12} TB/s and {LAUNCH * 1e6:.0f} us a launch. `launch ms` is the time in which the host queues",
        "the launches, and `GPU ms` the time in which the GPU computes. `step ms` is the longer of the two. `ideal ms`",
        "is the least time that a step of this size can take.\n",
        "| recipe | latents | tokens | launches | TFLOP | GB | launch ms | GPU ms | step ms | ideal ms | step/ideal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        totals = cost.totals
        lines.append(
            f"| `{cost.recipe}` | {cost.d_sae} | {cost.batch} | {totals['launches']} | {totals['flops'] / 1e12:.3f} "
            f"| {totals['bytes'] / 1e9:.2f} | {cost.launch_ms:.2f} | {cost.gpu_ms:.2f} | {cost.step_ms:.2f} "
            f"| {cost.ideal_ms:.2f} | {cost.step_ms / cost.ideal_ms:.1f} |"
        )
    lines += [f"\nNot at this size: `{where}`. {' '.join(why.split())}" for where, why in refused.items()]
    return "\n".join(lines)


def longest(cost: StepCost, number: int) -> str:
    """The operations that take the longest, summed by source line, in Markdown."""
    lines: dict[tuple[str, str, str], list[Operation]] = {}
    for operation in cost.counted.operations:
        lines.setdefault((operation.line, operation.name, operation.inputs), []).append(operation)
    rows = sorted(lines.items(), key=lambda row: -sum(map(milliseconds, row[1])))[:number]
    return "\n".join(
        [
            f"\n`{cost.recipe}` {cost.size}, milliseconds by the model:\n",
            "| line | operation | inputs | times | launches | GB | ms |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {line} | {name} | {inputs} | {len(same)} | {sum(one.cost.launches for one in same)} "
                f"| {sum(one.cost.bytes for one in same) / 1e9:.3f} | {sum(map(milliseconds, same)):.3f} |"
                for (line, name, inputs), same in rows
            ),
        ]
    )


# --- the command ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_gpu() -> Iterator[SimulatedGPU]:
    with tempfile.TemporaryDirectory() as folder:
        gpu = SimulatedGPU(build_hooks(Path(folder)), Path(folder) / "log")
        try:
            yield gpu
        finally:
            gpu.close()


def parse_size(text: str) -> tuple[int, int]:
    sizes = {size_name(*size): size for size in SIZES}
    if text not in sizes:
        raise argparse.ArgumentTypeError(f"{text!r} has no budgets: give one of {', '.join(sizes)}")
    return sizes[text]


def parse_recipe(name: str) -> str:
    if name not in RECIPES:
        raise argparse.ArgumentTypeError(f"there is no recipe {name!r}: `sae variants` lists them")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=parse_recipe, help="default: all")
    parser.add_argument("--size", action="append", type=parse_size, help="latents x tokens; default: all")
    parser.add_argument("--dead", type=int, default=0, metavar="N", help="latents that AuxK revives; no budgets")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--operations", type=int, default=0, metavar="N", help="also list the N longest, by line")
    what.add_argument("--check", action="store_true", help="compare with the budgets")
    what.add_argument("--renew", action="store_true", help="write the budgets")
    args = parser.parse_args()
    if args.dead and (args.check or args.renew):
        parser.error("budgets are those of a step without dead latents: leave out --dead")
    costs, refused = [], {}
    try:
        with start_gpu() as gpu:
            for recipe in args.recipes or RECIPES:
                for size in args.size or SIZES:
                    found = count(gpu, recipe, *size, dead=args.dead)
                    if isinstance(found, str):
                        refused[f"{recipe} {size_name(*size)}"] = found
                    else:
                        costs.append(found)
    except CannotSimulate as reason:
        sys.exit(f"Nothing was counted: {reason}")
    if args.renew:
        renew(costs)
    elif args.check:
        check(costs)
    else:
        print(page(costs, refused))
        if args.operations:
            print(*(longest(cost, args.operations) for cost in costs), sep="\n")


def renew(costs: Sequence[StepCost]) -> None:
    """Write the budgets of these steps, and drop the budgets of recipes that no longer exist."""
    budgets = {
        name: sizes for name, sizes in (read_budgets()[1] if BUDGETS.exists() else {}).items() if name in RECIPES
    }
    for cost in costs:
        before = budgets.get(cost.recipe, {}) | {cost.size: cost.totals}
        budgets[cost.recipe] = {size_name(*s): before[size_name(*s)] for s in SIZES if size_name(*s) in before}
    write_budgets(budgets)
    print(f"{BUDGETS}: {len(costs)} budgets written")


def check(costs: Sequence[StepCost]) -> None:
    release, budgets = read_budgets()
    if release != torch_release():
        sys.exit(f"The budgets are for torch {release}, and this is {torch_release()}: other kernels are launched.")
    over = [sentence for cost in costs for sentence in over_budget(cost, budgets)]
    under = [sentence for cost in costs for sentence in under_budget(cost, budgets)]
    print(*over, *under, f"{len(costs)} steps: {len(over)} over and {len(under)} under budget", sep="\n")
    sys.exit(bool(over or under))


if __name__ == "__main__":
    main()
