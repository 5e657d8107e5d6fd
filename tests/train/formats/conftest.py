"""Small SAEs with every activation, and rows on which some of their latents are active."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae.train.formats.canonical import CanonicalSAE, from_canonical
from sae.train.sae import SAE

FIXTURES = Path(__file__).parent / "fixtures"
D, F = 8, 16
ORIGIN = {"model": {"name": "google/gemma-2-2b", "revision": None}, "layer": 12, "site": "resid_post", "context": 128}


@pytest.fixture(scope="session")
def x_RD() -> Tensor:
    return load_file(FIXTURES / "rows.safetensors")["x"]


@pytest.fixture
def make_sae() -> Callable[..., SAE]:
    """A factory of random SAEs; decoder rows have norms from 0.5 to 2, or 1 with `unit`."""

    def make(activation: str, *, pre_bias: bool = True, unit: bool = False) -> SAE:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        W_dec = draw(F, D)
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        if not unit:
            W_dec = W_dec * (0.5 + 1.5 * torch.rand(F, 1, generator=generator, dtype=torch.float64))
        matrices = (draw(D, F), 0.3 * draw(F), W_dec, draw(D))
        options = {
            "topk": {"k": 4},
            "jumprelu": {"threshold": draw(F).abs()},
            "gated": {"r_mag": 0.5 * draw(F), "b_mag": draw(F)},
        }
        canonical = CanonicalSAE(*matrices, activation, **options.get(activation, {}))
        sae = from_canonical(canonical, pre_bias=pre_bias)
        sae.origin = dict(ORIGIN)
        return sae

    return make
