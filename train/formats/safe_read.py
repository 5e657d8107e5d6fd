"""Read untrusted files safely.

The rules that every reader in this folder follows, and the reasons:

1. Nothing in a foreign file is run. Neither torch nor numpy unpickles anything: a pickle is a program, and loading it
   can do whatever its author likes. Object arrays in an .npz are pickles and are rejected; for ae.pt see
   safe_pickle.py.
2. Only regular files inside the SAE's folder are opened. Symbolic links and archive entries that point outside this
   folder are rejected, so that an import cannot be made to read other files. A pipe or device counts as missing,
   because opening it can block or have side effects.
3. Memory is bounded by the size of the file. A header can declare any shape. So before anything is allocated, the
   declared shape is compared with the bytes in the file and with the shapes that the format requires. Archives that
   would unpack to more than 100 times their size, and headers or configs of more than 1 MiB, are rejected.
4. Any other exception that a parser raises on untrusted bytes becomes a DamagedError that names the file.
"""

import contextlib
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import DamagedError, SaeError, UsageError
from ...common.files import parse_json, read_file

MAX_HEADER_BYTES = 1 << 20  # size limit of a header or config; those of real SAEs are far smaller
MAX_COMPRESSION_RATIO = 100  # weights hardly compress; a higher ratio means that the archive is meant to fill memory
MAX_WIDTH = 1 << 31
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32,
}  # fmt: skip
NUMPY_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "int64": torch.int64,
    "int32": torch.int32,
}  # fmt: skip


@contextlib.contextmanager
def damaged_if_unreadable(path: Path) -> Iterator[None]:
    """Turn any exception that a parser raises on untrusted bytes into a DamagedError."""
    try:
        yield
    except SaeError:
        raise
    except Exception as error:
        raise DamagedError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}). It is truncated, overwritten or not "
            "of this file type; download it again."
        ) from error


@dataclass(frozen=True)
class TensorHeader:
    """The shape and dtype of one tensor, as declared in the file; `read` loads the tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class ForeignFolder:
    """The folder of a foreign SAE. Only regular files inside the folder are ever opened.

    `chosen` is the file with the weights, if the user named a file in a folder that can contain several such files.
    """

    def __init__(self, path: Path, chosen: str | None = None) -> None:
        self.path = path
        self.chosen = chosen

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def require_file(self, name: str) -> Path:
        """The path of a file.

        Raises UsageError if the path is a link that leads outside the folder, and DamagedError if the file is not a
        regular file.
        """
        path, root = self.path / name, self.path.resolve()
        if not path.resolve().is_relative_to(root):
            raise UsageError(
                f"Refused: {path} is a link to {path.resolve()}, outside its folder. If you trust it, copy the files: "
                f"cp -rL {self.path} copy"
            )
        if not path.is_file():
            raise DamagedError(f"{path} is missing. Download it again.")
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object. Raises DamagedError if the file is too large or contains anything but a JSON object."""
        path = self.require_file(name)
        if (size := path.stat().st_size) > MAX_HEADER_BYTES:
            raise DamagedError(f"{path} has {size:,} bytes, but a config may have at most {MAX_HEADER_BYTES:,}.")
        content = parse_json(read_file(path, "Download it again."), path, "Download it again.")
        if not isinstance(content, dict):
            raise DamagedError(f"{path} does not contain a JSON object. Download it again.")
        return content


# --- values of a config: any value can have any JSON type ------------------------------------------------------------


def get_positive_int(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_WIDTH:
        raise DamagedError(
            f"{path}: {key} is {short_repr(value)}; expected a whole number from 1 to {MAX_WIDTH - 1:,}."
        )
    return value


def get_bool(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise DamagedError(f"{path}: {key} is {short_repr(value)}; expected true or false.")
    return value


def get_str(path: Path, config: Mapping[str, Any], key: str, default: str) -> str:
    value = config.get(key, default)
    if not isinstance(value, str):
        raise DamagedError(f"{path}: {key} is {short_repr(value)}; expected a string.")
    return value


def get_nested(config: Mapping[str, Any], *keys: str) -> Any:
    """The value at a path of keys, or None."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


# --- safetensors ------------------------------------------------------------------------------------------------------


def read_safetensors_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file by name. Raises DamagedError if the file lacks some of the tensors' bytes."""
    size = path.stat().st_size
    with damaged_if_unreadable(path), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise DamagedError(
                f"{path} declares a header of {length:,} bytes, but has {size:,} bytes. Download it again."
            )
        entries = parse_json(file.read(length), path, "Download it again.")
        data_start = 8 + length
        headers = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            shape, dtype = tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"])
            begin, end = entry["data_offsets"]
            if dtype is None:
                raise DamagedError(
                    f"{path}: {name} has dtype {short_repr(entry['dtype'])}; expected a floating-point type."
                )
            check_header(path, name, shape, dtype, end - begin)
            if not 0 <= begin <= end <= size - data_start:
                raise DamagedError(f"{path}: {name} exceeds the size of the file. Download it again.")
            read = partial(read_safetensors_tensor, path, data_start + begin, shape, dtype)
            headers[name] = TensorHeader(shape, dtype, read)
        return headers


def read_safetensors_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with path.open("rb") as file:
        file.seek(offset)
        return tensor_from_bytes(bytearray(file.read(math.prod(shape) * dtype.itemsize)), shape, dtype)


# --- npz --------------------------------------------------------------------------------------------------------------


def read_npz_headers(path: Path) -> dict[str, TensorHeader]:
    """The arrays of an npz file by name. Raises UsageError for object arrays, which are pickles."""
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive:
        check_archive(path, archive, compressed=True)
        return dict(read_npy_header(path, archive, info) for info in archive.infolist())


def read_npy_header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, TensorHeader]:
    name = info.filename.removesuffix(".npy")
    if name == info.filename or "/" in name:
        raise DamagedError(f"{path} contains {short_repr(info.filename)}, which is not an array. Download it again.")
    parsers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        shape, fortran_order, numpy_dtype = parsers[version](file, max_header_size=4096)
        offset = file.tell()
    if numpy_dtype.hasobject:
        raise UsageError(
            f"Refused: {name} in {path} is an object array, which is a pickle and can run code. "
            "Ask the author for plain arrays."
        )
    dtype = NUMPY_DTYPES.get(numpy_dtype.name) if numpy_dtype.isnative else None
    if dtype is None:
        raise DamagedError(
            f"{path}: {name} has dtype {numpy_dtype}; expected floating point in this machine's byte order."
        )
    check_header(path, name, shape, dtype, info.file_size - offset)
    return name, TensorHeader(
        shape, dtype, partial(read_npz_tensor, path, info.filename, offset, shape, dtype, fortran_order)
    )


def read_npz_tensor(
    path: Path, entry: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype, fortran_order: bool
) -> Tensor:
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive, archive.open(entry) as file:
        file.read(offset)
        data = bytearray(file.read(math.prod(shape) * dtype.itemsize))
        tensor = tensor_from_bytes(data, shape[::-1] if fortran_order else shape, dtype)
        return tensor.T if fortran_order and len(shape) == 2 else tensor


def check_archive(path: Path, archive: zipfile.ZipFile, *, compressed: bool) -> None:
    """Reject a zip file if an entry is a duplicate, is encrypted or has a path that leads out of the folder.

    Also reject a file that unpacks to far more than its size.

    Unless `compressed` is set, all entries have to be stored uncompressed, so that they cannot exceed the file's size.
    """
    entries, size = archive.infolist(), path.stat().st_size
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise DamagedError(f"{path} contains two entries with the same name. Download it again.")
    for entry in entries:
        name = short_repr(entry.filename)
        if entry.filename.startswith(("/", "\\")) or ".." in Path(entry.filename).parts or entry.flag_bits & 1:
            raise UsageError(f"Refused: {path} contains {name}, which is encrypted or points outside the archive.")
        if not compressed and (entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size):
            raise DamagedError(f"{path}: {name} is compressed, which torch.save never does. Download it again.")
    if (total := sum(entry.file_size for entry in entries)) > size * (MAX_COMPRESSION_RATIO if compressed else 1):
        raise DamagedError(f"{path} declares {total:,} bytes of entries, but has {size:,} bytes. Download it again.")


# --- tensors ----------------------------------------------------------------------------------------------------------


def check_header(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, available: int) -> None:
    """Raise DamagedError if a shape is invalid, or if its size in bytes is not exactly `available`."""
    if len(shape) > 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise DamagedError(f"{path}: {name} has the shape {short_repr(shape)}; expected at most two dimensions.")
    needed = math.prod(shape) * dtype.itemsize
    if needed != available:
        raise DamagedError(
            f"{path}: {name} is declared with {format_shape(shape)} numbers ({needed:,} bytes), but has "
            f"{available:,} bytes. Download it again."
        )


def format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape) or "1"


def tensor_from_bytes(data: bytearray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.zeros(shape, dtype=dtype)


def vector_size(path: Path, headers: Mapping[str, TensorHeader], name: str) -> int:
    """The size of a vector, from its header."""
    if name not in headers or len(headers[name].shape) != 1 or headers[name].shape[0] < 1:
        raise DamagedError(f"{path} has no vector {name}. It contains {short_repr(sorted(headers))}.")
    return headers[name].shape[0]


def read_weights(
    path: Path, headers: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Read the tensors of a format.

    If the name or shape of any tensor is not as expected, raises DamagedError before reading a tensor.

    A transposed matrix is also rejected: nothing is guessed. Values have to be finite.
    """
    errors = [f"{name} is missing" for name in expected if name not in headers]
    errors += [f"{short_repr(name)} is not expected" for name in headers if name not in expected]
    for name, shape in expected.items():
        if name in headers and headers[name].shape != shape:
            transposed = len(shape) == 2 and headers[name].shape == shape[::-1]
            hint = " (it is transposed; this is not corrected automatically)" if transposed else ""
            errors.append(f"{name} has shape {headers[name].shape}, expected {shape}{hint}")
    if errors:
        raise DamagedError(f"{path}: {'; '.join(errors[:6])}. Download it again, or ask the author.")
    tensors = {name: headers[name].read() for name in expected}
    not_finite = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if not_finite:
        raise DamagedError(f"{path}: {', '.join(not_finite)} contains NaN or infinity.")
    return tensors
