"""Paper 002: pair statistics against counting, the penalty against a dense (5), the table against all pairs."""

import itertools

import pytest
import torch
from torch import Tensor

from sae.common.errors import UsageError
from sae.evaluate.papers.parse import load_paper
from sae.train.activation_functions import TopK
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig
from sae.train.variants.competition import (
    MIN_RATE,
    CompetitionLoss,
    CompetitionMonitor,
    CompetitionOptions,
    DensePairs,
    PairTable,
    add_competition,
    competition_strength,
    count_cofiring,
)

NAMES = ["competition", *(f"competition-{n}" for n in ("no-warmup", "off", "small", "k320", "baseline"))]


def step_of(f_BF: Tensor, sae: SAE | None = None, i: int = 0) -> Step:
    """A step with these latents. Its pre-activations are NaN, so that nothing can read them instead."""
    sae = sae or SAE(4, f_BF.shape[1])
    x_BD, pre_BF = torch.zeros(len(f_BF), sae.d_in), torch.full_like(f_BF, torch.nan)
    return Step(torch.tensor(i), sae, torch.optim.SGD(sae.parameters()), x_BD, pre_BF, f_BF, x_BD)


def codes(seed: int, tokens: int = 256, latents: int = 24, k: int = 4) -> Tensor:
    """k positive latents a token, the first of them far more often than the last."""
    generator = torch.Generator().manual_seed(seed)
    noise_BF = torch.rand(tokens, latents, generator=generator) + torch.linspace(0.5, 0, latents)
    return TopK(k)(noise_BF)


def stores(latents: int = 24) -> tuple[DensePairs, PairTable]:
    return DensePairs(latents), PairTable(latents, latents * (latents - 1) // 2)


def three_latents() -> tuple[Step, SAE]:
    """Four tokens: latent 0 fires in all but the last, 1 in the first two, 2 in the last two."""
    f_BF = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 3.0]])
    sae = SAE(2, 3)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    return step_of(f_BF, sae), sae


def test_statistics_of_three_latents_by_hand() -> None:
    """p = 3/4, 2/4, 2/4 and J_01 = 2/4, J_02 = 1/4, J_12 = 0: P of the commoner given the rarer is 1, 1/2, 0."""
    step, _ = three_latents()
    for store in stores(3):
        for _ in range(3):  # the same batch: averages stay
            store.after_step(step)
        known = store.conditional()
        found = known[known >= 0] if known.dim() == 1 else known[[0, 0, 1], [1, 2, 2]]
        torch.testing.assert_close(store.rates(), torch.tensor([0.75, 0.5, 0.5]))
        torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.0]))


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
    # pairs that look alike, 0-1 and 1-2, of which 1-2 never fire together: it lacks 0.6
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
    assert step.metrics["pairs_above"] == 1  # of i < j
    assert penalty(reduction="sum", tau=1.5) == 0  # P(i|i) is 1
    assert penalty(reduction="sum", tau_on="lift", tau=2.9) == pytest.approx(pairs + diagonal)
    assert penalty(reduction="sum", tau_on="lift", tau=3.1) == 0  # c_ii is 3, and so is c_01
    # over the batch |f_i|^2 is 3, 8 and 18 over four tokens
    of_codes = 3 * ((3 / 4) ** 2 + (8 / 4) ** 2 + (18 / 4) ** 2)
    assert penalty(reduction="sum", pair_vec="activation") == pytest.approx(2 * 3 * 1.0 + of_codes)


def test_a_silent_latent_has_no_diagonal() -> None:
    """P(f_i | f_i) of a latent that never fires is 0/0."""
    f_BF = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    store = DensePairs(2)
    loss = CompetitionLoss(store, 0.5, reduction="sum", diagonal=True)
    assert loss(step_of(f_BF)) == 0  # nothing is known before the first step
    store.after_step(step_of(f_BF))
    torch.testing.assert_close(loss.diagonal_weights(), torch.tensor([2.0, 0.0]))


def test_the_printed_diagonal_leaves_a_unit_decoder_alone(make_trainer, take) -> None:
    """It is n/k for each latent that fires, and its gradient is along the row, which the unit norm takes away."""
    settings = {"k": 4, "tau": 0.2, "reduction": "sum", "pair_store": "dense", "strength_warmup": 0, "clip": None}
    ends, values = [], []
    for diagonal in (False, True):
        trainer = make_trainer("competition", steps=5, diagonal=diagonal, **settings)
        list(take(trainer, range(4)))
        trainer.pop_metrics()
        (store,) = [m for m in trainer.variant.mechanisms if isinstance(m, DensePairs)]
        firing = int((store.rates() >= MIN_RATE).sum())
        list(take(trainer, range(4, 5)))
        values.append(trainer.pop_metrics()["competition"])
        ends.append(trainer.variant.sae.W_dec.detach())
    assert values[1] - values[0] == pytest.approx(0.03 * firing * 512 / 4, rel=1e-3)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=2e-3)  # five steps of at most 3e-4; rounding under Adam


@pytest.mark.parametrize("kind", [0, 1])
def test_a_latent_that_hardly_fires_has_no_known_coefficient(kind: int) -> None:
    """Latents of rate 4e-6, 1e-5 and 1/2, each of which fires only with the others."""
    store = stores(3)[kind]
    store.seen.fill_(1.0)
    store.rate_F.copy_(torch.tensor([4e-6, MIN_RATE, 0.5]))
    if isinstance(store, PairTable):
        store.joint_P.copy_(torch.tensor([4e-6, 4e-6, MIN_RATE]))
        store.seen_P.fill_(1.0)
        found = store.conditional()
    else:
        store.joint_FF.copy_(torch.tensor([[4e-6, 4e-6, 4e-6], [0, MIN_RATE, MIN_RATE], [0, 0, 0.5]]))
        found = store.conditional()[[0, 0, 1], [1, 2, 2]]
    torch.testing.assert_close(found, torch.tensor([-1.0, -1.0, 1.0]))
    assert CompetitionLoss(store, 1 / 3, diagonal=True).diagonal_weights().tolist() == [0.0, 3.0, 3.0]


def test_a_probability_is_at_most_one() -> None:
    """A table's J may be of later batches than p, so that J / p exceeds 1."""
    table = PairTable(2, 1)
    table.seen.fill_(1.0)
    table.seen_P.fill_(1.0)
    table.rate_F.copy_(torch.tensor([0.2, 0.5]))
    table.joint_P.fill_(0.3)
    assert table.conditional().tolist() == [1.0]


def test_statistics_are_of_latents_that_fire_after_the_activation() -> None:
    """Latents are counted where f is positive; before the activation all are, with other values in each place."""
    f_BF = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    step = step_of(f_BF)
    step.pre_BF = torch.tensor([[5.0, 4.0], [1.0, 2.0], [0.5, 0.1], [3.0, 2.0]])
    for store in stores(2):
        store.after_step(step)
        torch.testing.assert_close(store.rates(), torch.tensor([0.75, 0.25]))
        torch.testing.assert_close(
            store.conditional().flatten()[-1 if store.conditional().dim() == 1 else 1], torch.tensor(1.0)
        )


def pearson(one: Tensor, two: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.double(), two.double()]))[0, 1])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("target", ["cofire", "absorption"])
def test_correlation_is_pearson_s_over_the_pairs_that_pass(kind: int, target: str) -> None:
    """With rows that are not of unit length, and against a loop over the pairs."""
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
    """Every third row of the dense store, or every seventh pair of the table."""
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
    monkeypatch.setattr("sae.train.variants.competition.BLOCK", 24 * 24 // 3 if kind == 0 else 276 * 6 // 7 + 1)
    part, fewer = loss.correlation(sae)
    passes = weight_S[::every] > 0
    cosine = (unit_FD @ unit_FD.T)[::every] if kind == 0 else store.inner(unit_FD, unit_FD)[::every]
    assert fewer == passes.sum() and 3 < fewer < count
    assert float(part) == pytest.approx(pearson(weight_S[::every][passes], cosine[passes].detach()), abs=1e-5)
    assert float(part) != pytest.approx(float(whole), abs=1e-3)


def test_a_correlation_of_nothing_is_zero() -> None:
    """No pair that passes, two pairs, and pairs of one weight."""
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
    """5 and 7 pairs at a strength of zero, then 2 and 3 at a positive one."""
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


@pytest.mark.parametrize(("name", "moves"), [("competition-off", False), ("competition-no-warmup", True)])
def test_the_built_variant_counts_only_what_has_a_strength(name: str, moves: bool, make_trainer, take) -> None:
    trainer = make_trainer(name, steps=12, k=6, tau=0.15)
    list(take(trainer, range(12)))
    metrics = trainer.pop_metrics()
    assert metrics["pairs_above"] > 0
    assert metrics["penalized"] == pytest.approx(moves * 12 * metrics["pairs_above"])


def test_absorption_looks_at_rows_of_a_cosine_over_a_fifth() -> None:
    """Row 0 has the cosines 0.3 and 0.1 with rows 1 and 2, and no two latents fire together: one pair lacks 0.6."""
    sae = SAE(3, 3)
    sae.W_dec.data = torch.tensor([[2.0, 0.0, 0.0], [0.3, 0.91**0.5, 0.0], [0.1, 0.0, 0.99**0.5]])
    step = step_of(torch.eye(3), sae)
    store = DensePairs(3)
    store.after_step(step)
    loss = CompetitionLoss(store, 1 / 3, target="absorption", weight="conditional")
    assert loss(step).item() == pytest.approx(0.6 * (2 * 0.3) ** 2)
    assert step.metrics["pairs_above"] == 1


def test_coefficient_is_the_larger_direction_and_symmetric() -> None:
    """max(c_ij, c_ji) from the two conditional probabilities, each divided by k/n; the matrix is its own transpose."""
    f_BF = codes(0)
    store = DensePairs(24)
    store.after_step(step_of(f_BF))
    on_BF = (f_BF > 0).double()
    given_FF = on_BF.T @ on_BF / on_BF.sum(0)  # P(f_i | f_j): column j is the condition
    assert not torch.allclose(given_FF, given_FF.T)
    c_FF = torch.maximum(given_FF, given_FF.T) / (4 / 24)
    torch.testing.assert_close(c_FF, c_FF.T)
    found_FF = store.conditional().double() / (4 / 24)
    upper = torch.ones(24, 24).triu(1) > 0
    torch.testing.assert_close(found_FF[upper], c_FF[upper], rtol=1e-5, atol=1e-6)


def test_independent_codes_have_coefficients_about_one() -> None:
    generator = torch.Generator().manual_seed(0)
    store = DensePairs(40)
    for _ in range(20):
        store.after_step(step_of((torch.rand(2048, 40, generator=generator) < 0.1).float()))
    conditional_FF = store.conditional()
    lift = conditional_FF[conditional_FF >= 0] / 0.1
    assert len(lift) == 40 * 39 // 2
    assert lift.mean() == pytest.approx(1.0, abs=0.05)
    step = step_of(torch.ones(8, 40))
    CompetitionLoss(store, 0.1, tau_on="lift")(step)
    assert step.metrics["pairs_above"] > 0.99 * len(lift)  # the threshold to the letter lies below chance
    CompetitionLoss(store, 0.1)(step)
    assert step.metrics["pairs_above"] == 0


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("direction", ["symmetric", "child_only", "parent_only"])
@pytest.mark.parametrize("pair_vec", ["decoder", "activation"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradient_is_that_of_the_dense_formula(kind: int, direction: str, pair_vec: str, diagonal: bool) -> None:
    """Eq. 5 as a double loop over all i and j, or over i != j, in float64, differentiated by autograd."""
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


def test_pairs_are_counted_bit_by_bit_as_a_product_counts_them() -> None:
    """Also where tokens do not fill a word, and where all 64 bits of one are set."""
    for tokens in (1, 63, 64, 130):
        on_BF = torch.rand(tokens, 9, generator=torch.Generator().manual_seed(tokens)) < 0.5
        on_BF[:, 0] = True
        first_P, second_P = torch.triu_indices(9, 9)
        expected_FF = on_BF.float().T @ on_BF.float()
        assert torch.equal(count_cofiring(on_BF, first_P, second_P).float(), expected_FF[first_P, second_P])


def test_table_with_room_for_all_pairs_equals_the_dense_store() -> None:
    dense, table = stores()
    sae = SAE(6, 24)
    for seed in range(5):
        for store in (dense, table):
            store.after_step(step_of(codes(seed), sae))
    first_P, second_P = table.first_P, table.second_P
    torch.testing.assert_close(table.conditional(), dense.conditional()[first_P, second_P])
    for target, tau in (("cofire", 0.3), ("absorption", 0.6)):
        term, other = (CompetitionLoss(s, 4 / 24, tau=tau, target=target) for s in (dense, table))
        step, twin = step_of(codes(9), sae), step_of(codes(9), sae)
        assert term(step) > 0
        torch.testing.assert_close(term(step), other(twin))
        assert step.metrics["pairs_above"] == twin.metrics["pairs_above"]


def test_a_small_table_finds_the_pairs_that_fire_together_and_agrees_about_them() -> None:
    """Six pairs of forty latents always fire together, and the table has room for eight pairs of 780."""
    generator = torch.Generator().manual_seed(0)
    dense, table = DensePairs(40), PairTable(40, 8, every=1)
    bound = {(2 * i, 2 * i + 1) for i in range(6)}
    history = []
    for _ in range(12):
        f_BF = (torch.rand(512, 40, generator=generator) < 0.05).float()
        f_BF[:, 1:12:2] = f_BF[:, 0:12:2]
        step = step_of(f_BF)
        for store in (dense, table):
            store.after_step(step)
        table.every_n_steps(step)
        history.append({(i, j) for i, j in zip(table.first_P.tolist(), table.second_P.tolist(), strict=True) if i < j})
    assert all(bound <= held for held in history)  # found in the first batch, and never lost
    assert len(history[-1]) == 8
    assert len(set(zip(table.first_P.tolist(), table.second_P.tolist(), strict=True))) == 8
    conditional_FF = dense.conditional()
    for i, j, p in zip(table.first_P, table.second_P, table.conditional(), strict=True):
        if (int(i), int(j)) in bound:
            assert float(p) == pytest.approx(1.0, abs=0.05)
            assert float(conditional_FF[i, j]) == pytest.approx(1.0, abs=0.05)
    # Held since the first renewal: eleven batches of the twelve, weighed as the dense average weighs them.
    at = (table.first_P == 0) & (table.second_P == 1)
    assert float(table.seen_P[at]) == pytest.approx(1 - 0.99**11)


def test_a_table_for_absorption_follows_rows_that_look_alike() -> None:
    sae = SAE(16, 20)
    sae.W_dec.data[7] = sae.W_dec.data[3]
    table = PairTable(20, 3, every=1, by="cosine")
    step = step_of(codes(0, 128, 20), sae)
    table.after_step(step)
    table.every_n_steps(step)
    table.after_step(step)
    table.every_n_steps(step)
    assert (3, 7) in set(zip(table.first_P.tolist(), table.second_P.tolist(), strict=True))
    cosine_FF = (sae.W_dec @ sae.W_dec.T).detach().triu(1)
    held = cosine_FF[table.first_P, table.second_P]
    torch.testing.assert_close(held.sort().values, cosine_FF.flatten().topk(3).values.sort().values)


def test_results_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = SAE(6, 24)
    results = []
    for block in (2**24, 50):
        monkeypatch.setattr("sae.train.variants.competition.BLOCK", block)
        table = PairTable(24, 40, every=1)
        for seed in range(3):
            step = step_of(codes(seed), sae)
            table.after_step(step)
            table.every_n_steps(step)
        loss = CompetitionLoss(table, 4 / 24, tau=0.2)(step)
        (gradient,) = torch.autograd.grad(loss, sae.W_dec)
        results.append((sorted(zip(table.first_P.tolist(), table.second_P.tolist(), strict=True)), loss, gradient))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:])


def test_strength_rises_over_the_warm_up() -> None:
    coefficient = competition_strength(0.03, 2000)
    assert [round(float(coefficient(step_of(torch.ones(1, 2), i=i))), 6) for i in (0, 999, 1999, 3000)] == [
        0.000015, 0.015, 0.03, 0.03,
    ]  # fmt: skip
    assert float(competition_strength(0.03, 0)(step_of(torch.ones(1, 2)))) == pytest.approx(0.03)


def test_counts_follow_the_width_unless_given() -> None:
    for name, options, k in (
        ("competition", {}, 6), ("competition-k320", {}, 18), ("competition", {"k": 100}, 100)
    ):  # fmt: skip
        variant = find_recipe(name).make(RunConfig(128, 256, 100, 64), options)
        assert variant.sae.activation[0].k == k
    paper = RunConfig(2304, 18432, 4882, 2048)
    with torch.device("meta"):
        assert find_recipe("competition").make(paper, {}).sae.activation[0].k == 100
        assert find_recipe("competition-k320").make(paper, {}).sae.activation[0].k == 320


def test_invalid_options_raise_a_usage_error() -> None:
    paper = RunConfig(2304, 18432, 4882, 2048)
    make = find_recipe("competition").make
    with torch.device("meta"):
        make(paper, {"pair_store": "dense", "memory_gb": 11.0})
        with pytest.raises(UsageError, match=r"pair_store=dense takes 10\.9 GB for 18432 latents.* memory_gb=2: "):
            make(paper, {"pair_store": "dense"})
        with pytest.raises(UsageError, match=r"pair_store=table takes 25\.3 GB for 10000 pairs per latent"):
            make(paper, {"pairs": 10_000})
        with pytest.raises(UsageError) as caught:
            make(paper, {"tau_on": "both", "direction": "up", "strength_warmup": -1, "tau": -1.0, "refresh": 0})
        with pytest.raises(UsageError, match="diagonal=true has no effect with target=absorption"):
            make(paper, {"diagonal": True, "target": "absorption"})
    for part in ("tau_on=both is unknown: expected one of conditional, lift.",
                 "direction=up is unknown", "strength_warmup=-1 is negative",
                 "invalid tau=-1: below 0 every pair would pass", "invalid refresh=0: expected 1 or more"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_takes_steps(name: str, make_trainer, take) -> None:
    trainer = make_trainer(name, steps=5)
    list(take(trainer, range(5)))
    metrics = trainer.pop_metrics()
    assert all(value == value and abs(value) < 1e6 for value in metrics.values())
    if name != "competition-baseline":
        expected = {"competition-off": 0.0, "competition-no-warmup": 0.03}.get(name)
        if expected is not None:
            assert metrics["competition_strength"] == pytest.approx(expected)
        assert {"pairs_above", "mean_coefficient", "competition"} <= metrics.keys()


@pytest.mark.parametrize(
    "reading",
    [
        {"act": "batchtopk", "k": 3},
        {"act": "relu", "pair_store": "dense"},
        {"pair_vec": "activation", "tau": 0.05},
        {"direction": "child_only"},
        {"target": "absorption", "aux": 0.03},
        {"reconstruction": "mean", "normalize": "none"},
        {"tau_on": "lift", "reduction": "sum"},
        {"tau_on": "lift", "reduction": "sum", "diagonal": True, "pair_store": "dense"},
    ],
)
def test_every_option_trains(reading: dict[str, object], make_trainer, take) -> None:
    trainer = make_trainer("competition-no-warmup", steps=10, **reading)
    before = trainer.variant.sae.W_dec.detach().clone()
    list(take(trainer, range(10)))
    metrics = trainer.pop_metrics()
    assert all(value == value for value in metrics.values())
    assert not torch.equal(before, trainer.variant.sae.W_dec)


def test_it_composes_with_another_base(make_variant, take) -> None:
    """Six lines: matryoshka that competes. The statistics come before unit norm, and pairs are penalised."""
    variant = make_variant("matryoshka", k=8)
    term = CompetitionLoss(PairTable(variant.sae.d_sae, 1000, every=2), 8 / variant.sae.d_sae, tau=0.2)
    add_competition(variant, competition_strength(0.03, 0), term)
    assert variant.mechanisms[len(variant.mechanisms) - 3] is term.pairs
    assert isinstance(variant.mechanisms[len(variant.mechanisms) - 2], CompetitionMonitor)
    trainer = Trainer(variant, 30, "cpu")
    list(take(trainer, range(6)))
    metrics = trainer.pop_metrics()
    assert metrics["pairs_above"] > 0 and metrics["competition"] > 0
    assert metrics["penalized"] == pytest.approx(6 * metrics["pairs_above"])  # the mean over six steps
    assert metrics["correlation_pairs"] >= 3 and 0 < abs(metrics["correlation_cosine"]) <= 1


def test_bound_directions_are_pushed_apart(make_trainer, take) -> None:
    """From the same start, the pairs that pass end less alike under the penalty than without it."""
    similar = []
    for strength in (0.0, 3.0):
        trainer = make_trainer("competition", k=6, tau=0.15, strength=strength, strength_warmup=0, lr=3e-3, warmup=0)
        list(take(trainer, range(30)))
        (store,) = [m for m in trainer.variant.mechanisms if isinstance(m, PairTable)]
        bound_P = store.conditional() >= 0.15
        similarity_P = store.inner(trainer.variant.sae.W_dec, trainer.variant.sae.W_dec).square()
        similar.append(similarity_P[bound_P].mean().item())
    assert similar[1] < 0.8 * similar[0]


def test_options_reach_the_built_variant() -> None:
    """The printed constants, and each option away from its default."""
    paper = RunConfig(2304, 18432, 4882, 2048)
    options = CompetitionOptions()
    assert (options.strength, options.tau, options.beta, options.l1, int(options.k)) == (0.03, 0.6, 0.99, 0.04, 100)
    with torch.device("meta"):
        variant = find_recipe("competition").make(paper, {})
        loss = variant.terms["competition"]
        assert isinstance(loss, CompetitionLoss) and isinstance(loss.pairs, PairTable)
        assert loss.tau == 0.6 and loss.unit == pytest.approx(100 / 18432)
        assert (loss.pair_vec, loss.direction, loss.reduction) == ("decoder", "symmetric", "active_pairs")
        assert (loss.target, loss.diagonal) == ("cofire", False)
        assert loss.pairs.beta == 0.99 and loss.pairs.every == 100 and loss.pairs.by == "cofire"
        assert len(loss.pairs.first_P) == 16 * 18432
        other = find_recipe("competition").make(
            paper,
            {"tau": 0.5, "tau_on": "lift", "weight": "conditional", "pair_vec": "activation", "direction": "child_only",
             "reduction": "n", "target": "absorption", "beta": 0.9, "pairs": 3, "refresh": 7},
        ).terms["competition"]  # fmt: skip
        assert other.tau == pytest.approx(0.5 * 100 / 18432) and other.unit == 1.0
        assert (other.pair_vec, other.direction, other.reduction) == ("activation", "child_only", "n")
        assert (other.target, other.pairs.beta, other.pairs.every) == ("absorption", 0.9, 7)
        assert len(other.pairs.first_P) == 3 * 18432 and other.pairs.by == "cosine"
    small = find_recipe("competition").make(
        RunConfig(8, 24, 100, 8), {"pair_store": "dense", "diagonal": True, "beta": 0.8}
    )
    loss = small.terms["competition"]
    assert isinstance(loss.pairs, DensePairs) and loss.pairs.beta == 0.8 and loss.diagonal


@pytest.mark.parametrize(
    ("name", "steps", "options", "reached"),
    [
        ("competition", 4882, {}, {0: 1 / 2000, 999: 0.5, 1999: 1.0, 4881: 1.0}),
        ("competition", 9764, {}, {999: 0.5, 1999: 1.0}),
        ("competition", 2441, {}, {499: 0.5, 999: 1.0}),
        ("competition", 4882, {"strength_warmup": 100}, {49: 0.5, 99: 1.0}),
        ("competition-no-warmup", 4882, {}, {0: 1.0}),
        ("competition-off", 4882, {}, {0: 0.0, 4881: 0.0}),
    ],
)
def test_strength_of_the_built_variant(name: str, steps: int, options: dict, reached: dict[int, float]) -> None:
    """(4), over 2,000 of 4,882 steps and the same share of a shorter run."""
    variant = find_recipe(name).make(RunConfig(8, 16, steps, 8), options)
    for i, share in reached.items():
        step = step_of(torch.ones(1, 16), variant.sae, i)
        assert float(variant.coefficients["competition"](step)) == pytest.approx(0.03 * share), i
        assert float(step.metrics["competition_strength"]) == pytest.approx(0.03 * share)


def test_penalties_without_a_warm_up_have_their_full_strength_at_the_first_step() -> None:
    for name in ("competition", "competition-baseline"):
        for warmup, share in ((None, 1 / 244), (0, 1.0)):
            variant = find_recipe(name).make(RunConfig(8, 16, 4882, 8), {"l1_warmup": warmup})
            step = step_of(torch.ones(1, 16), variant.sae, 0)
            assert float(variant.coefficients["l1"](step)) == pytest.approx(0.04 * share)


def test_the_baseline_is_a_relu_sae_of_the_printed_penalty() -> None:
    variant = find_recipe("competition-baseline").make(RunConfig(8, 16, 100, 8), {"reconstruction": "mean"})
    assert not variant.sae.pre_bias and not isinstance(variant.sae.activation[0], TopK)
    assert float(variant.coefficients["mse"](step_of(torch.ones(1, 16)))) == pytest.approx(1 / 8)
    assert float(find_recipe("competition").make(RunConfig(8, 16, 100, 8), {}).coefficients["mse"](
        step_of(torch.ones(1, 16))
    )) == 1.0  # fmt: skip


@pytest.mark.parametrize(
    ("reading", "tau_on", "reduction", "store", "diagonal", "error", "l1"),
    [
        ("evidence", "conditional", "active_pairs", PairTable, False, 1 / 128, 0.04),
        ("field", "conditional", "active_pairs", PairTable, False, 1.0, 0.04 / 244),
        ("literal", "lift", "sum", DensePairs, True, 1.0, 0.04),
    ],
)
def test_readings_of_the_paper_are_built_as_their_file_says(
    reading: str, tau_on: str, reduction: str, store: type, diagonal: bool, error: float, l1: float
) -> None:
    """(5) at the first step of 4,882. The paper prints no warm-up but t_w; `literal` has its sum over i and j."""
    paper = load_paper("002")
    (chosen,) = (one for one in paper.readings if one.name == reading)
    config = RunConfig(128, 1024, 4882, 2048, paper_exact=chosen.literal)
    variant = find_recipe("competition").make(config, chosen.options)
    loss = variant.terms["competition"]
    k = 100 if chosen.literal else 6
    assert loss.tau == pytest.approx(0.6 if tau_on == "conditional" else 0.6 * k / 1024)
    assert (loss.reduction, type(loss.pairs), loss.diagonal) == (reduction, store, diagonal)
    assert loss.unit == pytest.approx(k / 1024)
    step = step_of(torch.ones(1, 1024), variant.sae, 0)
    weights = {name: float(coefficient(step)) for name, coefficient in variant.coefficients.items()}
    assert weights == {"mse": error, "l1": pytest.approx(l1), "competition": pytest.approx(0.03 / 2000)}
    assert variant.optimization.normalize == ("unit_ms" if reading == "field" else "none")
    assert not variant.sae.pre_bias


def test_a_shorter_run_of_the_paper_s_readings_keeps_the_printed_warm_up() -> None:
    (evidence,) = (one for one in load_paper("002").readings if one.name == "evidence")
    variant = find_recipe("competition").make(RunConfig(8, 16, 3000, 8), evidence.options)
    assert float(variant.coefficients["competition"](step_of(torch.ones(1, 16), variant.sae, 999))) == pytest.approx(
        0.015
    )
