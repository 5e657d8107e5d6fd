"""Paper 004: restarts of dead latents, and the window (4) that decides which latents are dead."""

import math

import pytest
import torch

from sae.train.mechanisms import DeadLatents, ResampleDead
from sae.train.sae import SAE
from sae.train.variants.hierarchical.window import ResampleByWindow

from .steps import firing, reconstructing, step_on


def test_a_dead_latent_restarts_on_the_worst_token() -> None:
    """The token (0, 0, 3, 4) has norm 5. The other encoder columns have norms 1 and 3; 0.2 of their mean is 0.4."""
    sae, x_BD = reconstructing()
    dead = DeadLatents(3, after_tokens=10)
    dead.since_F.copy_(torch.tensor([0, 3, 10]))
    resample = ResampleDead(dead, every=1, until=100)
    step = step_on(sae, x_BD)
    sae.W_enc.data[1, 1] = 3.0
    resample.every_n_steps(step)
    torch.testing.assert_close(sae.W_dec[2], torch.tensor([0, 0, 0.6, 0.8]))
    torch.testing.assert_close(sae.W_enc[:, 2], 0.4 * torch.tensor([0, 0, 0.6, 0.8]))
    assert sae.b_enc.tolist() == [0, 0, 0] and dead.since_F.tolist() == [0, 3, 0]
    assert torch.equal(sae.W_dec[:2], torch.eye(3, 4)[:2])
    state = step.optimizer.state
    assert state[sae.W_dec]["exp_avg"].sum(1).tolist() == [4, 4, 0]
    assert state[sae.W_enc]["exp_avg_sq"].sum(0).tolist() == [4, 4, 0]
    assert state[sae.b_enc]["exp_avg"].tolist() == [1, 1, 0] and state[sae.b_dec]["exp_avg"].tolist() == [1] * 4
    assert resample.scalars()["resampled"] == 1


def test_tokens_are_drawn_by_squared_loss() -> None:
    """Losses 1 and 2 give probabilities 1/5 and 4/5. The standard deviation of 500 draws is 9."""
    sae = SAE(2, 1)
    with torch.no_grad():
        sae.W_enc.zero_()
    step = step_on(sae, torch.tensor([[1.0, 0.0], [0.0, math.sqrt(2.0)]]))
    resample = ResampleDead(DeadLatents(1, after_tokens=0), every=1, until=10)
    second = 0
    for _ in range(500):
        resample.restart(step, torch.tensor([0]))
        second += int(sae.W_dec[0, 1] == 1)
    assert abs(second - 400) < 45


def test_no_token_is_drawn_twice_at_once_and_the_rest_waits() -> None:
    sae = SAE(4, 6)
    step = step_on(sae, torch.eye(4))
    resample = ResampleDead(DeadLatents(6, after_tokens=0), every=1, until=10)
    restarted_N = resample.restart(step, torch.arange(6))
    assert restarted_N.tolist() == [0, 1, 2, 3]
    assert (sae.W_dec[:4] @ sae.W_dec[:4].T - torch.eye(4)).abs().max() < 1e-6


def test_resampling_resumes_its_random_stream() -> None:
    def restarted(resample: ResampleDead) -> torch.Tensor:
        torch.manual_seed(3)
        sae = SAE(8, 4)
        resample.restart(step_on(sae, torch.eye(8)), torch.arange(4))
        return sae.W_dec.detach()

    torch.manual_seed(0)
    first = ResampleDead(DeadLatents(4, 1), 1, 10)
    restarted(first)
    second = ResampleDead(DeadLatents(4, 1), 1, 10)
    assert not torch.equal(first.generator_state, second.generator_state)
    second.load_state_dict(first.state_dict())
    assert torch.equal(restarted(first), restarted(second))
    assert not torch.equal(restarted(first), restarted(first))


def test_nothing_restarts_after_its_last_step_or_on_a_broken_loss() -> None:
    sae, x_BD = reconstructing()
    dead = DeadLatents(3, after_tokens=0)
    before = sae.W_dec.detach().clone()
    ResampleDead(dead, every=1, until=99).every_n_steps(step_on(sae, x_BD, i=100))
    ResampleDead(dead, every=1, until=99).every_n_steps(step_on(sae, x_BD * math.nan, i=50))
    assert torch.equal(sae.W_dec, before)
    ResampleDead(dead, every=1, until=99).every_n_steps(step_on(sae, x_BD, i=99))
    assert not torch.equal(sae.W_dec, before)


# (4)


def test_the_window_by_any_is_the_rule_of_the_last_firing() -> None:
    """With 100 steps, p < 0.01 means no firing for 100 steps. At first, every step of the window counts as firing."""
    generator = torch.Generator().manual_seed(0)
    chance_F = torch.tensor([0.0, 0.002, 0.01, 0.03, 0.2])
    resample = ResampleByWindow(DeadLatents(5, 1), window=100, until=1000, below=0.01, stability="any")
    last_F, seen = torch.full((5,), -1), set()
    for i in range(400):
        f_BF = (torch.rand(3, 5, generator=generator) < chance_F).float()
        resample.after_step(firing(f_BF, i))
        last_F[f_BF.any(0)] = i
        assert torch.equal(resample.silent(), i - last_F >= 100), i
        seen.add(int(resample.silent().sum()))
    assert len(seen) > 2


def test_the_window_by_mean_counts_tokens() -> None:
    """In two steps of four tokens, latent 0 fires on 1 and 2 tokens (p = 3/8), latent 1 on 0 and 1 (p = 1/8)."""
    resample = ResampleByWindow(DeadLatents(2, 1), window=2, until=9, below=0.2, stability="mean")
    resample.after_step(firing(torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 0]]), 0))
    resample.after_step(firing(torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 0]]), 1))
    assert resample.silent().tolist() == [False, True]
    assert resample.scalars()["stability"].item() == pytest.approx((3 / 8 + 1 / 8) / 2)


def test_a_restarted_latent_gets_a_full_window() -> None:
    sae, x_BD = reconstructing()
    resample = ResampleByWindow(DeadLatents(3, 1), window=4, until=1000, below=0.01, stability="any")
    f_BF = torch.tensor([[1.0, 1, 0]])
    for i in range(4):
        resample.after_step(firing(f_BF, i))
    assert resample.silent().tolist() == [False, False, True]
    resample.every_n_steps(step_on(sae, x_BD))
    for i in range(4, 8):
        assert not resample.silent().any()
        resample.after_step(firing(f_BF, i))
    assert resample.silent().tolist() == [False, False, True]


def fired(shares: list[float], tokens: int = 4) -> torch.Tensor:
    """(tokens, F): latent i fires on `shares[i]` of the tokens."""
    return torch.tensor([[float(token < share * tokens) for share in shares] for token in range(tokens)])


def test_the_printed_sum_has_one_term_more_than_its_divisor() -> None:
    """w = 2 and p = sum / 2 < 0.5. For the shares 1/4, 1/2, 1/4, two terms give p = 3/8 twice, and three give 1/2."""
    make = {
        terms: ResampleByWindow(DeadLatents(1, 1), 2, until=9, below=0.5, stability="mean", terms=terms)
        for terms in (2, 3)
    }
    silent: dict[int, list[bool]] = {2: [], 3: []}
    for terms, resample in make.items():
        for i, share in enumerate((0.25, 0.5, 0.25)):
            resample.after_step(firing(fired([share]), i))
            silent[terms].append(bool(resample.silent()))
    assert silent == {2: [False, True, True], 3: [False, True, False]}  # missing terms count as firing


@pytest.mark.parametrize("terms", [4, 5])
def test_a_restarted_latent_waits_for_w_steps_whatever_the_number_of_terms(terms: int) -> None:
    sae, x_BD = reconstructing()
    resample = ResampleByWindow(DeadLatents(3, 1), 4, until=1000, below=0.01, stability="any", terms=terms)
    f_BF = torch.tensor([[1.0, 1, 0]])
    for i in range(18):
        assert bool(resample.silent()[2]) == (i > 0 and i % 4 == 0), i
        if i and i % 4 == 0:
            resample.every_n_steps(step_on(sae, x_BD, i - 1))
        resample.after_step(firing(f_BF, i))
    assert resample.restarts == 4


def test_silent_latents_are_counted_whether_or_not_a_token_is_left_for_them() -> None:
    """With two tokens, two of five silent latents restart, then two of the other three. After `until`, none does."""
    sae = SAE(4, 6)
    resample = ResampleByWindow(DeadLatents(6, 1), 1, until=5, below=0.5, stability="mean", every=3)
    assert resample.every == 3
    step = step_on(sae, torch.eye(4)[:2])
    resample.after_step(firing(torch.tensor([[0.0, 0, 0, 1, 0, 0]]), 0))
    for i, silent, restarted in ((4, 5, 2), (5, 8, 4), (6, 8, 4)):
        step.i = torch.tensor(i)
        resample.every_n_steps(step)
        scalars = resample.scalars()
        assert (scalars["silent"], scalars["resampled"]) == (silent, restarted)
