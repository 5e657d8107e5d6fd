"""Paper 002: the penalty and its gradients agree with a dense (5), and the monitor counts penalized pairs."""

import itertools

import pytest
import torch
from torch import Tensor

from sae.train.sae import SAE
from sae.train.variants.competition.pairs import DensePairs
from sae.train.variants.competition.penalty import (
    CompetitionLoss,
    CompetitionMonitor,
    competition_strength,
)

from .latents import codes, step_of, stores, three_latents


@pytest.mark.parametrize("kind", [0, 1])
def test_penalty_of_three_latents_by_hand(kind: int) -> None:
    """With k/n = 1/3, c is 3, 1.5 and 0, and the squared cosines 0.36, 0 and 0.64."""
    step, _ = three_latents()
    store = stores(3)[kind]
    store.after_step(step)

    def penalty(**reading: object) -> float:
        return CompetitionLoss(store, 1 / 3, **reading)(step).item()  # type: ignore[arg-type]

    assert penalty() == pytest.approx(3 * 0.36)  # one pair passes 0.6
    assert penalty(weight="conditional") == pytest.approx(0.36)
    assert penalty(reduction="sum") == pytest.approx(2 * 3 * 0.36)
    assert penalty(reduction="n") == pytest.approx(2 * 3 * 0.36 / 3)
    assert penalty(tau=0.4) == pytest.approx((3 * 0.36 + 1.5 * 0) / 2)
    assert penalty(tau_on="lift", tau=1.6) == pytest.approx(3 * 0.36)
    assert penalty(tau_on="lift", tau=1.4) == pytest.approx(3 * 0.36 / 2)
    # <f_0, f_1> = (1*2 + 1*2) / 4 over the batch
    assert penalty(pair_vec="activation", weight="conditional") == pytest.approx(1.0)
    # rows 0-1 and 1-2 are similar, but latents 1 and 2 never fire together: the weight of 1-2 is tau - 0 = 0.6
    assert penalty(target="absorption", weight="conditional") == pytest.approx(0.6 * 0.64)
    assert step.metrics["pairs_above"] == 1
    assert step.metrics["mean_coefficient"] == pytest.approx(0.6)


@pytest.mark.parametrize("kind", [0, 1])
def test_diagonal_of_three_latents_by_hand(kind: int) -> None:
    """Rows of length 2, 1 and 1/2, so that |f_i|^4 is 16, 1 and 1/16, and <f_0, f_1> is 1.2. c_ii = n/k = 3."""
    step, sae = three_latents()
    sae.W_dec.data = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 0.5]])
    store = stores(3)[kind]
    store.after_step(step)

    def penalty(**reading: object) -> float:
        return CompetitionLoss(store, 1 / 3, diagonal=True, **reading)(step).item()  # type: ignore[arg-type]

    pairs, diagonal = 2 * 3 * 1.44, 3 * (16 + 1 + 1 / 16)
    assert penalty(reduction="sum") == pytest.approx(pairs + diagonal)
    assert penalty(reduction="n") == pytest.approx((pairs + diagonal) / 3)
    assert penalty() == pytest.approx((pairs + diagonal) / 5)  # of nine ordered pairs five pass: 01, 10, 00, 11, 22
    assert penalty(weight="conditional") == pytest.approx((pairs + diagonal) / 3 / 5)
    assert step.metrics["pairs_above"] == 1  # only i < j counts
    assert penalty(reduction="sum", tau=1.5) == 0  # P(i|i) is 1
    assert penalty(reduction="sum", tau_on="lift", tau=2.9) == pytest.approx(pairs + diagonal)
    assert penalty(reduction="sum", tau_on="lift", tau=3.1) == 0  # c_ii and c_01 are 3
    # the sums of f_i^2 over the four tokens are 3, 8 and 18
    of_codes = 3 * ((3 / 4) ** 2 + (8 / 4) ** 2 + (18 / 4) ** 2)
    assert penalty(reduction="sum", pair_vec="activation") == pytest.approx(2 * 3 * 1.0 + of_codes)


def test_a_silent_latent_has_no_diagonal() -> None:
    """P(f_i | f_i) of a latent that never fires is 0/0; its weight is 0."""
    f_BF = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    store = DensePairs(2)
    loss = CompetitionLoss(store, 0.5, reduction="sum", diagonal=True)
    assert loss(step_of(f_BF)) == 0  # nothing is known before the first step
    store.after_step(step_of(f_BF))
    torch.testing.assert_close(loss.diagonal_weights(), torch.tensor([2.0, 0.0]))


def pearson(one: Tensor, two: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.double(), two.double()]))[0, 1])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("target", ["cofire", "absorption"])
def test_correlation_is_pearson_s_over_the_pairs_that_pass(kind: int, target: str) -> None:
    """Rows do not have norm 1, and the expected value is from a loop over the pairs."""
    torch.manual_seed(0)
    sae = SAE(6, 24)
    sae.W_dec.data *= torch.linspace(0.5, 3.0, 24)[:, None]
    store = stores()[kind]
    for seed in range(5):
        store.after_step(step_of(codes(seed), sae))
    loss = CompetitionLoss(store, 4 / 24, tau=0.3, target=target)
    weight_S, count = loss.weights(sae)
    pairs = [(i, j) for i in range(24) for j in range(i + 1, 24)]
    weight = [weight_S[i, j] if kind == 0 else weight_S[n] for n, (i, j) in enumerate(pairs)]
    cosine = [torch.nn.functional.cosine_similarity(sae.W_dec[i], sae.W_dec[j], dim=0) for i, j in pairs]
    passing = [(float(w), float(c)) for w, c in zip(weight, torch.stack(cosine).detach(), strict=True) if w > 0]
    assert 3 < len(passing) < len(pairs) and len(passing) == count
    found, over = loss.correlation(sae)
    assert over == len(passing)
    assert float(found) == pytest.approx(pearson(*torch.tensor(passing).T), abs=1e-5)
    assert abs(float(found)) > 0.01


@pytest.mark.parametrize("kind", [0, 1])
def test_correlation_of_many_pairs_is_over_an_evenly_spread_part(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is every third row of the dense store, or every seventh pair of the table."""
    torch.manual_seed(0)
    sae = SAE(6, 24)
    store = stores()[kind]
    for seed in range(5):
        store.after_step(step_of(codes(seed), sae))
    loss = CompetitionLoss(store, 4 / 24, tau=0.1)
    whole, count = loss.correlation(sae)
    weight_S, _ = loss.weights(sae)
    unit_FD = torch.nn.functional.normalize(sae.W_dec, dim=1)
    every = 3 if kind == 0 else 7
    monkeypatch.setattr("sae.train.variants.competition.pairs.BLOCK", 24 * 24 // 3 if kind == 0 else 276 * 6 // 7 + 1)
    part, fewer = loss.correlation(sae)
    passes = weight_S[::every] > 0
    cosine = (unit_FD @ unit_FD.T)[::every] if kind == 0 else store.inner(unit_FD, unit_FD)[::every]
    assert fewer == passes.sum() and 3 < fewer < count
    assert float(part) == pytest.approx(pearson(weight_S[::every][passes], cosine[passes].detach()), abs=1e-5)
    assert float(part) != pytest.approx(float(whole), abs=1e-3)


def test_a_correlation_of_nothing_is_zero() -> None:
    """The correlation is 0 if no pair passes, if only two pairs pass, and if all pairs have the same weight."""
    torch.manual_seed(0)
    sae, store = SAE(4, 24), DensePairs(24)
    assert [float(v) for v in CompetitionLoss(store, 1 / 6).correlation(sae)] == [0.0, 0.0]
    store.after_step(step_of(codes(0), sae))
    store.joint_FF.zero_()
    store.joint_FF[0, 1], store.joint_FF[2, 3] = store.rate_F[:2].min(), 0.9 * store.rate_F[2:4].min()
    r, count = CompetitionLoss(store, 1 / 6).correlation(sae)
    assert count == 2 and r == 0
    store.after_step(step_of(torch.ones(8, 24), sae))
    store.joint_FF.copy_(torch.minimum(store.rate_F[:, None], store.rate_F[None]))
    r, count = CompetitionLoss(store, 1 / 6).correlation(sae)
    assert count == 24 * 23 // 2 and r == 0


def test_monitor_counts_the_pairs_that_the_penalty_moved() -> None:
    """5 and 7 pairs pass while the strength is zero and do not count. Then 2 and 3 pass at a positive strength."""
    monitor = CompetitionMonitor(
        lambda step: torch.where(step.i < 2, 0.0, 0.03), lambda: (torch.tensor(0.5), torch.tensor(4))
    )
    for i, count in enumerate((5, 7, 2, 3)):
        step = step_of(torch.ones(1, 2), i=i)
        step.metrics["pairs_above"] = torch.tensor(count)
        monitor.after_step(step)
    assert monitor.acted_penalized.dtype == torch.int64 and monitor.acted_penalized.dim() == 0
    scalars = {name: float(value) for name, value in monitor.scalars().items()}
    assert scalars == {"penalized": 5, "correlation_cosine": 0.5, "correlation_pairs": 4}


def test_absorption_looks_at_rows_of_a_cosine_over_a_fifth() -> None:
    """Row 0 has the cosines 0.3 and 0.1 with rows 1 and 2, so only the pair 0-1 counts. It never fires together."""
    sae = SAE(3, 3)
    sae.W_dec.data = torch.tensor([[2.0, 0.0, 0.0], [0.3, 0.91**0.5, 0.0], [0.1, 0.0, 0.99**0.5]])
    step = step_of(torch.eye(3), sae)
    store = DensePairs(3)
    store.after_step(step)
    loss = CompetitionLoss(store, 1 / 3, target="absorption", weight="conditional")
    assert loss(step).item() == pytest.approx(0.6 * (2 * 0.3) ** 2)
    assert step.metrics["pairs_above"] == 1


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("direction", ["symmetric", "child_only", "parent_only"])
@pytest.mark.parametrize("pair_vec", ["decoder", "activation"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradient_is_that_of_the_dense_formula(kind: int, direction: str, pair_vec: str, diagonal: bool) -> None:
    """The reference is (5) as a double loop over all i and j, or over i != j, in float64, with autograd's gradient."""
    sae = SAE(5, 12).double()
    sae.W_dec.data *= torch.linspace(0.5, 2.0, 12, dtype=torch.float64)[:, None]
    f_BF = codes(1, 64, 12).double().requires_grad_()
    store = stores(12)[kind].double()
    store.after_step(step_of(f_BF.detach(), sae))
    step = step_of(f_BF, sae)
    term = CompetitionLoss(
        store, 4 / 12, 0.5, direction=direction, pair_vec=pair_vec, reduction="sum", diagonal=diagonal
    )
    of = sae.W_dec if pair_vec == "decoder" else f_BF
    (found,) = torch.autograd.grad(term(step), of)

    on_BF = (f_BF.detach() > 0).double()
    rate_F = on_BF.mean(0)
    vector_FX = sae.W_dec if pair_vec == "decoder" else f_BF.T.float().double() / 8
    total = torch.zeros((), dtype=torch.float64)
    passed = 0
    for i, j in itertools.product(range(12), repeat=2):
        if i == j and not diagonal:
            continue
        conditional = (on_BF[:, i] * on_BF[:, j]).mean() / torch.minimum(rate_F[i], rate_F[j])
        if conditional >= 0.5:
            passed += 1
            child, parent = (i, j) if (rate_F[i], i) <= (rate_F[j], j) else (j, i)
            left, right = vector_FX[child], vector_FX[parent]
            left = left.detach() if direction == "parent_only" else left
            right = right.detach() if direction == "child_only" else right
            total = total + conditional / (4 / 12) * (left @ right) ** 2
    assert 12 * diagonal < passed < 12 * 11
    (expected,) = torch.autograd.grad(total, of)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5 if pair_vec == "activation" else 1e-10, atol=1e-7)


def test_strength_rises_over_the_warm_up() -> None:
    coefficient = competition_strength(0.03, 2000)
    assert [round(float(coefficient(step_of(torch.ones(1, 2), i=i))), 6) for i in (0, 999, 1999, 3000)] == [
        0.000015, 0.015, 0.03, 0.03,
    ]  # fmt: skip
    assert float(competition_strength(0.03, 0)(step_of(torch.ones(1, 2)))) == pytest.approx(0.03)
