"""The tensors of a `torch.save` state dict (ae.pt), read without torch.load and without running its pickle.

A pickle is a program. Every instruction is inspected before any instruction runs. The file is rejected if it builds
anything other than dictionaries, lists, tuples, numbers, strings, an OrderedDict, and tensors made with
`torch._utils._rebuild_tensor_v2`. Instead of `_rebuild_tensor_v2`, the unpickler calls `RebuildTensor`, which only
records its arguments. The recorded sizes are compared with the sizes of the entries in the zip file before any byte of
a tensor is read.

torch.load is not used, not even with `weights_only=True`: it trusts the number of elements stated in a pickle.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from .safe_read import TensorHeader, check_archive, damaged_if_unreadable, format_shape, short_repr

# The pickle of an SAE's state dict has about 1,500 bytes. The limit is needed because a pickle of, for example, a
# million nested tuples would exhaust the stack.
MAX_PICKLE_BYTES = 1 << 14
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
}  # fmt: skip
ALLOWED_GLOBALS = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")}
ALLOWED_GLOBALS |= {("torch", name) for name in STORAGE_DTYPES}
ALLOWED_OPCODES = set(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT "
    "BININT1 BININT2 LONG1 BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS "
    "APPEND APPENDS".split()
)
ASK_FOR_SAFETENSORS = "Nothing in it was run. Ask the author for safetensors, or for a plain state dict."


class StorageRef(NamedTuple):
    """A storage that the pickle refers to: an entry `data/<key>` of the zip file."""

    dtype: torch.dtype
    key: str
    elements: int


class TensorView(NamedTuple):
    """A tensor that the pickle describes: a strided view of a storage. None of these fields has been checked yet."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class RebuildTensor:
    """Replaces torch._utils._rebuild_tensor_v2 and only records its arguments.

    No attribute can be set on an instance.
    """

    __slots__ = ()

    def __call__(self, storage: StorageRef, offset: int, shape: Any, stride: Any, *_: Any) -> TensorView:
        return TensorView(storage, offset, tuple(shape), tuple(stride))


class TensorUnpickler(pickle.Unpickler):
    """An unpickler that resolves only the names in ALLOWED_GLOBALS.

    None of these names resolves to the real torch object.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        if name == "OrderedDict":
            return OrderedDict
        return RebuildTensor() if name == "_rebuild_tensor_v2" else STORAGE_DTYPES[name]

    def persistent_load(self, pid: Any) -> StorageRef:
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("not a storage")
        return StorageRef(dtype, key, elements)


def check_opcodes(path: Path, program: bytes) -> None:
    """Raise UsageError if a pickle does more than describe tensors. Inspects the program without running it."""
    for opcode, argument, _ in pickletools.genops(program):
        name = tuple(str(argument).split(" ", 1))
        if opcode.name == "GLOBAL" and name not in ALLOWED_GLOBALS:
            raise UsageError(
                f"Refused: {path} is a pickle that contains code ({short_repr('.'.join(name))}). {ASK_FOR_SAFETENSORS}"
            )
        if opcode.name not in ALLOWED_OPCODES:
            raise UsageError(
                f"Refused: {path} is a pickle that does more than describe tensors ({opcode.name}). "
                f"{ASK_FOR_SAFETENSORS}"
            )
        if opcode.name == "LONG_BINPUT":  # the unpickler allocates a memo table up to this index
            assert isinstance(argument, int)
            if not 0 <= argument < MAX_PICKLE_BYTES:
                raise DamagedError(f"{path}: its pickle requests a memo table of {argument:,} entries.")


def read_state_dict_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a `torch.save` file by name.

    Raises UsageError for a pickle that contains code, and DamagedError for sizes that do not match the file.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise UsageError(
                f"Refused: {path} is not a zip file. torch before 1.6 saved bare pickles, which can run code. "
                "Ask the author to save it with a newer torch."
            )
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive:
        check_archive(path, archive, compressed=False)
        programs = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(programs) != 1 or programs[0].file_size > MAX_PICKLE_BYTES:
            raise DamagedError(
                f"{path} is not a state dict: expected one pickle of at most {MAX_PICKLE_BYTES:,} bytes, found "
                f"{[entry.file_size for entry in programs[:4]]}."
            )
        root = programs[0].filename.removesuffix("data.pkl")
        program = archive.read(programs[0])
        check_opcodes(path, program)
        content = TensorUnpickler(io.BytesIO(program)).load()
        check_byte_order(path, archive, f"{root}byteorder")
        if not isinstance(content, dict) or not all(
            isinstance(view, TensorView) and isinstance(name, str) for name, view in content.items()
        ):
            raise DamagedError(f"{path} is not a plain dictionary of tensors. Ask the author for a state dict.")
        return {name: view_header(path, archive, f"{root}data/", name, view) for name, view in content.items()}


def check_byte_order(path: Path, archive: zipfile.ZipFile, entry: str) -> None:
    if entry in archive.namelist() and archive.getinfo(entry).file_size < 16 and archive.read(entry) != b"little":
        raise DamagedError(f"{path} was written on a big-endian machine. Ask the author for safetensors.")


def view_header(path: Path, archive: zipfile.ZipFile, data: str, name: str, view: TensorView) -> TensorHeader:
    """The header of a tensor.

    Raises DamagedError if the tensor exceeds its storage, or if the storage exceeds the zip file.
    """
    storage, offset, shape, stride = view
    counts = (storage.elements, offset, *shape, *stride)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts) or len(shape) != len(stride):
        raise DamagedError(f"{path}: {name} has invalid sizes or strides. Download it again.")
    available = archive.getinfo(entry := data + storage.key).file_size
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    fits = storage.elements * storage.dtype.itemsize == available and last < storage.elements
    if len(shape) > 2 or not fits or math.prod(shape) > storage.elements:
        raise DamagedError(
            f"{path}: {name} is declared with {format_shape(shape)} numbers in a storage of {storage.elements:,}, but "
            f"the file has {available:,} bytes for it. Download it again."
        )
    return TensorHeader(shape, storage.dtype, partial(read_view, path, entry, view))


def read_view(path: Path, entry: str, view: TensorView) -> Tensor:
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive:
        data = bytearray(archive.read(entry))
        flat = torch.frombuffer(data, dtype=view.storage.dtype) if data else torch.zeros(0, dtype=view.storage.dtype)
        return flat.as_strided(view.shape, view.stride, view.offset)
