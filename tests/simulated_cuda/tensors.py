"""Tensors that report the device cuda:0 and hold real values, and what each operation does with them.

Two rules are those of CUDA. Tensors on two devices cannot be combined, except that an elementwise operation takes a 0-d
tensor on the CPU. And whatever needs a value on the host (a number, a size, a branch) waits for the GPU; each such wait
is recorded in the ledger.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from . import streams
from .ledger import PAGEABLE, QUEUED, READ, is_watching, line, note
from .order import check_order

GPU, CPU, META = torch.device("cuda:0"), torch.device("cpu"), torch.device("meta")
# Operations whose CUDA kernels wait for a value: for a size, for a check of their input, or for what a solver reports.
WAITS = {
    "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "_unique2", "bincount", "equal", "histc", "is_nonzero",
    "linalg_eig", "linalg_lstsq", "masked_select", "nonzero", "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip
# Besides elementwise operations, these accept a 0-d tensor on the CPU, whose value they use as a number.
TAKES_NUMBER = {"fill_", "index_fill", "index_fill_", "masked_fill", "masked_fill_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
PINNED: dict[int, torch.UntypedStorage] = {}  # address -> pinned memory; never freed, so no address is reused


class Values:
    """The device that holds the values of new tensors: the CPU, or META if only shapes are needed."""

    device = CPU


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated GPU. Its values are `held`, on the CPU."""

    held: torch.Tensor
    used_by: list[streams.Stream]  # the memory is not freed before their work is done
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "SimulatedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        tensor.held, tensor.used_by = held, []
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], meta: None, size: Any, stride: Any) -> torch.Tensor:
        return SimulatedTensor(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.held})"

    def tolist(self) -> Any:
        note(READ, f"tolist of {shapes([self])}")
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first. ({line()})")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def record_stream(self, stream: Any) -> None:
        self.used_by.append(stream)


class Dispatch(TorchDispatchMode):
    """Also simulates operations that have no GPU tensor among their arguments, such as those that create one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def held(tree: Any) -> Any:
    """The same arguments, with each GPU tensor replaced by the CPU tensor that holds its values."""
    return mapped(lambda tensor: tensor.held if isinstance(tensor, SimulatedTensor) else tensor, tree)


def simulated(tree: Any) -> Any:
    return mapped(SimulatedTensor, tree)


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `change` to each tensor in the arguments or result of an operation. (pytrees are several times slower.)"""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([mapped(change, part) for part in tree])
    if isinstance(tree, dict):
        return {key: mapped(change, value) for key, value in tree.items()}
    return tree


def tensors_of(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(found.append, tree)
    return found


def shapes(tensors: Iterable[torch.Tensor]) -> str:
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors)


def on_gpu(device: Any) -> bool:
    """Whether the argument `device` is given and is a GPU."""
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Mark the memory of a CPU tensor as pinned."""
    PINNED[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, SimulatedTensor) and tensor.untyped_storage().data_ptr() in PINNED


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation, whichever devices its arguments are on."""
    name = func.overloadpacket.__name__
    tensors = tensors_of((args, kwargs))
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    makes = "device" in kwargs and name != "_to_copy"
    to_gpu = on_gpu(kwargs["device"]) if makes and kwargs["device"] is not None else bool(ours)
    if name in SPECIAL and (ours or on_gpu(kwargs.get("device"))):
        return SPECIAL[name](func, args, kwargs)
    if not ours and not to_gpu:
        result = func(*args, **kwargs)
        return pin(result) if kwargs.get("pin_memory") else result
    check_generator(args, kwargs)
    if makes:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        kwargs["device"] = Values.device if to_gpu else CPU
        result = func(*held(args), **held(kwargs))
        return simulated(result) if to_gpu else result
    if name in WAITS:
        note(READ, f"{name} of {shapes(tensors)}")
    if name in INDEXED:
        tensors = check_index(name, args)
    check_devices(func, name, tensors)
    if Values.device == META and name.startswith("_fused_adam"):
        return None  # it only changes its arguments, and torch has no meta kernel for it
    if is_watching() and Values.device != META:
        check_order(func, name, held(args), held(kwargs))
    compute = unrounded_product if func is torch.ops.aten.mm.dtype else func
    return wrap(func, args, kwargs, compute(*held(args), **held(kwargs)))


def wrap(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The result as GPU tensors. For an argument that was written to, the result is that same tensor object."""
    if torch.Tag.inplace_view in func.tags:  # changes the shape of its argument
        return return_and_correct_aliasing(func, args, kwargs, args[0])
    schema = func._schema
    if any(returned.alias_info is not None and returned.alias_info.is_write for returned in schema.returns):
        given = [*zip(schema.arguments, args, strict=False)]
        given += [(one, kwargs[one.name]) for one in schema.arguments if one.name in kwargs]
        written = [value for one, value in given if one.alias_info is not None and one.alias_info.is_write]
        return written[0] if len(schema.returns) == 1 else tuple(written)
    return simulated(result)


def check_devices(func: Any, name: str, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError, as CUDA does, if tensors of the CPU meet those of the GPU."""
    number = torch.Tag.pointwise in func.tags and not name.startswith("_foreach") or name in TAKES_NUMBER
    for tensor in tensors:
        if not isinstance(tensor, SimulatedTensor) and not (number and tensor.dim() == 0):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({line()}: {name} of {shapes(tensors)}, of which {shapes([tensor])} is on the cpu)"
            )


def check_index(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Write down what an index costs; returns the tensors besides the indices."""
    for index in tensors_of(args[1]):
        if isinstance(index, SimulatedTensor):
            if not isinstance(args[0], SimulatedTensor):
                raise RuntimeError(
                    f"indices should be either on cpu or on the same device as the indexed tensor (cpu) ({line()})"
                )
            if index.dtype in (torch.bool, torch.uint8):
                note(READ, f"{name} by a mask of {shapes([index])}")
        else:
            note(PAGEABLE, f"{name} by an index on the CPU, {shapes([index])}")
    values = args[2:3]
    for value in values:
        if isinstance(value, torch.Tensor) and not isinstance(value, SimulatedTensor) and value.dim() == 0:
            note(PAGEABLE, f"{name} with a value on the CPU")
            values = ()
    return tensors_of((args[0], values))


def unrounded_product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A product that returns another dtype; torch supports this only on CUDA."""
    return left.to(dtype) @ right.to(dtype)


def check_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Generator) and value.device.type == "cpu":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({line()})")


# --- operations of their own ------------------------------------------------------------------------------------------


def read_number(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    note(READ, "the value of a tensor (item, int, float, bool, if)")
    return func(*held(args), **kwargs)


def to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Tensor.to where it makes a new tensor, on the same or another device."""
    source, device = args[0], kwargs.get("device")
    from_gpu = isinstance(source, SimulatedTensor)
    to_gpu = from_gpu if device is None else on_gpu(device)
    options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    values = source.held if from_gpu else source
    if to_gpu:
        options["device"] = Values.device
    if from_gpu == to_gpu:
        return SimulatedTensor(func(values, **options)) if to_gpu else func(values, **options)
    waits = not kwargs.get("non_blocking") or not (from_gpu or is_pinned(source))
    if waits:
        result = func(values, **options)
    else:
        result = torch.empty_like(values, dtype=options.get("dtype"), device=options.get("device"))
    target = SimulatedTensor(result) if to_gpu else result if waits else pin(result)
    transfer(target, source, waits, lambda: None if waits else result.copy_(values))
    return target


def copy_into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Tensor.copy_."""
    target, source = args[:2]
    non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    values, into = held(source), held(target)
    if isinstance(source, SimulatedTensor) == isinstance(target, SimulatedTensor):
        streams.current_stream().push(lambda: into.copy_(values))
        return target
    host = target if isinstance(source, SimulatedTensor) else source
    transfer(target, source, not (non_blocking and is_pinned(host)), lambda: into.copy_(values))
    return target


def transfer(target: torch.Tensor, source: torch.Tensor, waits: bool, job: Callable[[], object]) -> None:
    """Queue a copy between the devices; if the host `waits` for it, it is done at once."""
    what = f"{shapes([source])} to the {'GPU' if isinstance(target, SimulatedTensor) else 'host'}"
    stream = streams.current_stream()
    stream.push(job)
    if waits:
        note(READ if isinstance(source, SimulatedTensor) else PAGEABLE, what)
        stream.synchronize()
    else:
        note(QUEUED, what)


SPECIAL: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": read_number,
    "_to_copy": to_copy,
    "copy_": copy_into,
    "device": lambda func, args, kwargs: GPU,
    "_pin_memory": lambda func, args, kwargs: pin(args[0].clone()),
    "is_pinned": lambda func, args, kwargs: is_pinned(args[0]),
    "_assert_async": lambda func, args, kwargs: None,
}
