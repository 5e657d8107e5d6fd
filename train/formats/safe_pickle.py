"""A torch state dict (`ae.pt`) without torch.load: its pickle is looked at, and may only name tensors.

A pickle is a program. This one may make an OrderedDict, and call `torch._utils._rebuild_tensor_v2`, in whose place
stands a function that only writes down what it is told. Everything else is code, and the file is refused before anything
runs. What is written down is compared with the sizes of the files inside before a byte of them is read: torch.load
trusts the numbers of elements that a pickle claims.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from .safe_read import TensorHeader, check_archive, damaged_if_unreadable, short_repr

MAX_PICKLE_BYTES = (
    1 << 14
)  # a state dict of ten tensors has 1,500 bytes; one of a million nested tuples would exhaust the stack
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
}  # fmt: skip
ALLOWED_GLOBALS = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")}
ALLOWED_GLOBALS |= {("torch", name) for name in STORAGE_DTYPES}
ALLOWED_OPCODES = set(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 "
    "BININT2 LONG1 BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS".split()
)


class StorageRef(NamedTuple):
    dtype: torch.dtype
    key: str
    elements: int


class TensorView(NamedTuple):
    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class RebuildTensor:
    """Stands for torch._utils._rebuild_tensor_v2; nothing can be set on it."""

    __slots__ = ()

    def __call__(self, storage: StorageRef, offset: int, shape: Any, stride: Any, *_: Any) -> TensorView:
        return TensorView(storage, offset, tuple(shape), tuple(stride))


class TensorUnpickler(pickle.Unpickler):
    """Knows three names, and opens nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        if name == "OrderedDict":
            return OrderedDict
        return RebuildTensor() if name == "_rebuild_tensor_v2" else STORAGE_DTYPES[name]

    def persistent_load(self, what: Any) -> StorageRef:
        kind, dtype, key, _, elements = what
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("no storage")
        return StorageRef(dtype, key, elements)


def check_opcodes(path: Path, program: bytes) -> None:
    """UsageError when a pickle does anything but name tensors. Reads it; runs nothing."""
    for opcode, argument, _ in pickletools.genops(program):
        name = tuple(str(argument).split(" ", 1))
        if opcode.name == "GLOBAL" and name not in ALLOWED_GLOBALS:
            raise UsageError(
                f"Refused: {path} is a pickle with code in it ({short_repr('.'.join(name))}); nothing of it was run. "
                "Ask the author for safetensors, or for a plain state dict."
            )
        if opcode.name not in ALLOWED_OPCODES:
            raise UsageError(
                f"Refused: {path} is a pickle that does more than name tensors ({opcode.name}); nothing of it was run. "
                "Ask the author for safetensors, or for a plain state dict."
            )
        if (
            opcode.name == "LONG_BINPUT" and not 0 <= int(argument) < MAX_PICKLE_BYTES
        ):  # it makes a table as long as it says
            raise DamagedError(f"{path}: its pickle asks for a table of {argument:,} entries. Get it again.")


def read_state_dict_headers(path: Path) -> dict[str, TensorHeader]:
    """What a file of torch.save claims to hold. Raises UsageError for code, DamagedError for what cannot be."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise UsageError(
                f"Refused: {path} is no zip file of torch.save: torch before 1.6 wrote bare pickles, which can run code. "
                "Ask the author to save it anew."
            )
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive:
        check_archive(path, archive, compressed=False)
        programs = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if len(programs) != 1 or programs[0].file_size > MAX_PICKLE_BYTES:
            raise DamagedError(f"{path} is no state dict: it holds {len(programs)} pickles, or a very long one.")
        prefix = programs[0].filename.removesuffix("data.pkl")
        program = archive.read(programs[0])
        check_opcodes(path, program)
        found = TensorUnpickler(io.BytesIO(program)).load()
        order = f"{prefix}byteorder"
        if order in archive.namelist() and archive.getinfo(order).file_size < 16 and archive.read(order) != b"little":
            raise DamagedError(f"{path} was written on a big-endian machine. Ask the author for safetensors.")
        if not isinstance(found, dict) or not all(
            isinstance(v, TensorView) and isinstance(k, str) for k, v in found.items()
        ):
            raise DamagedError(f"{path} holds no plain dictionary of tensors. Ask the author for a state dict.")
        return {name: view_header(path, archive, f"{prefix}data/", name, view) for name, view in found.items()}


def view_header(path: Path, archive: zipfile.ZipFile, prefix: str, name: str, view: TensorView) -> TensorHeader:
    storage, offset, shape, stride = view
    counts = (storage.elements, offset, *shape, *stride)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts) or len(shape) != len(stride):
        raise DamagedError(f"{path}: {name} has sizes that are none. Get it again.")
    there = archive.getinfo(entry := prefix + storage.key).file_size
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    fits = storage.elements * storage.dtype.itemsize == there and last < storage.elements
    if len(shape) > 2 or not fits or math.prod(shape) > storage.elements:
        raise DamagedError(
            f"{path}: {name} claims {' x '.join(f'{n:,}' for n in shape) or 1} numbers of a storage of {storage.elements:,}, and there are {there:,} bytes. Get it again."
        )
    return TensorHeader(shape, storage.dtype, lambda: read_view(path, entry, view))


def read_view(path: Path, entry: str, view: TensorView) -> Tensor:
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive:
        data = bytearray(archive.read(entry))
        whole = torch.frombuffer(data, dtype=view.storage.dtype) if data else torch.zeros(0, dtype=view.storage.dtype)
        return whole.as_strided(view.shape, view.stride, view.offset)
