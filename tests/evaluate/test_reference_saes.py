"""Reference SAEs: PCA is the best linear map of its rank, and the random dictionary has the best gain."""

import pytest
import torch

from sae.evaluate.reference_saes import PCA, random_dictionary


@pytest.fixture
def x_RD() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(400, 12) @ torch.randn(12, 12) + 3


def error(sae, x_RD: torch.Tensor) -> float:
    return float((x_RD - sae.decode(sae.encode(x_RD))).square().sum())


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_pca_leaves_the_smallest_singular_values(x_RD, rank):
    sae = PCA(x_RD, rank)
    left = torch.linalg.svdvals(x_RD - x_RD.mean(0))[rank:]
    assert error(sae, x_RD) == pytest.approx(float(left.square().sum()), rel=1e-4)
    torch.testing.assert_close(sae.W_dec @ sae.W_dec.T, torch.eye(rank))


def test_a_random_dictionary_has_k_latents_and_no_better_gain(x_RD):
    before = torch.get_rng_state()
    sae = random_dictionary(x_RD, 40, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert ((sae.encode(x_RD) != 0).sum(1) <= 5).all()
    least = error(sae, x_RD)
    assert least < float((x_RD - x_RD.mean(0)).square().sum())
    for gain in (0.9, 1.1):
        sae.W_enc.mul_(gain)
        assert error(sae, x_RD) > least
        sae.W_enc.div_(gain)
