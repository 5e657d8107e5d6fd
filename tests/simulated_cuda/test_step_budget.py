"""The cost of a step on a GPU: counts equal numbers worked out by hand, and no recipe exceeds its budget."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.tests.recipes import FEW
from sae.train import sparse_ops
from sae.train.kernels.division import JUMP_SPAN
from sae.train.recipe import RECIPES

from .build import find_torch
from .cost import Cost, Operation
from .counting import Counted
from .gpu import SimulatedGPU

FOLDER = Path(__file__).parents[2] / "benchmarks"
B, D, F = 64, 16, 128


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "step_budget.py"))
    finally:
        sys.path.remove(str(FOLDER))


def count(gpu: SimulatedGPU, recipe: str, **arguments: Any) -> Counted:
    counted = gpu("counting.count_step", **{"recipe": recipe, "d_in": D, "d_sae": F, "batch": B, **arguments})
    assert not isinstance(counted, str), counted
    return counted


def cost_at_smallest_size(script: dict[str, Any], gpu: SimulatedGPU, recipe: str, **arguments: Any) -> Any:
    """The cost of a step at the smallest size, at which every recipe can be built."""
    d_sae, batch = script["SIZES"][0]
    cost = script["count"](gpu, recipe, d_sae, batch, **arguments)
    if isinstance(cost, str):
        pytest.fail(f"{recipe} cannot be built with {d_sae:,} latents and {batch:,} tokens: {cost}")
    return cost


def total(counted: Counted, quantity: str) -> int:
    return sum(getattr(operation.cost, quantity) for operation in counted.operations)


def of_torch(script: dict[str, Any]) -> dict[str, Any]:
    release, budgets = script["read_budgets"]()
    if release != script["torch_release"]():
        pytest.skip(f"the budgets are for torch {release}; torch {find_torch()[1]} may launch other kernels")
    return budgets


# --- every recipe and its budget --------------------------------------------------------------------------------------


def test_no_step_exceeds_its_budget(gpu: SimulatedGPU, script: dict[str, Any]) -> None:
    """At the smallest size, where launches dominate; their number is the same at every size. The next test runs all."""
    budgets = of_torch(script)
    costs = [cost_at_smallest_size(script, gpu, recipe) for recipe in FEW]
    assert "\n".join(sentence for cost in costs for sentence in script["over_budget"](cost, budgets)) == ""


@pytest.mark.slow
def test_at_each_size_a_step_takes_its_budget(gpu: SimulatedGPU, script: dict[str, Any]) -> None:
    """Nor does it take less: a saving that the budget does not record could be lost again unnoticed."""
    budgets, counted = of_torch(script), 0
    wrong: list[str] = []
    for recipe in RECIPES:
        for size in script["SIZES"]:
            cost = script["count"](gpu, recipe, *size)
            if isinstance(cost, str):
                assert script["size_name"](*size) not in budgets[recipe] and "cannot be built" in cost
            else:
                counted += 1
                wrong += script["over_budget"](cost, budgets) + script["under_budget"](cost, budgets)
    assert "\n".join(wrong) == "" and counted == sum(map(len, budgets.values()))


def test_every_recipe_has_budgets_and_no_other(script: dict[str, Any]) -> None:
    _, budgets = script["read_budgets"]()
    assert list(budgets) == list(RECIPES)
    smallest, *_ = (script["size_name"](*size) for size in script["SIZES"])
    assert all(smallest in budget for budget in budgets.values())


def test_one_more_pass_over_the_latents_exceeds_the_budget(gpu: SimulatedGPU, script: dict[str, Any]) -> None:
    """One more launch reads and writes the latents in bfloat16. The message says everything needed to act on it."""
    budgets, (d_sae, batch) = of_torch(script), script["SIZES"][0]
    before = cost_at_smallest_size(script, gpu, "relu")
    after = cost_at_smallest_size(script, gpu, "relu", fault="passes_once_more")
    assert script["over_budget"](before, {"relu": {before.size: before.totals}}) == []
    launches, nbytes = script["over_budget"](after, {"relu": {before.size: before.totals}})
    assert launches.startswith(
        f"relu with 2,304 latents and 2,048 tokens: a step has {after.totals['launches']} launches, 1 ("
    )
    assert (
        f"bytes, {2 * 2 * batch * d_sae:,} (" in nbytes and f"over its budget of {before.totals['bytes']:,}." in nbytes
    )
    assert "To see them by line: python benchmarks/step_budget.py relu --size 2304x2048 --operations 20." in nbytes
    assert nbytes.endswith("python benchmarks/step_budget.py relu --renew, and say why in the commit.")
    assert script["over_budget"](after, budgets)  # the recorded budgets leave no room for it either
    assert script["under_budget"](before, {"relu": {before.size: after.totals}})[0].endswith(" --renew")
    assert "tests/simulated_cuda/faults.py:" in script["longest"](after, 1000)


def test_a_recipe_without_a_budget_is_told_how_to_get_one(script: dict[str, Any]) -> None:
    cost = script["StepCost"]("relu", 2304, 2048, Counted([], 1, None))
    (sentence,) = script["over_budget"](cost, {})
    assert sentence == (
        "relu with 2,304 latents and 2,048 tokens has no budget. Give it one: "
        "python benchmarks/step_budget.py relu --renew"
    )


def test_renewed_budgets_are_those_of_the_step_and_leave_the_others(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted, file = script["renew"].__globals__, tmp_path / "budgets.json"
    monkeypatch.setitem(scripted, "BUDGETS", file)
    old = {"launches": 1, "flops": 2, "bytes": 3}
    file.write_text(json.dumps({"torch": "1.0", "budgets": {"topk": {"2304x2048": old}, "gone": {"2304x2048": old}}}))
    operation = Operation("mm", "", "", "float32", Cost(7, 8, 9))
    new = {"launches": 14, "flops": 16, "bytes": 18}
    sizes = [(65536, 4096), (2304, 2048)]
    script["renew"]([script["StepCost"]("relu", *size, Counted([operation] * 2, 1, None)) for size in sizes])
    release, budgets = script["read_budgets"]()
    assert release == script["torch_release"]()
    assert budgets == {"relu": {"2304x2048": new, "65536x4096": new}, "topk": {"2304x2048": old}}
    assert list(budgets) == ["relu", "topk"] and list(budgets["relu"]) == ["2304x2048", "65536x4096"]


# --- what is counted --------------------------------------------------------------------------------------------------


def test_the_flops_of_relu_are_those_of_its_five_products(gpu: SimulatedGPU) -> None:
    """x W_enc, f W_dec, and the gradients of f, W_dec and W_enc take 2 B D F each, in bfloat16. The gradient of b_dec
    is W_enc times that of b_enc, 2 D F in float32, the dtype of both."""
    counted = count(gpu, "relu")
    products = [operation for operation in counted.operations if operation.cost.flops]
    assert [operation.cost.flops for operation in products].count(2 * B * D * F) == 5
    assert {operation.dtype: operation.cost.flops for operation in products} == {
        "bfloat16": 2 * B * D * F,
        "float32": 2 * D * F,
    }
    assert total(counted, "flops") == 5 * 2 * B * D * F + 2 * D * F
    assert counted.parameters == 2 * D * F + D + F and counted.kept is None


def test_single_operations_cost_what_is_worked_by_hand(gpu: SimulatedGPU) -> None:
    """The tensors have shape (6, 4) in float32, which is 96 bytes each."""
    found = gpu("counting.costs_of_examples")
    assert found == {
        "copy": [Cost(1, 0, 2 * 96)],
        "copy into another type": [Cost(1, 0, 96 + 48)],
        "copy into another tensor": [Cost(1, 0, 2 * 96)],
        "view": [],
        "memory": [],
        "fill": [Cost(1, 0, 96)],
        "add": [Cost(1, 0, 3 * 96)],
        "square": [Cost(1, 0, 2 * 96)],
        "add a repeated row": [Cost(1, 0, 2 * 96 + 16)],
        "expanded": [Cost(1, 0, 16 + 96)],
        "sum": [Cost(1, 0, 96 + 4)],
        "in place": [Cost(1, 0, 2 * 96)],
        "product": [Cost(1, 2 * 6 * 4 * 6, 2 * 96 + 6 * 6 * 4)],
        "batch of products": [Cost(1, 2 * 2 * 3 * 4 * 3, 2 * 96 + 2 * 3 * 3 * 4)],
        "product and sum": [Cost(1, 2 * 6 * 4 * 6, 6 * 4 + 2 * 96 + 6 * 6 * 4)],
        "rows": [Cost(1, 0, 2 * 2 * 16 + 2 * 8)],
        "rows added": [Cost(1, 0, 2 * (2 * 16 + 2 * 8))],
        "rows added to a copy": [Cost(2, 0, 2 * (2 * 16 + 2 * 8) + 2 * 96)],
        "topk": [Cost(11, 0, 6 * 96 + 6 * 2 * (4 + 8))],
        "sort": [Cost(6, 0, 2 * 4 * (96 + 24 * 8))],
        "solver": [Cost(4, 72, 2 * 6 * 6 * 4 + 4)],
        "a list": [Cost(1, 0, 2 * 3 * 96)],
        "norms of a list": [Cost(2, 0, 3 * 96 + 3 * 4)],
    }


def test_the_update_reads_and_writes_each_parameter_once(gpu: SimulatedGPU) -> None:
    """The gradients of matrices are in bfloat16. They are read once more for their norm; for W_dec, so are the weights.
    Each program for a row of W_dec or another weight also reads 32 bytes and writes a sum, which is read once."""
    (update,) = [operation.cost for operation in count(gpu, "relu").operations if operation.name == "update"]
    matrices, others = D * F * (2 * (2 + 24 + 2) + 2 * 2 + 4), (F + D) * (4 + 4 + 24)
    assert update == Cost(9, 0, matrices + others + (F + 3) * (32 + 8) + 40)


def test_adam_of_torch_reads_four_numbers_a_parameter_and_writes_three(gpu: SimulatedGPU) -> None:
    counted = count(gpu, "soft-frozen-decoder")
    adam = [operation.cost for operation in counted.operations if operation.name.startswith("_fused_adam")]
    assert [cost.bytes for cost in adam] == [28 * D * F, 28 * (D * F + D + F)]  # W_enc has a group of its own


def test_launches_do_not_depend_on_the_size_and_bytes_grow_with_the_batch(gpu: SimulatedGPU) -> None:
    """Bytes are linear in the number of tokens, if every part of a kernel is full."""
    small, twice, fourfold = (count(gpu, "gated", batch=parts * JUMP_SPAN) for parts in (1, 2, 4))
    assert total(small, "launches") == total(twice, "launches") == total(fourfold, "launches")
    assert 0 < total(fourfold, "bytes") - total(twice, "bytes") == 2 * (total(twice, "bytes") - total(small, "bytes"))


def test_the_operations_are_those_of_steps_with_values(gpu: SimulatedGPU) -> None:
    """A count from shapes equals one with values, the second step equals the third, and dead latents add launches."""
    for recipe, dead in (("topk", 64), ("relu", 0), ("competition", 0), ("collapse-10", 0)):
        second, third = gpu("counting.count_values", recipe=recipe, d_in=D, d_sae=F, batch=B, dead=dead)
        assert count(gpu, recipe, dead=dead).operations == second.operations
        assert [(o.name, o.line, o.cost.launches) for o in second.operations] == [
            (o.name, o.line, o.cost.launches) for o in third.operations
        ]
    assert total(count(gpu, "topk", dead=64), "launches") > total(count(gpu, "topk"), "launches")


def test_products_by_rows_are_counted_where_a_gpu_uses_them(gpu: SimulatedGPU) -> None:
    """From 257 latents per kept latent, only the product of the encoder is dense; the other four are not."""
    operations = {k: count(gpu, "topk", d_sae=1028, options={"k": k}).operations for k in (3, 4)}
    dense = {k: [o for o in found if o.cost.flops == 2 * B * D * 1028] for k, found in operations.items()}
    assert len(dense[3]) == 1 and len(dense[4]) == 5
    assert {o.dtype for o in operations[3] if o.cost.flops} >= {"bfloat16"}


def test_the_count_does_not_depend_on_the_machine(gpu: SimulatedGPU) -> None:
    """It depends neither on the CPU and its number of threads nor on the model and memory of the GPU."""
    for recipe in ("topk", "decorrelation"):
        assert gpu("counting.count_elsewhere", recipe=recipe, d_in=D, d_sae=F, batch=B) == count(gpu, recipe)


def test_a_size_that_a_recipe_cannot_have_says_why(gpu: SimulatedGPU) -> None:
    why = gpu("counting.count_step", recipe="topk", d_in=D, d_sae=8, batch=B)
    assert "k=32 is out of range: give 1 to 8" in why


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_model_is_worked_by_hand(script: dict[str, Any]) -> None:
    """An operation takes the longer of the times of its FLOPs and its bytes; a step that of the host and the GPU."""
    operations = [
        Operation("mm", "", "", "bfloat16", Cost(1, 790 * 10**9, 10)),  # 1 ms of FLOPs
        Operation("mm", "", "", "float32", Cost(1, 60 * 10**9, 10)),  # 1 ms
        Operation("add", "", "", "bfloat16", Cost(3, 0, 4_300_000_000)),  # 1 ms of bytes
    ]
    cost = script["StepCost"]("relu", 2304, 2048, Counted(operations, 0, None))
    assert (cost.gpu_ms, cost.launch_ms, cost.step_ms) == (pytest.approx(3), pytest.approx(0.025), pytest.approx(3))
    busy = script["StepCost"](
        "relu", 2304, 2048, Counted(operations * 1 + [operations[0]._replace(cost=Cost(1000, 0, 0))], 0, None)
    )
    assert (busy.launch_ms, busy.step_ms) == (pytest.approx(5.025), pytest.approx(5.025))
    assert cost.totals == {"launches": 5, "flops": 850 * 10**9, "bytes": 4_300_000_020}


def test_the_ideal_is_worked_by_hand(script: dict[str, Any]) -> None:
    """B = 2048, D = F = 2304: a product is 21.74 GFLOP, 0.02752 ms; a pass over bfloat16 latents 9.437 MB, 0.002195 ms;
    one over rows of k = 100 latents 943.7 MB, 0.2195 ms; 43 million parameters with 30 bytes each take 0.3 ms."""
    dense = script["StepCost"]("relu", 2304, 2048, Counted([], 43 * 10**6, None))
    assert dense.ideal_ms == pytest.approx(5 * 0.02752 + 4 * 0.0021947 + 0.3, rel=1e-4)
    few, many = (script["StepCost"]("topk", 2304, 2048, Counted([], 43 * 10**6, k)) for k in (1, 100))
    assert few.ideal_ms == pytest.approx(0.02752 + 2 * 0.0021947 + 4 * 0.0021947 + 0.3, rel=1e-4)
    assert many.ideal_ms == pytest.approx(dense.ideal_ms)


def test_the_constants_are_fixed(script: dict[str, Any]) -> None:
    """Otherwise tables of different days could not be compared."""
    constants = [script[name] for name in ("FLOPS_BFLOAT16", "FLOPS_FLOAT32", "BANDWIDTH", "LAUNCH", "D_IN", "KEPT")]
    assert constants == [790e12, 60e12, 4.3e12, 5e-6, 2304, 100]
    assert script["SIZES"] == ((2304, 2048), (18432, 4096), (65536, 4096))
    assert sparse_ops.BANDWIDTH == script["BANDWIDTH"]  # decides between sparse and dense products
    assert sparse_ops.FLOPS["bfloat16"] == script["FLOPS_BFLOAT16"]
    assert sparse_ops.FLOPS["float32"] == script["FLOPS_FLOAT32"]


def test_the_page_says_that_nothing_was_measured(script: dict[str, Any]) -> None:
    operation = Operation("mm", "", "train/sae.py:1", "bfloat16", Cost(200, 79 * 10**10, 10))
    cost = script["StepCost"]("relu", 2304, 2048, Counted([operation], 43 * 10**6, None))
    page = script["page"]([cost], {"collapse-10 65536x4096": "The variant cannot be built:\n  too large"})
    assert "**Milliseconds are a model, not measured: no GPU was at hand.**" in page
    assert "| `relu` | 2304 | 2048 | 200 | 0.790 | 0.00 | 1.00 | 1.00 | 1.00 | 0.45 | 2.2 |" in page
    assert "Not at this size: `collapse-10 65536x4096`. The variant cannot be built: too large" in page


def test_k_is_the_tables_where_the_default_is_smaller(script: dict[str, Any]) -> None:
    assert script["options_of"]("topk") == {"k": 100} and script["options_of"]("relu") == {}
    assert script["options_of"]("competition") == {"memory_gb": 1000.0}
    assert script["options_of"]("hierarchical-topk320") == {}
