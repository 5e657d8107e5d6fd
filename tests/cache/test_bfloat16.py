"""The bfloat16 type: rounding, JSON and metadata."""

import json

import numpy as np
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from sae.cache.bfloat16 import BFloat16, from_bits, to_bits


@given(st.integers(0, 0xFFFF))
def test_scalars_round_trip_through_json(bits: int) -> None:
    dtype = BFloat16()
    text = json.dumps(dtype.to_json_scalar(np.uint16(bits), zarr_format=3), allow_nan=False)
    assert dtype.from_json_scalar(json.loads(text), zarr_format=3) == bits


@given(st.floats(width=32, allow_nan=False))
def test_rounding_equals_torch(value: float) -> None:
    expected = torch.tensor(value, dtype=torch.float32).to(torch.bfloat16)
    assert to_bits(value) == int(expected.view(torch.int16)) & 0xFFFF
    assert from_bits(to_bits(value)) == float(expected)


def test_metadata_follows_the_specification() -> None:
    assert BFloat16().to_json(zarr_format=3) == "bfloat16"
    assert BFloat16.from_json("bfloat16", zarr_format=3) == BFloat16()
    assert zarr.dtype.parse_dtype(np.dtype("uint16"), zarr_format=3) != BFloat16()  # plain uint16 stays zarr's own
