"""OrtSAE: the nearest row of each row, by hand and by the formula, and chunks that depend only on the step."""

import pytest
import torch
from torch import Tensor

from sae.common.errors import UsageError
from sae.train.recipe import find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig
from sae.train.variants.ortsae import OrtSAELoss, permutation_of_step


def step_of(sae: SAE, i: int = 0) -> Step:
    """A step whose pre-activations and latents are NaN, because the loss reads only the decoder."""
    x_BD, pre_BF, f_BF = torch.zeros(1, sae.d_in), *torch.full((2, 1, sae.d_sae), torch.nan)
    return Step(torch.tensor(i), sae, torch.optim.SGD(sae.parameters()), x_BD, pre_BF, f_BF, x_BD)


def test_three_rows_by_hand() -> None:
    """The cosines 0-1, 1-2 and 0-2 are 0.6, -0.8 and 0. Row 1 is nearest to rows 0 and 2, and row 2 to row 1."""
    sae = SAE(2, 3)
    sae.W_dec.data = torch.tensor([[2.0, 0.0], [0.6, -0.8], [0.0, 1.0]])  # the length of a row does not matter
    step = step_of(sae)
    assert OrtSAELoss()(step).item() == pytest.approx((0.36 + 0.64 + 0.64) / 3)
    assert float(step.metrics["nearest_cosine"]) == pytest.approx((0.6 + 0.8 + 0.8) / 3)


def dense(weight_FD: Tensor, chunks: list[Tensor]) -> Tensor:
    """The formula, computed from the whole matrix of cosines."""
    unit_FD = weight_FD / weight_FD.norm(dim=1, keepdim=True)
    square_FF = (unit_FD @ unit_FD.T).square()
    worst = []
    for chunk in chunks:
        for i in chunk.tolist():
            worst.append(torch.stack([square_FF[i, j] for j in chunk.tolist() if j != i]).max())
    return torch.stack(worst).mean()


@pytest.mark.parametrize("chunk", [64, 7])
def test_value_and_gradient_are_those_of_the_formula(chunk: int) -> None:
    """Twenty rows are in one chunk, or in three chunks of 7, 7 and 6."""
    sae = SAE(6, 20).double()
    step = step_of(sae, i=5)
    found = OrtSAELoss(chunk)(step)
    expected = dense(sae.W_dec, list(permutation_of_step(step, 20).tensor_split(-(-20 // chunk))))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, sae.W_dec)[0] for value in (found, expected)]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)


def test_chunks_depend_on_the_step_alone_and_every_pair_meets() -> None:
    sae, n = SAE(2, 40), 40
    together_FF = torch.zeros(n, n)
    steps = 400
    for i in range(steps):
        torch.rand(3)  # other random numbers have no effect
        order_F = permutation_of_step(step_of(sae, i), n)
        assert order_F.sort().values.tolist() == list(range(n))
        for chunk_C in order_F.tensor_split(4):
            together_FF[chunk_C[:, None], chunk_C] += 1
    assert torch.equal(permutation_of_step(step_of(sae, 7), n), permutation_of_step(step_of(sae, 7), n))
    assert not torch.equal(permutation_of_step(step_of(sae, 7), n), permutation_of_step(step_of(sae, 8), n))
    pairs = together_FF[torch.ones(n, n).triu(1) > 0] / steps
    chance = 9 / 39  # a chunk of ten contains nine of the other 39 rows
    assert pairs.mean().item() == pytest.approx(chance)
    assert pairs.min() > chance - 0.1 and pairs.max() < chance + 0.1  # five standard deviations


def test_rows_end_less_alike_than_without_it(make_trainer, take) -> None:
    nearest = []
    for strength in (0.0, 1.0):
        trainer = make_trainer("ortsae", k=4, strength=strength, lr=1e-2, warmup=0)
        list(take(trainer, range(30)))
        rows_FD = trainer.variant.sae.W_dec.detach()
        nearest.append((rows_FD @ rows_FD.T).fill_diagonal_(0).abs().max(1).values.mean().item())
    assert nearest[1] < 0.8 * nearest[0]


def test_a_chunk_without_pairs_is_refused() -> None:
    """A row that is alone in its chunk would be compared with itself, so the loss of orthogonal rows would not be 0."""
    with pytest.raises(UsageError, match="chunk=2 with 65 latents can leave a row alone in its chunk"):
        find_recipe("ortsae").make(RunConfig(32, 65, 10, 64), {"chunk": 2})
    for count in range(2, 60):
        sae = SAE(64, count)
        sae.W_dec.data = torch.eye(count, 64)
        for chunk in (3, 4, 5, 17):
            assert OrtSAELoss(chunk)(step_of(sae)).item() == 0  # a row compared with itself would add 1
