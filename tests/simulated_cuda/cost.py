"""The cost of operations on a GPU: kernel launches, FLOPs, and bytes read from and written to its memory.

The cost follows from shapes and types alone; nothing is measured. For operations that need several launches and passes
(sort, topk, solvers), their numbers are those known from CUDA. Bytes count every element that a kernel reads or writes
once; hits in a cache are not subtracted. For the kernels in train/kernels, bytes count all loads and stores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae.train.kernels.division import (
    BATCH_TILE,
    JUMP_SPAN,
    JUMP_TILE,
    PREFIX_COLUMNS,
    PREFIX_SPAN,
    PROGRAMS,
    SUM_TILE,
    THRESHOLD_CHUNK,
    Division,
    equal_spans,
    row_tile,
)

from . import kernel_cost
from .ledger import line
from .tensors import SimulatedTensor, shapes, tensors_of


class Cost(NamedTuple):
    launches: int
    flops: int  # of products and solvers; elementwise arithmetic is limited by its bytes
    bytes: int


class Operation(NamedTuple):
    """One operation, as dispatched below autograd, with its cost."""

    name: str
    inputs: str  # types and shapes
    line: str  # the line of the package that calls it
    dtype: str  # the dtype in which its products are computed
    cost: Cost


class Call(NamedTuple):
    """One call of an operation, with its arguments and results."""

    name: str
    args: tuple[Any, ...]
    inputs: list[Tensor]  # each tensor once
    outputs: list[Tensor]

    @property
    def written(self) -> int:
        return sum(map(size, self.outputs))

    @property
    def touched(self) -> int:
        return sum(map(size, self.inputs)) + self.written


def size(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor. Elements that an expanded tensor repeats count once."""
    count = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not length:
            count *= length
    return count


class Counter(TorchDispatchMode):
    """Records the operations on the simulated GPU that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = tensors_of((args, kwargs or {}))
        inputs, outputs = list({id(tensor): tensor for tensor in given}.values()), tensors_of(result)
        on_gpu = any(isinstance(tensor, SimulatedTensor) for tensor in (*inputs, *outputs))
        if on_gpu and not launches_nothing(func):
            call = Call(func.overloadpacket.__name__, args, inputs, outputs)
            dtype = str(inputs[-1].dtype if inputs else outputs[0].dtype).removeprefix("torch.")
            self.operations.append(Operation(call.name, shapes(inputs), line(), dtype, cost_of(call)))
        return result


ALLOCATIONS = {
    "_reshape_alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided", "resize_", "set_",
}  # fmt: skip


def launches_nothing(func: Any) -> bool:
    """Whether an operation returns a view, or allocates memory without initializing it."""
    views = (returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns)
    return func.overloadpacket.__name__ in ALLOCATIONS or torch.Tag.inplace_view in func.tags or any(views)


def cost_of(call: Call) -> Cost:
    if rule := BY_NAME.get(call.name):
        return rule(call)
    for start, rule in BY_START.items():
        if call.name.startswith(start):
            return rule(call)
    return Cost(SEVERAL.get(call.name, 1), 0, call.touched)  # elementwise, or a reduction


# Operations that read and write everything once, by several kernels.
SEVERAL = {"count_nonzero": 2, "cumsum": 2, "nonzero": 3}


def product(call: Call) -> Cost:
    """A product of (..., m, k) by (..., k, n) takes 2 m k n FLOPs."""
    left = call.args[-2] if call.name in ("mm", "bmm", "mv", "dot") else call.args[1]
    inner, read = left.shape[-1], sum(map(size, tensors_of(call.args)))  # without `out`
    return Cost(1, 2 * call.outputs[0].numel() * inner, read + call.written)


def gram(call: Call) -> Cost:
    """A batched product of (M, B) by (B, M). Both factors are the same input, which is therefore read twice."""
    (f_GBM,) = call.args
    return Cost(1, 2 * call.outputs[0].numel() * f_GBM.shape[1], 2 * size(f_GBM) + call.written)


def row_products(call: Call) -> Cost:
    """embedding_bag: N rows of D elements, each multiplied by a number and added to a sum."""
    rows, index = call.args[:2]
    flops = 2 * index.numel() * rows.shape[1]
    return Cost(1, flops, index.numel() * (rows.shape[1] * rows.element_size() + 3 * 8) + size(call.outputs[0]))


def row_gradients(call: Call) -> Cost:
    """The gradient of embedding_bag with respect to its weights: N products of two rows."""
    gradient, rows, index = call.args[:3]
    flops = 2 * index.numel() * rows.shape[1]
    read = index.numel() * rows.shape[1] * (rows.element_size() + gradient.element_size())
    return Cost(1, flops, read + call.written)


def gather(call: Call) -> Cost:
    """Reads and writes the chosen elements, and reads the indices."""
    return Cost(1, 0, 2 * call.written + sum(map(size, call.inputs[1:])))


def scatter(call: Call) -> Cost:
    """Reads values and indices, and writes as many bytes. Unless it works in place, it first copies the tensor."""
    in_place, sorts = call.name.endswith("_"), "put" in call.name and len(call.args) > 3 and bool(call.args[3])
    copied = 0 if in_place else 2 * size(call.inputs[0])
    launches = (3 if sorts else 1) + (0 if in_place else 1)
    return Cost(launches, 0, 2 * sum(map(size, call.inputs[1:])) + copied)


def index_fill(call: Call) -> Cost:
    tensor, dimension, index = call.args[:3]
    copied = 0 if call.name.endswith("_") else 2 * size(tensor)
    return Cost(1, 0, copied + size(tensor) // tensor.shape[dimension] * index.numel() + size(index))


def topk(call: Call) -> Cost:
    """A radix selection: one pass over the input for each 8 bits of an element, and two more to count and to gather."""
    element = call.inputs[0].element_size()
    return Cost(2 * element + 3, 0, (element + 2) * size(call.inputs[0]) + call.written)


def largest(call: Call) -> Cost:
    z_RN, k = call.args
    launches, moved = kernel_cost.of_largest(Division.of(*z_RN.shape, k), *z_RN.shape, k, z_RN.element_size())
    return Cost(launches, 0, moved)


def decode_rows(call: Call) -> Cost:
    """Assumes that all tokens have equally many latents. Torch sums the squared errors in one more launch."""
    value_N, row_FD, _, _, _, x_BD = call.args
    (tokens, width), per_token = x_BD.shape, len(value_N) / max(len(x_BD), 1)
    launches, moved = kernel_cost.of_decode([per_token] * tokens, width, row_FD.element_size(), row_tile(per_token))
    return Cost(launches + 1, 4 * len(value_N) * width, moved + tokens * x_BD.element_size() + x_BD.element_size())


def sum_rows(call: Call) -> Cost:
    index_N, row_RD, start_F = call.args[:3]
    width, stretches = row_RD.shape[1], len(start_F)
    counts = [len(index_N) / max(stretches, 1)] * stretches
    launches, moved = kernel_cost.of_sums(counts, width, row_RD.element_size(), SUM_TILE[-1])
    return Cost(launches, 2 * len(index_N) * width, moved)


def jump(call: Call) -> Cost:
    """A kernel computes parts of the tokens, and torch sums the parts."""
    z_BF, with_gradient = call.args[0], call.name == "jump_gradients"
    tokens, width = z_BF.shape
    elements, sums = (3 * z_BF.element_size(), 1) if with_gradient else (z_BF.element_size(), 2)
    launches, moved = kernel_cost.of_jump(tokens, width, elements, sums, JUMP_SPAN)
    added = sums * width * 4 * (-(-tokens // JUMP_SPAN) + 1)
    return Cost(launches + sums, 0, moved + added)


def gate(call: Call) -> Cost:
    """A kernel computes parts of the tokens, and torch sums the parts of each result."""
    z_BF, with_gradient = call.args[0], call.name == "gate_gradients"
    tokens, width = z_BF.shape
    passes, sums, scalars = (4, 3, 1) if with_gradient else (3, 2, 0)
    elements = passes * z_BF.element_size()
    launches, moved = kernel_cost.of_gate(tokens, width, elements, sums, scalars, JUMP_SPAN, JUMP_TILE[1])
    return Cost(launches + sums, 0, moved + sums * width * 4 * (-(-tokens // JUMP_SPAN) + 1))


def prefixes(call: Call) -> Cost:
    """A kernel computes parts of the tokens and dimensions, and torch sums the parts."""
    part_GBD, with_gradient = call.args[0], call.name == "prefix_gradients"
    count, tokens, width = part_GBD.shape
    launches, moved = kernel_cost.of_prefixes(
        part_GBD.shape, part_GBD.element_size(), PREFIX_SPAN, PREFIX_COLUMNS, with_gradient
    )
    parts, programs = -(-tokens // PREFIX_SPAN), -(-tokens // PREFIX_SPAN) * -(-width // PREFIX_COLUMNS)
    added = (parts + 1) * width if with_gradient else (programs + 1) * count
    return Cost(launches + 1, 0, moved + 4 * added)


def count_pairs(call: Call) -> Cost:
    word_FW, first_P, _ = call.args
    launches, moved = kernel_cost.of_pairs(len(first_P), word_FW.shape[1])
    return Cost(launches, 0, moved)


def following(call: Call) -> Cost:
    value_N = call.args[0]
    parts, _ = equal_spans(value_N.numel(), PROGRAMS, THRESHOLD_CHUNK)
    launches, moved = kernel_cost.of_following(value_N.numel(), value_N.element_size(), parts)
    return Cost(launches, 0, moved)


def normalizing(call: Call) -> Cost:
    """Two kernels; then torch sums the squares of blocks of columns."""
    x_BD, _, _, b_D, dtype = call.args
    elements = x_BD.element_size(), dtype.itemsize
    launches, moved = kernel_cost.of_normalizing(*x_BD.shape, elements, b_D is not None, BATCH_TILE)
    return Cost(launches + 1, 0, moved + 4 * (-(-x_BD.shape[1] // BATCH_TILE[1]) + 1))


def comparing(call: Call) -> Cost:
    """A kernel computes parts, and torch sums them."""
    (tokens, width), parts = call.args[0].shape, -(-len(call.args[0]) // BATCH_TILE[0])
    if call.name == "compare":
        launches, moved = kernel_cost.of_comparing(tokens, width, call.args[0].element_size(), BATCH_TILE)
        return Cost(launches + 1, 0, moved + 4 * (parts * -(-width // BATCH_TILE[1]) + 1))
    launches, moved = kernel_cost.of_comparing_backward(tokens, width, call.args[2].itemsize, BATCH_TILE)
    return Cost(launches + 1, 0, moved + 4 * width * (parts + 1))


def update(call: Call) -> Cost:
    weights, gradients, copies, unit = (call.args[n] for n in (0, 1, 5, 6))
    shapes, elements = [weight.shape for weight in weights], [gradient.element_size() for gradient in gradients]
    launches, moved = kernel_cost.of_update(shapes, elements, unit, len(copies), averaged=call.args[14] > 0)
    return Cost(launches, 0, moved)


def sort(call: Call) -> Cost:
    """A radix sort of elements with their positions (int64). Each 8 bits of an element take a pass over both."""
    element = call.inputs[0].element_size()
    return Cost(6, 0, 2 * element * (size(call.inputs[0]) + 8 * call.inputs[0].numel()))


def fused_adam(call: Call) -> Cost:
    """Reads parameter, gradient and two moments, and writes all but the gradient. One launch for every 36 tensors."""
    parameters = call.args[0]
    return Cost(2 + len(parameters) // 36, 0, 7 * sum(map(size, parameters)))


def foreach(call: Call) -> Cost:
    """One kernel for every 60 tensors. A norm needs one more kernel."""
    changed = sum(map(size, tensors_of(call.args[0]))) if call.name.endswith("_") else call.written
    launches = 1 + len(call.args[0]) // 60 + ("norm" in call.name)
    return Cost(launches, 0, sum(map(size, call.inputs)) + changed)


def fill(call: Call) -> Cost:
    return Cost(1, 0, call.written)


def copy(call: Call) -> Cost:
    return Cost(1, 0, size(call.args[1] if call.name == "copy_" else call.args[0]) + call.written)


def solver(launches: int, flops: Callable[[int, int], float]) -> Callable[[Call], Cost]:
    """The cost of a solver for a matrix (m, n). Solvers are far slower than products with the same FLOPs."""

    def cost(call: Call) -> Cost:
        *batch, m, n = call.args[0].shape
        count = torch.Size(batch).numel()
        return Cost(launches, int(count * flops(m, n)), call.touched)

    return cost


BY_START = {"_fused_adam": fused_adam, "_foreach_": foreach}
BY_NAME = {
    name: rule
    for rule, names in {
        product: "mm bmm mv dot addmm addmm_ baddbmm baddbmm_ addmv addmv_ _addmm_activation",
        row_products: "_embedding_bag _embedding_bag_forward_only",
        row_gradients: "_embedding_bag_per_sample_weights_backward",
        gather: "index index_select gather take _unsafe_index",
        scatter: "index_add index_add_ index_copy index_copy_ index_put index_put_ _index_put_impl_ _unsafe_index_put "
        "scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_",
        index_fill: "index_fill index_fill_",
        topk: "topk",
        largest: "largest",
        decode_rows: "decode_rows",
        sum_rows: "sum_rows",
        jump: "jump_gradients jump_counts",
        gram: "gram",
        count_pairs: "count_pairs",
        gate: "gate_latents gate_gradients",
        prefixes: "compare_prefixes prefix_gradients",
        following: "follow_threshold",
        normalizing: "normalize_batch",
        comparing: "compare compare_backward",
        update: "update",
        sort: "sort argsort",
        fill: "zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full arange eye scalar_tensor "
        "fill_ zero_ normal_ uniform_ rand randn rand_like",
        copy: "copy_ _to_copy clone",
        solver(20, lambda m, n: 4 * n * n * (m - n / 3)): "linalg_qr",
        solver(4, lambda m, n: n**3 / 3): "linalg_cholesky_ex",
        solver(30, lambda m, n: 9 * n**3): "_linalg_eigh",
        solver(2, lambda m, n: m * m * n): "linalg_solve_triangular triangular_solve",
    }.items()
    for name in names.split()
}
