"""The bfloat16 data type for zarr-python: the registered Zarr extension on disk, uint16 bits in NumPy.

zarr-python has no bfloat16 yet. Importing this module registers the bfloat16 data type, so that `zarr.open_array` opens
the arrays of a cache; `torch.from_numpy(array).view(torch.bfloat16)` then makes no copy. The metadata follows the
zarr-extensions specification, so tensorstore and zarrs read the same files as native bfloat16.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

from .layout import NAN_BITS

INFINITY_BITS, MINUS_INFINITY_BITS = 0x7F80, 0xFF80


def to_bits(value: float) -> int:
    """The bits of the nearest bfloat16; ties round to even."""
    if math.isnan(value):
        return NAN_BITS
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def from_bits(bits: int) -> float:
    """The value of the bfloat16 with these bits."""
    (value,) = struct.unpack("<f", struct.pack("<I", (int(bits) & 0xFFFF) << 16))
    return value


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[np.dtypes.UInt16DType, np.uint16], HasEndianness, HasItemSize):
    """The type of `"data_type": "bfloat16"`. Never inferred from a NumPy dtype: uint16 arrays keep zarr's own type."""

    dtype_cls: ClassVar[Any] = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[Any] = "bfloat16"

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        raise DataTypeValidationError("bfloat16 must be requested by name")

    def to_native_dtype(self) -> Any:
        return np.dtype(np.uint16).newbyteorder("<" if self.endianness == "little" else ">")

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 exists in Zarr v3 only")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == "bfloat16" or (isinstance(data, dict) and data.get("name") == "bfloat16"):
            return cls()
        raise DataTypeValidationError(f"{data!r} is not bfloat16")

    def to_json(self, zarr_format: int) -> Any:
        if zarr_format != 3:
            raise ValueError("bfloat16 exists in Zarr v3 only")
        return "bfloat16"

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.integer | np.floating)

    def cast_scalar(self, data: object) -> np.uint16:
        return data if isinstance(data, np.uint16) else np.uint16(to_bits(float(data)))  # type: ignore[arg-type]

    def default_scalar(self) -> np.uint16:
        return np.uint16(0)

    def to_json_scalar(self, data: object, *, zarr_format: int) -> Any:
        """A number, or a string: "NaN", "Infinity", "-Infinity", or the bits of any other NaN in hexadecimal."""
        bits = int(data)  # type: ignore[call-overload]
        names = {NAN_BITS: "NaN", INFINITY_BITS: "Infinity", MINUS_INFINITY_BITS: "-Infinity"}
        if bits in names:
            return names[bits]
        value = from_bits(bits)
        return f"0x{bits:04x}" if math.isnan(value) else value

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> np.uint16:
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16))
        return np.uint16(to_bits(float(data)))  # float() reads "NaN" and "Infinity"

    @property
    def item_size(self) -> int:
        return 2


data_type_registry.register("bfloat16", BFloat16)
