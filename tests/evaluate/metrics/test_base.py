"""The latents that probes read are in float32 and finite."""

from types import SimpleNamespace

import pytest
import torch

from sae.common.errors import SaeError
from sae.evaluate.metrics.base import encode_finite


def test_an_sae_reads_and_gives_float32() -> None:
    seen = []
    sae = SimpleNamespace(encode=lambda x: seen.append(x.dtype) or x.bfloat16())
    assert encode_finite(sae, torch.ones(2, 3).half()).dtype == torch.float32 and seen == [torch.float32]


def test_latents_that_are_not_finite_are_refused_and_large_ones_are_not() -> None:
    """Large latents are accepted even if their sum is infinite."""
    sae = SimpleNamespace(encode=lambda x: x)
    large = torch.full((3, 2), 3e38)
    assert torch.equal(encode_finite(sae, large), large)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = large.clone()
        bad[1, 0] = bad[2] = value
        with pytest.raises(SaeError, match="NaN or infinite at 2 of 3 rows"):
            encode_finite(sae, bad)
