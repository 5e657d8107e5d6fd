"""Paper 002: the statistics of pairs agree with direct counts, and the table with the store of all pairs."""

import pytest
import torch

from sae.train.kernels.pair_operator import count_pairs
from sae.train.sae import SAE
from sae.train.variants.competition.pairs import MIN_RATE, DensePairs, PairTable, pack_tokens
from sae.train.variants.competition.penalty import (
    CompetitionLoss,
)

from .latents import codes, step_of, stores, three_latents


def test_statistics_of_three_latents_by_hand() -> None:
    """p = 3/4, 2/4, 2/4 and J_01, J_02, J_12 = 2/4, 1/4, 0, so P(more frequent | rarer) = 1, 1/2, 0."""
    step, _ = three_latents()
    for store in stores(3):
        for _ in range(3):  # averages of equal batches do not change
            store.after_step(step)
        known = store.conditional()
        found = known[known >= 0] if known.dim() == 1 else known[[0, 0, 1], [1, 2, 2]]
        torch.testing.assert_close(store.rates(), torch.tensor([0.75, 0.5, 0.5]))
        torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("kind", [0, 1])
def test_a_latent_that_hardly_fires_has_no_known_coefficient(kind: int) -> None:
    """Latents fire at rates 4e-6, 1e-5 and 1/2. Whenever a rarer one fires, the more frequent ones fire too."""
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
    """J of a pair in a table may average fewer batches than p, so J / p can exceed 1; it is limited to 1."""
    table = PairTable(2, 1)
    table.seen.fill_(1.0)
    table.seen_P.fill_(1.0)
    table.rate_F.copy_(torch.tensor([0.2, 0.5]))
    table.joint_P.fill_(0.3)
    assert table.conditional().tolist() == [1.0]


def test_statistics_are_of_latents_that_fire_after_the_activation() -> None:
    """A latent counts where f is positive. All pre-activations are positive, so counting those gives other rates."""
    f_BF = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    step = step_of(f_BF)
    step.pre_BF = torch.tensor([[5.0, 4.0], [1.0, 2.0], [0.5, 0.1], [3.0, 2.0]])
    for store in stores(2):
        store.after_step(step)
        torch.testing.assert_close(store.rates(), torch.tensor([0.75, 0.25]))
        torch.testing.assert_close(
            store.conditional().flatten()[-1 if store.conditional().dim() == 1 else 1], torch.tensor(1.0)
        )


def test_coefficient_is_the_larger_direction_and_symmetric() -> None:
    """max(c_ij, c_ji) from the two conditional probabilities, each divided by k/n; the matrix is symmetric."""
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
    assert step.metrics["pairs_above"] > 0.99 * len(lift)  # the printed tau, 0.6, is below 1, the lift by chance
    CompetitionLoss(store, 0.1)(step)
    assert step.metrics["pairs_above"] == 0


def test_pairs_are_counted_bit_by_bit_as_a_product_counts_them() -> None:
    """This also holds if tokens do not fill a 64-bit word, and if all bits of a word are set."""
    for tokens in (1, 63, 64, 130):
        on_BF = torch.rand(tokens, 9, generator=torch.Generator().manual_seed(tokens)) < 0.5
        on_BF[:, 0] = True
        first_P, second_P = torch.triu_indices(9, 9)
        expected_FF = on_BF.float().T @ on_BF.float()
        assert torch.equal(count_pairs(pack_tokens(on_BF), first_P, second_P).float(), expected_FF[first_P, second_P])


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
    assert all(bound <= held for held in history)  # they enter at the first refresh and stay
    assert len(history[-1]) == 8
    assert len(set(zip(table.first_P.tolist(), table.second_P.tolist(), strict=True))) == 8
    conditional_FF = dense.conditional()
    for i, j, p in zip(table.first_P, table.second_P, table.conditional(), strict=True):
        if (int(i), int(j)) in bound:
            assert float(p) == pytest.approx(1.0, abs=0.05)
            assert float(conditional_FF[i, j]) == pytest.approx(1.0, abs=0.05)
    # The pair is in the table since the first refresh, so its J averages eleven of the twelve batches.
    at = (table.first_P == 0) & (table.second_P == 1)
    assert float(table.seen_P[at]) == pytest.approx(1 - 0.99**11)


def test_a_table_prefers_what_is_seen_often_to_what_is_seen_once() -> None:
    """Latents 2 and 3 fire once, together. Latents 0 and 1 fire ten times each, eight of them together."""
    f_BF = torch.zeros(20, 4)
    f_BF[0:10, 0] = f_BF[2:12, 1] = 1
    f_BF[15, 2:] = 1
    table, step = PairTable(4, 1, every=1), step_of(f_BF)
    table.after_step(step)
    table.every_n_steps(step)
    assert (table.first_P.tolist(), table.second_P.tolist()) == ([0], [1])


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
        monkeypatch.setattr("sae.train.variants.competition.pairs.BLOCK", block)
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
