"""Norms and moments of rows are correct, and their bits do not depend on how the rows are divided among calls."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sae.cache.loader import as_uint16
from sae.cache.measure import RowStatistics, measure, measure_rows


@pytest.mark.parametrize("rows, d_in", [(1, 1), (5, 3), (300, 65), (1000, 257)])
def test_sums_are_those_of_exact_arithmetic(rows: int, d_in: int) -> None:
    """The rows are fractions of small integers, whose sums are exact in any order."""
    x = torch.randint(-64, 65, (rows, d_in), generator=torch.Generator().manual_seed(0)).double() / 8
    found = measure_rows(as_uint16(x.bfloat16()), 256)
    assert (found.moments == torch.stack([x.sum(0), x.square().sum(0)]).numpy()).all()
    assert (found.norms == x.square().sum(1).sqrt().float().numpy()).all() and found.norms.dtype == np.float32


def test_the_bits_do_not_depend_on_threads_or_on_how_many_chunks_are_measured_at_once() -> None:
    """This holds as long as each chunk has the same rows.

    The rows have different scales, so that summing them in another order changes the bits.
    """
    generator = torch.Generator().manual_seed(0)
    values, exponents = torch.randn(2, 1024, 96, generator=generator)
    x = (values * exponents.mul(6).exp()).bfloat16()
    one = measure_rows(as_uint16(x), 256)
    with ThreadPoolExecutor(3) as pool:
        threads = measure_rows(as_uint16(x), 256, pool.map)
    squares, sums = measure(x.view(4, 256, 96))
    at_once = RowStatistics.of_chunks([squares], [sums])
    for other in (threads, at_once):
        assert one.norms.tobytes() == other.norms.tobytes() and one.moments.tobytes() == other.moments.tobytes()
    shuffled = measure_rows(as_uint16(x[torch.randperm(1024, generator=generator)]), 256)
    assert one.moments.tobytes() != shuffled.moments.tobytes()
