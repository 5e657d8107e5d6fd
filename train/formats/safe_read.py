"""Files of strangers: looked at before they are read, and read without running anything in them.

A header may claim any shape. What it claims is compared with the bytes that are there and with the shapes that the
format demands, and only then memory is taken. Names may not leave the folder, also not through a link.
"""

import contextlib
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import DamagedError, SaeError, UsageError

MAX_HEADER_BYTES = 1 << 20  # no header or configuration of an SAE is that long
MAX_COMPRESSION_RATIO = 100  # how much smaller weights can be compressed; what claims more is made to fill the memory
MAX_WIDTH = 1 << 31  # of a width
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}  # fmt: skip
NUMPY_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "int64": torch.int64, "int32": torch.int32}  # fmt: skip


@contextlib.contextmanager
def damaged_if_unreadable(path: Path) -> Iterator[None]:
    """Whatever a parser says of bytes that an enemy may have chosen becomes a sentence."""
    try:
        yield
    except SaeError:
        raise
    except Exception as error:
        raise DamagedError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}); it is cut off, overwritten or no such file. Get it again."
        ) from error


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class ForeignFolder:
    """The folder of a foreign SAE. Only regular files inside it are ever opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def file(self, name: str) -> Path:
        path, root = self.path / name, self.path.resolve()
        if not path.resolve().is_relative_to(root):
            raise UsageError(
                f"Refused: {path} leads out of its folder, to {path.resolve()}. If you trust it, copy the files: cp -rL {self.path} copy"
            )
        if not path.is_file():
            raise DamagedError(f"{path} is missing. Get it again.")
        return path

    def record(self, name: str) -> dict[str, Any]:
        """A JSON object; DamagedError when it is none."""
        path = self.file(name)
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise DamagedError(f"{path} has {path.stat().st_size:,} bytes, too many for a configuration. Get it again.")
        with damaged_if_unreadable(path):
            content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise DamagedError(f"{path} holds no JSON object. Get it again.")
        return content


def get_positive_int(path: Path, record: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number of a record."""
    value = record.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_WIDTH:
        raise DamagedError(
            f"{path}: {key} is {short_repr(value)}, and has to be a whole number from 1 to {MAX_WIDTH - 1:,}."
        )
    return value


def get_bool(path: Path, record: Mapping[str, Any], key: str, default: bool) -> bool:
    value = record.get(key, default)
    if not isinstance(value, bool):
        raise DamagedError(f"{path}: {key} is {short_repr(value)}, and has to be true or false.")
    return value


def get_str(path: Path, record: Mapping[str, Any], key: str, default: str) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise DamagedError(f"{path}: {key} is {short_repr(value)}, and has to be a word.")
    return value


def get_nested(record: Mapping[str, Any], *path: str) -> Any:
    """What is at a path of keys, or None."""
    found: Any = record
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def short_repr(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."


def read_safetensors_headers(path: Path) -> dict[str, TensorHeader]:
    """What a safetensors file claims. DamagedError unless each tensor's bytes are there."""
    size = path.stat().st_size
    with damaged_if_unreadable(path), path.open("rb") as file:
        (vector_size,) = struct.unpack("<Q", file.read(8))
        if vector_size > min(MAX_HEADER_BYTES, size - 8):
            raise DamagedError(
                f"{path} claims a header of {vector_size:,} bytes, and has {size:,} in all. Get it again."
            )
        header = json.loads(file.read(vector_size))
        start, claims = 8 + vector_size, {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, dtype = tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"])
            begin, end = entry["data_offsets"]
            if dtype is None:
                raise DamagedError(
                    f"{path}: {name} is of type {short_repr(entry['dtype'])}; weights are floating point."
                )
            check_header(path, name, shape, dtype, end - begin)
            if not 0 <= begin <= end <= size - start:
                raise DamagedError(f"{path}: {name} is said to lie outside of the file. Get it again.")
            claims[name] = TensorHeader(
                shape, dtype, lambda at=start + begin, s=shape, d=dtype: read_safetensors_tensor(path, at, s, d)
            )
        return claims


def read_npz_headers(path: Path) -> dict[str, TensorHeader]:
    """What an npz file claims. Object arrays, which are pickles, are refused."""
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive:
        claims = {}
        check_archive(path, archive, compressed=True)
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename or "/" in name:
                raise DamagedError(f"{path} holds {short_repr(info.filename)}, which is no array. Get it again.")
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
                    version
                ]
                shape, fortran, kind = header(file, max_header_size=4096)
                at = file.tell()
            if kind.hasobject:
                raise UsageError(
                    f"Refused: {name} of {path} is an object array, which is a pickle and can run code. Ask the author for plain arrays."
                )
            dtype = NUMPY_DTYPES.get(kind.name) if kind.isnative else None
            if dtype is None:
                raise DamagedError(
                    f"{path}: {name} is of type {kind}; weights are floating point of this machine's order."
                )
            check_header(path, name, shape, dtype, info.file_size - at)
            claims[name] = TensorHeader(shape, dtype, lambda n=info.filename, a=at, s=shape, d=dtype, f=fortran: read_npz_tensor(path, n, a, s, d, f))  # fmt: skip
        return claims


def check_archive(path: Path, archive: zipfile.ZipFile, *, compressed: bool) -> None:
    """No entry twice or encrypted, no name out of the folder, and not much more inside than the file has bytes."""
    infos, size = archive.infolist(), path.stat().st_size
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        raise DamagedError(f"{path} holds a file twice. Get it again.")
    for info in infos:
        if info.filename.startswith(("/", "\\")) or ".." in Path(info.filename).parts or info.flag_bits & 1:
            raise UsageError(
                f"Refused: {path} holds {short_repr(info.filename)}, which leads out of it or is encrypted."
            )
        if not compressed and (info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size):
            raise DamagedError(
                f"{path}: {short_repr(info.filename)} is compressed, as this format never is. Get it again."
            )
    if (total := sum(info.file_size for info in infos)) > size * (MAX_COMPRESSION_RATIO if compressed else 1):
        raise DamagedError(f"{path} claims to hold {total:,} bytes, and has {size:,}. Get it again.")


def check_header(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, there: int) -> None:
    """DamagedError unless a shape is one, and needs the bytes that are there."""
    if len(shape) > 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise DamagedError(f"{path}: {name} has the shape {short_repr(shape)}, and has to have two sizes at most.")
    needed = math.prod(shape) * dtype.itemsize
    if needed != there:
        raise DamagedError(
            f"{path}: {name} claims {' x '.join(f'{n:,}' for n in shape) or 1} numbers, {needed:,} bytes, and there are {there:,}. Get it again."
        )


def read_safetensors_tensor(path: Path, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with path.open("rb") as file:
        file.seek(at)
        return tensor_from_bytes(bytearray(file.read(math.prod(shape) * dtype.itemsize)), shape, dtype)


def read_npz_tensor(
    path: Path, name: str, at: int, shape: tuple[int, ...], dtype: torch.dtype, fortran: bool
) -> Tensor:
    with damaged_if_unreadable(path), zipfile.ZipFile(path) as archive, archive.open(name) as file:
        file.read(at)
        data = bytearray(file.read(math.prod(shape) * dtype.itemsize))
        tensor = tensor_from_bytes(data, shape[::-1] if fortran else shape, dtype)
        return tensor.T if fortran and len(shape) == 2 else tensor


def tensor_from_bytes(data: bytearray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.zeros(shape, dtype=dtype)


def vector_size(path: Path, claims: Mapping[str, TensorHeader], name: str) -> int:
    """The size that a vector claims."""
    if name not in claims or len(claims[name].shape) != 1 or claims[name].shape[0] < 1:
        raise DamagedError(f"{path} has no vector {name}. It holds {short_repr(sorted(claims))}.")
    return claims[name].shape[0]


def matrix_shape(path: Path, claims: Mapping[str, TensorHeader], name: str) -> tuple[int, int]:
    """The two sizes that a matrix claims."""
    if name not in claims or len(claims[name].shape) != 2 or min(claims[name].shape) < 1:
        raise DamagedError(f"{path} has no matrix {name}. It holds {short_repr(sorted(claims))}.")
    return claims[name].shape[0], claims[name].shape[1]


def read_weights(
    path: Path, claims: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of a format, each of the shape that it demands and finite. Every mistake is named, before any is read."""
    wrong = [f"{name} is missing" for name in expected if name not in claims]
    wrong += [f"{short_repr(name)} does not belong there" for name in claims if name not in expected]
    for name, shape in expected.items():
        if name in claims and claims[name].shape != shape:
            turned = len(shape) == 2 and claims[name].shape == shape[::-1]
            wrong.append(
                f"{name} is {claims[name].shape}, not {shape}{', so transposed; nothing is guessed' if turned else ''}"
            )
    if wrong:
        raise DamagedError(f"{path}: {'; '.join(wrong[:6])}. Get it again, or ask the author.")
    tensors = {name: claims[name].read() for name in expected}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise DamagedError(f"{path}: {', '.join(broken)} holds NaN or infinity; nothing can be encoded with it.")
    return tensors
