"""The update of the weights: the reference, and the kernels in Triton's interpreter, agree with a step in float64."""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_update
from sae.train.kernels.update_layout import ADDING, CHUNK, LONGEST_ROW
from sae.train.kernels.update_operator import update

BETA1, BETA2, EPS, RATE, DECAY = 0.9, 0.999, 1e-8, 0.01, 0.1
STEP = 3  # number of updates before this one


class Case(NamedTuple):
    """Options of one update of W_dec (11, 5), W_enc (5, 11), a long bias and a short one."""

    unit: bool = True
    coupled: bool = False
    limit: float | None = 0.5
    dtype: torch.dtype = torch.bfloat16  # of the matrices' gradients
    copies: bool = True
    loss: float = 1.0
    failed_at: int = -1
    bad: float | None = None  # the value of one element of W_enc's gradient
    eps: float = EPS
    beta1: float = BETA1


def arguments(case: Case) -> list[Any]:
    """Random arguments of `update`. One row of W_dec and another row of its gradient are zero."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = [random(11, 5), random(5, 11), random(CHUNK + 7), random(3)]
    weights[0] /= weights[0].norm(dim=1, keepdim=True)
    weights[0][4] = 0
    gradients = [0.1 * random(*weight.shape) for weight in weights]
    gradients[0][7] = 0
    gradients[:2] = [gradient.to(case.dtype) for gradient in gradients[:2]]
    if case.bad is not None:
        gradients[1][2, 3] = case.bad
    firsts, seconds = ([0.1 * random(*weight.shape) for weight in weights] for _ in range(2))
    steps_S = torch.arange(1, 9, dtype=torch.float64)
    corrections_S2 = torch.stack([1 - case.beta1**steps_S, (1 - BETA2**steps_S).sqrt()], 1).float()
    return [
        weights, gradients, firsts, [second.square() for second in seconds],
        [torch.tensor(float(STEP)) for _ in weights],
        [weight.bfloat16() for weight in weights[:2]] if case.copies else [],
        [case.unit, False, False, False], [0.0, DECAY, 0.0, DECAY],
        torch.tensor(case.loss), torch.tensor(5), torch.tensor(case.failed_at),
        torch.linspace(0, RATE, 8), corrections_S2, case.limit, case.beta1, BETA2, case.eps, case.coupled,
    ]  # fmt: skip


def by_hand(given: list[Any]) -> dict[str, Any]:
    """The step in float64: the formulas of Adam, with W_dec's gradient projected onto the tangent of its unit rows."""
    weights, gradients, firsts, seconds = ([one.double() for one in given[n]] for n in range(4))
    unit, decays, loss, i, failed_at, rates_S = given[6:12]
    limit, beta1, beta2, eps, coupled = given[13:]
    rate, taken = float(rates_S[i]), STEP + 1
    for n, is_unit in enumerate(unit):
        if is_unit:
            gradients[n] = gradients[n] - weights[n] * (gradients[n] * weights[n]).sum(1, keepdim=True)
    norm = torch.cat([one.flatten() for one in gradients]).norm()
    if failed_at < 0 and not math.isfinite(float(norm) + float(loss)):
        failed_at = i
    if failed_at < 0:
        for n, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            g = g / (1 if limit is None else max(1.0, (float(norm) + 1e-6) / limit))
            g, w = (g + decays[n] * w, w) if coupled else (g, w * (1 - rate * decays[n]))
            firsts[n] = beta1 * firsts[n] + (1 - beta1) * g
            seconds[n] = beta2 * seconds[n] + (1 - beta2) * g * g
            step = firsts[n] / (1 - beta1**taken) / ((seconds[n] / (1 - beta2**taken)).sqrt() + eps)
            weights[n] = w - rate * step
            if unit[n]:
                weights[n] = weights[n] / weights[n].norm(dim=1, keepdim=True).clamp_min(1e-12)
    updated = float(failed_at < 0)
    found = {"weights": weights, "firsts": firsts, "seconds": seconds, "failed_at": failed_at}
    return {**found, "norm": norm, "updated": torch.tensor(updated)}


def check(found: dict[str, Any], given: list[Any]) -> None:
    """Compare `found` with a step by hand from `given`, the state before the step. A rejected step changes no bit."""
    expected = by_hand(given)
    assert int(found["failed_at"]) == int(expected["failed_at"]) and found["updated"] == expected["updated"]
    torch.testing.assert_close(found["norm"].double(), expected["norm"], rtol=1e-5, atol=0, equal_nan=True)
    for name, n in (("weights", 0), ("firsts", 2), ("seconds", 3)):
        for one, other, before in zip(found[name], expected[name], given[n], strict=True):
            if expected["updated"]:
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(one, before)
    for copy, weight in zip(found["copies"], found["weights"], strict=False):
        assert torch.equal(copy, weight.bfloat16())


def by_reference(given: list[Any]) -> dict[str, Any]:
    norm, updated = update(*given)
    names = {"weights": 0, "firsts": 2, "seconds": 3, "copies": 5, "failed_at": 10}
    return {"norm": norm, "updated": updated, **{name: given[n] for name, n in names.items()}}


def check_case(interpreter: Any, case: Case) -> None:
    """Check the reference and the kernels, and that the kernels' cost is that of `kernel_cost`.

    If beta1 is 0, the kernels do not change the first moments.
    """
    check(by_reference(arguments(case)), arguments(case))
    given = arguments(case)
    found, cost = interpreter("interpreted.update", given=given)
    if not case.beta1:
        assert all(map(torch.equal, found["firsts"], given[2]))
        found["firsts"] = by_hand(given)["firsts"]
    check(found, given)
    sizes = [gradient.element_size() for gradient in given[1]]
    if found["updated"]:
        assert cost == of_update([weight.shape for weight in given[0]], sizes, given[6], len(given[5]), case.beta1 > 0)


QUICK = [
    Case(), Case(coupled=True, limit=None, dtype=torch.float32), Case(unit=False, limit=1e3), Case(copies=False),
    Case(loss=math.inf), Case(failed_at=2), Case(bad=math.nan), Case(bad=-math.inf, coupled=True), Case(eps=0.0),
    Case(beta1=0.0), Case(beta1=0.0, loss=math.nan),
]  # fmt: skip


@pytest.mark.parametrize("case", QUICK)
def test_a_step_is_that_in_float64(interpreter: Any, case: Case) -> None:
    check_case(interpreter, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(unit, coupled, limit, dtype, copies, *failure)
        for unit, coupled, limit, dtype, copies, failure in itertools.product(
            (True, False), (True, False), (None, 0.5, 1e3), (torch.bfloat16, torch.float32), (True, False),
            ((1.0, -1), (math.nan, -1), (1.0, 0), (1.0, -1, math.nan)),
        )
    ],
)  # fmt: skip
def test_a_step_is_that_in_float64_in_every_combination(interpreter: Any, case: Case) -> None:
    check_case(interpreter, case)


@pytest.mark.slow
def test_more_rows_than_programs_add_up(interpreter: Any) -> None:
    given = arguments(Case())
    rows = ADDING + 9
    for n in (0, 1, 2, 3, 5):
        given[n][0] = given[n][0].repeat(rows // 11 + 1, 1)[:rows].contiguous()
    check(interpreter("interpreted.update", given=given)[0], given)


def test_the_operator_is_known_to_torch() -> None:
    torch.library.opcheck(update, tuple(arguments(Case())))
    torch.library.opcheck(update, tuple(arguments(Case(copies=False, limit=None))))


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(compiler: Any) -> None:
    """The kernels compile for compute capability 9.0, that of an H200, and use no stack memory."""
    for dtype in (torch.bfloat16, torch.float32):
        widths = [768, 2304, LONGEST_ROW]
        stacks = compiler("compiled.compile_update", widths=widths, dtype=dtype, capability=90)
        assert {name.split()[0] for name in stacks} == {"add_squares", "decide", "move"}
        assert not any(stacks.values())
