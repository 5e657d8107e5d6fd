"""The k largest elements of a row: the reference agrees with a sort in Python, and the kernels with the reference."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_largest
from sae.train.kernels.division import Division, Way
from sae.train.kernels.operators import largest

NAN, INF = math.nan, math.inf
SMALL = {"room": 64, "programs": 8, "chunk": 16}  # so that short rows are divided in the same ways as long ones
SHAPES = [  # (number of rows, n, k, way of dividing a row)
    (5, 1, 1, Way.ROW), (5, 33, 1, Way.ROW), (5, 64, 64, Way.ROW), (5, 100, 1, Way.PARTS), (5, 150, 9, Way.PARTS),
    (2, 65, 32, Way.PARTS), (1, 500, 70, Way.DIGITS), (5, 70, 69, Way.DIGITS), (3, 203, 203, Way.DIGITS),
]  # fmt: skip
KINDS: dict[str, Callable[..., Tensor]] = {
    "of all sizes": torch.randn,
    "ties": lambda *shape: torch.randn(*shape).mul(2).round(),
    "equals": lambda *shape: torch.full(shape, -1.5),
    "zeros of both signs": lambda *shape: torch.randint(0, 2, shape).mul(2).sub(1) * 0.0,
    "extremes": lambda *shape: torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e38, -1e38, 1e-40, -1e-40, 1.0, -1.0])[
        torch.randint(0, 12, shape)
    ],
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def by_hand(z_RN: Tensor, k: int) -> list[list[int]]:
    """The indices of the k largest elements of each row, found with Python's `sorted` in float64."""
    rows = [[INF if math.isnan(x) else x for x in row] for row in z_RN.double().tolist()]
    nan = z_RN.isnan().tolist()
    return [
        sorted(sorted(range(len(row)), key=lambda i: (not nan[r][i], -row[i], i))[:k]) for r, row in enumerate(rows)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_keeps_the_first_of_equals(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for k in (1, 7, 40):
        z_RN = KINDS[kind](6, 40).to(dtype)
        assert largest(z_RN, k).tolist() == by_hand(z_RN, k)


def check_kernels(interpreter: Any, rows: int, n: int, k: int, way: Way, dtype: torch.dtype) -> None:
    """For rows of every kind, the kernels find the reference's indices, and their cost is that of `kernel_cost`."""
    division = Division.of(rows, n, k, **SMALL)
    assert division.way is way
    torch.manual_seed(n + k)
    kinds = list(KINDS.values())
    z_RN = torch.cat([kinds[(row + n) % len(kinds)](1, n) for row in range(rows)]).to(dtype)
    found_RK, cost = interpreter("interpreted.largest", z_RN=z_RN, k=k, **SMALL)
    assert torch.equal(found_RK, largest(z_RN, k))
    assert cost == of_largest(division, rows, n, k, z_RN.element_size())


@pytest.mark.parametrize(
    ("rows", "n", "k", "way", "dtype"),
    [
        (5, 33, 7, Way.ROW, torch.bfloat16),
        (2, 130, 21, Way.PARTS, torch.bfloat16),
        (1, 98, 40, Way.DIGITS, torch.bfloat16),
        (1, 100, 33, Way.DIGITS, torch.float32),
    ],
)
def test_the_kernels(interpreter: Any, rows: int, n: int, k: int, way: Way, dtype: torch.dtype) -> None:
    check_kernels(interpreter, rows, n, k, way, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k", "way"), SHAPES)
def test_the_kernels_for_every_shape(interpreter: Any, rows: int, n: int, k: int, way: Way, dtype: torch.dtype) -> None:
    check_kernels(interpreter, rows, n, k, way, dtype)


def test_rows_that_are_not_contiguous_and_no_rows(interpreter: Any) -> None:
    z_RN = torch.randn(9, 2).T
    assert torch.equal(interpreter("interpreted.largest", z_RN=z_RN, k=3)[0], largest(z_RN, 3))
    assert interpreter("interpreted.largest", z_RN=torch.empty(0, 9), k=3)[0].shape == (0, 3)


@pytest.mark.slow
def test_the_operator_is_known_to_torch() -> None:
    """`opcheck` tests its schema, its result for fake tensors, and its use in a compiled function."""
    for z_RN, k in ((torch.randn(4, 20), 3), (torch.randn(1, 20).bfloat16(), 20), (torch.empty(0, 5), 1)):
        torch.library.opcheck(largest, (z_RN, k))
    with pytest.raises(RuntimeError, match="k = 6 is out of range: a row has 5 elements"):
        largest(torch.empty(2, 5, device="meta"), 6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_compile_for_a_gpu(compiler: Any, dtype: torch.dtype) -> None:
    """The kernels of all three ways compile for an H200 (compute capability 9.0) and use no stack memory."""
    shapes = [(2, 100, 7), (2, 20_000, 32), (1, 20_000, 9000)]
    assert [Division.of(*shape).way for shape in shapes] == [Way.ROW, Way.PARTS, Way.DIGITS]
    stacks = compiler("compiled.compile_largest", shapes=shapes, dtype=dtype, capability=90)
    assert {name.split()[0] for name in stacks} == {"select", "count_digit", "choose_digit", "write_indices"}
    assert not any(stacks.values())
