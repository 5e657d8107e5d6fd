"""Paper 000: learning rates of groups, and winner-take-all."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sae.train.loop import Trainer
from sae.train.sae import SAE, build_sae, sae_spec
from sae.train.step import Step
from sae.train.variant import Variant
from sae.train.variants.collapse.groups import (
    DecoderRows,
    GroupLearningRate,
    GroupSampling,
    GroupUtilization,
    Neighbours,
    WinnerTakeAll,
)
from sae.train.variants.collapse.monitors import UtilizationEMA


def rates(mode: str, u_G: list[float]) -> tuple[GroupLearningRate, UtilizationEMA]:
    utilisation = UtilizationEMA(4 * len(u_G))
    utilisation.rate_F.copy_(0.1 * torch.tensor(u_G).repeat_interleave(4))
    utilisation.gathered.fill_(0.1)  # the value after one step
    return GroupLearningRate(DecoderRows(len(u_G)), GroupUtilization(utilisation, len(u_G)), mode), utilisation


def test_group_rates_by_hand() -> None:
    u_G = [0.0, 0.1, 0.2, 0.3]
    softmax = torch.tensor(u_G).softmax(0)
    torch.testing.assert_close(rates("softmax", u_G)[0].rate_G, softmax)
    torch.testing.assert_close(rates("softmax_mean1", u_G)[0].rate_G, 4 * softmax)
    busy, idle = rates("softmax_temp", u_G)[0].rate_G, rates("inverse", u_G)[0].rate_G
    torch.testing.assert_close(busy, idle.flip(0))
    assert busy[3] > 3 * busy[1]
    for mode in ("softmax_mean1", "softmax_temp", "inverse"):
        assert float(rates(mode, u_G)[0].rate_G.mean()) == pytest.approx(1.0)
    largest = GroupUtilization(rates("softmax", u_G)[1], 2, "max")
    torch.testing.assert_close(largest.u_G, torch.tensor([0.1, 0.3]))


def test_a_group_rate_scales_the_update_and_not_the_gradient(step_of: Callable[..., Step]) -> None:
    """Adam's first update is lr times the sign of the gradient, so a factor on the gradient would have no effect."""
    torch.manual_seed(0)
    sae, (part, _) = SAE(4, 8), rates("softmax", [0.0, 2.0])
    step = step_of(sae, torch.randn(5, 4))
    old = {name: weight.detach().clone() for name, weight in sae.named_parameters()}
    for weight in sae.parameters():
        weight.grad = torch.ones_like(weight)
    part.after_backward(step)
    step.optimizer.param_groups[0]["weight_decay"] = 0.0
    step.optimizer.step()
    part.after_step(step)
    assert all((weight.grad == 1).all() for weight in sae.parameters())
    share_F = torch.tensor([0.0, 2.0]).softmax(0).repeat_interleave(4)
    torch.testing.assert_close(
        old["W_dec"] - sae.W_dec.data, 0.01 * share_F[:, None].expand(8, 4), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(old["W_enc"] - sae.W_enc.data, 0.01 * share_F.expand(4, 8), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(old["b_enc"] - sae.b_enc.data, 0.01 * share_F)
    torch.testing.assert_close(old["b_dec"] - sae.b_dec.data, torch.full((4,), 0.01))


def test_neighbours_inhibit_and_the_best_of_each_group_remain() -> None:
    def link(**options: object) -> WinnerTakeAll:
        made = WinnerTakeAll(6, groups=2, winners=2, gamma=0.5, neighbours=1, **options)
        made.near_FN.copy_(torch.tensor([[1.0], [0.0], [0.0], [4.0], [5.0], [3.0]]))
        made.closeness_FN.copy_(torch.tensor([[0.5], [1.0], [0.0], [1.0], [0.0], [1.0]]))
        return made

    f_BF = torch.tensor([[4.0, 3.0, 2.0, 1.0, 6.0, 0.0]])
    # 4 - 0.25 * 3 = 3.25, 3 - 0.5 * 4 = 1, 2 - 0 = 2; and 1 - 0.5 * 6 < 0, 6 - 0, 0 - 0.5 * 1 < 0
    assert link()(f_BF).tolist() == [[3.25, 0.0, 2.0, 0.0, 6.0, 0.0]]
    assert link(inhibition="off")(f_BF).tolist() == [[4.0, 3.0, 0.0, 1.0, 6.0, 0.0]]
    expected = [[16 / 4.75, 0.0, 2.0, 1 / 4, 6.0, 0.0]]  # latent 1 gets 9 / 5, which is the smallest of its group
    torch.testing.assert_close(link(inhibition="divisive")(f_BF), torch.tensor(expected))
    for inhibition in ("subtractive", "divisive"):
        torch.testing.assert_close(link(inhibition=inhibition)(7 * f_BF), 7 * link(inhibition=inhibition)(f_BF))


def test_neighbours_are_the_nearest_of_the_group_and_follow_the_encoder(
    build: Callable[..., Variant], trained: Callable[..., Trainer]
) -> None:
    variant = build("collapse-09", neighbours=2)
    trainer = trained(variant, 5)
    link, sae = variant.sae.activation[-1], variant.sae
    part = next(m for m in variant.mechanisms if m.every == 100)
    part.every_n_steps(trainer.step(torch.randn(64, 32)))
    unit_FD = torch.nn.functional.normalize(sae.W_enc.detach().T, dim=1)
    for i in (0, 5, 63):
        group = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        cosine = {j: float(unit_FD[i] @ unit_FD[j]) for j in group}
        best = sorted(group, key=lambda j: -cosine[j])[:2]
        assert link.near_FN[i].tolist() == best
        assert link.closeness_FN[i].tolist() == pytest.approx([max(cosine[j], 0.0) for j in best], abs=1e-6)


def test_with_free_rows_a_group_rate_scales_their_update_and_leaves_w_dec_alone(step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae, (part, _) = SAE(4, 8), rates("softmax_mean1", [0.0, 2.0])
    part.rows.free_FD = nn.Parameter(torch.randn(8, 4))
    step = step_of(sae, torch.randn(5, 4))
    free_FD, W_dec = part.rows.free_FD.detach().clone(), sae.W_dec.detach().clone()
    part.after_backward(step)
    part.rows.free_FD.data += 1.0
    sae.W_dec.data += 1.0
    part.after_step(step)
    rate_F = 2 * torch.tensor([0.0, 2.0]).softmax(0).repeat_interleave(4)
    torch.testing.assert_close(part.rows.free_FD.data - free_FD, rate_F[:, None].expand(8, 4))
    torch.testing.assert_close(sae.W_dec.data, W_dec + 1.0)


@pytest.mark.parametrize(
    "mode, u_G, counts",
    [
        ("softmax_mean1", [0.2, 0.2], [0, 0]),
        ("softmax_mean1", [0.2, 0.2015], [0, 0]),
        ("softmax_mean1", [0.2, 0.21], [2, 4]),
        ("softmax", [0.2, 0.2], [2, 4]),
    ],
)
def test_rates_that_differ_from_the_runs_by_more_than_a_thousandth_are_counted(
    mode: str, u_G: list[float], counts: list[int], step_of: Callable[..., Step]
) -> None:
    """With `softmax_mean1`, each of two rates differs from the run's by half of the difference in utilization.

    With `softmax`, (2) as printed, two equally used groups each get half of the run's rate, so both are counted.
    """
    part, _ = rates(mode, u_G)
    step = step_of(SAE(4, 8), torch.zeros(1, 4))
    for count in counts:
        part.after_backward(step)
        part.after_step(step)
        assert int(part.scalars()["rates_differed"]) == count


def sampling(u_G: list[float], share: float = 0.5, steps: int = 1000) -> GroupSampling:
    part = GroupSampling(DecoderRows(1), 4 * len(u_G), len(u_G), share, 1.0, steps)  # decay 1: constant utilization
    part.utilization.rate_F.copy_(0.1 * torch.tensor(u_G).repeat_interleave(4))
    part.utilization.gathered.fill_(0.1)
    part.uniform_T.copy_((torch.arange(steps) + 0.5) / steps)
    return part


def test_groups_are_drawn_by_their_utilization_and_the_expected_update_is_that_of_all(
    step_of: Callable[..., Step],
) -> None:
    """Evenly spaced numbers replace the random ones, so that the shares are exact."""
    u_G, total = [0.0, 0.1, 0.2, 0.5], 0.8
    part, step = sampling(u_G), step_of(SAE(4, 16), torch.zeros(2, 4))
    probability = [min(1.0, 2 * (0.1 / 4 + 0.9 * u / total)) for u in u_G]
    assert probability[3] == 1.0 and probability[0] == pytest.approx(0.05)
    torch.testing.assert_close(part.probability_G, torch.tensor(probability))
    factors = []
    for i in range(1000):
        step.i = torch.tensor(i)
        factors.append(part.factor_G(step))
    factor_TG = torch.stack(factors)
    torch.testing.assert_close((factor_TG > 0).float().mean(0), torch.tensor(probability), rtol=0, atol=2e-3)
    torch.testing.assert_close(factor_TG.mean(0), torch.ones(4), rtol=0, atol=0.02)
    drawn = (factor_TG > 0).sum(1)
    assert int(drawn.min()) >= 1 and int(drawn.max()) <= 2  # the sum of the probabilities is 1.78
    assert int(part.scalars()["groups_skipped"]) == 4000 - int(drawn.sum())


def test_half_of_equal_groups_are_drawn_in_every_step(step_of: Callable[..., Step]) -> None:
    part, step = sampling([0.3] * 8, steps=16), step_of(SAE(4, 32), torch.zeros(2, 4))
    for i in range(16):
        step.i = torch.tensor(i)
        assert sorted(part.factor_G(step).tolist()) == pytest.approx([0, 0, 0, 0, 2, 2, 2, 2])


def test_sampling_follows_the_latents_that_fire(step_of: Callable[..., Step]) -> None:
    part = GroupSampling(DecoderRows(1), 8, 2, 0.5, 0.9, 4)
    step = step_of(SAE(4, 8), torch.zeros(2, 4))
    step.pre_BF = torch.ones(2, 8)
    for fired, u_G in ((range(4), [1.0, 0.0]), (range(2, 6), [(0.09 + 0.05) / 0.19, 0.05 / 0.19])):
        step.f_BF = torch.zeros(2, 8)
        step.f_BF[:, list(fired)] = 1.0
        part.factor_G(step)
        expected = torch.tensor([0.05 + 0.9 * u / sum(u_G) for u in u_G])
        torch.testing.assert_close(part.probability_G, expected)


def test_only_the_groups_that_are_drawn_move_and_by_more_in_turn(build: Callable[..., Variant]) -> None:
    """Compare the first step with and without sampling. Adam computes the same update in both cases."""
    moved = []
    for importance in ("off", "groups"):
        variant = build("collapse-04", batch_norm="pre", importance=importance, lr=1e-3, warmup=0, clip=None)
        sae, norm = variant.sae, variant.sae.activation[0]
        weights = [sae.W_enc.T, sae.b_enc, norm.gain_F, norm.shift_F, sae.W_dec]
        before = [weight.detach().clone() for weight in weights]
        trainer = Trainer(variant, 20, "cpu")
        trainer.step(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) + 0.5)
        moved.append([(weight.detach() - old).reshape(16, -1) for weight, old in zip(weights, before, strict=True)])
    part = next(m for m in variant.mechanisms if isinstance(m, GroupSampling))
    assert part.count == 16 and int(trainer.pop_metrics()["groups_skipped"]) in (8, 9)
    p_G = part.probability_G
    drawn_G = moved[1][0].abs().amax(1) > 0
    assert 7 <= int(drawn_G.sum()) <= 8
    for every, some in zip(moved[0][:4], moved[1][:4], strict=True):
        assert not some[~drawn_G].any()
        torch.testing.assert_close(some[drawn_G], (every / p_G[:, None])[drawn_G], rtol=1e-3, atol=1e-6)
    assert moved[1][4][~drawn_G].abs().max() < 1e-6 < 1e-4 < moved[1][4][drawn_G].abs().max()  # unit norm rounds


def test_sampling_draws_no_number_that_other_parts_draw(build: Callable[..., Variant]) -> None:
    plain, sampled = build("collapse-01"), build("collapse-01", importance="groups")
    again = build("collapse-01", importance="groups")
    own = next(m for m in sampled.mechanisms if isinstance(m, GroupSampling))
    for name, tensor in plain.named_buffers():
        if name.endswith("R_DS"):
            assert any(torch.equal(tensor, other) for n, other in sampled.named_buffers() if n.endswith("R_DS"))
    assert torch.equal(plain.sae.W_dec, sampled.sae.W_dec)
    assert torch.equal(own.uniform_T, next(m for m in again.mechanisms if isinstance(m, GroupSampling)).uniform_T)
    assert len(own.uniform_T) == 20 and float(own.uniform_T.std()) > 0.1


@pytest.mark.parametrize(
    "name, options, count, beta",
    [
        ("collapse-baseline", {}, 16, 0.9),
        ("collapse-03", {"beta": 0.5}, 16, 0.5),
        ("collapse-08", {"groups": 8}, 8, 0.9),
    ],
)
def test_groups_are_sixteen_until_a_run_has_groups(
    name: str, options: dict, count: int, beta: float, build: Callable[..., Variant]
) -> None:
    variant = build(name, importance="groups", importance_share=0.25, **options)
    (part,) = [m for m in variant.mechanisms if isinstance(m, GroupSampling)]
    assert (part.count, part.share, part.utilization.beta) == (count, 0.25, beta)


def test_the_strongest_neighbour_inhibits_and_not_the_sum_of_them() -> None:
    link = WinnerTakeAll(4, groups=1, winners=4, gamma=0.5, neighbours=2)
    link.near_FN.copy_(torch.tensor([[1.0, 2.0], [0.0, 2.0], [3.0, 1.0], [0.0, 1.0]]))
    link.closeness_FN.copy_(torch.tensor([[0.5, 0.25], [0.5, 0.0], [1.0, 0.5], [0.0, 0.0]]))
    f_BF = torch.tensor([[8.0, 6.0, 4.0, 2.0]], requires_grad=True)
    # 8 - 0.5 max(0.5 6, 0.25 4), 6 - 0.5 0.5 8, 4 - 0.5 max(2, 0.5 6), and 2, which has no close neighbour
    out_BF = link(f_BF)
    assert out_BF.tolist() == [[6.5, 4.0, 2.5, 2.0]]
    (gradient_BF,) = torch.autograd.grad(out_BF.sum(), f_BF)
    assert gradient_BF.tolist() == [[1.0, 1.0, 1.0, 1.0]]  # inhibition passes no gradient on


def test_inhibited_and_outcompeted_latents_are_counted_apart() -> None:
    link = WinnerTakeAll(4, groups=2, winners=1, gamma=1.0, neighbours=1)
    link.near_FN.copy_(torch.tensor([[1.0], [0.0], [3.0], [2.0]]))
    link.closeness_FN.copy_(torch.tensor([[0.5], [0.5], [1e-5], [1e-5]]))
    f_BF = torch.tensor([[4.0, 6.0, 0.0, 0.0], [1.0, 4.0, 3.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    # Token 0: 4 - 3 and 6 - 2 are both inhibited, and the smaller one is outcompeted.
    # Token 1: 1 - 2 and 4 - 0.5 are both inhibited, the first to zero. 3 and 2 inhibit each other by a factor of 1e-5,
    # which does not count as inhibited; the smaller one is outcompeted.
    assert link(f_BF).count_nonzero() == 4
    assert {name: int(count) for name, count in link.counts.items()} == {"inhibited": 4, "outcompeted": 2}
    link(f_BF.repeat(50, 1))
    assert int(link.counts["inhibited"]) == 43 * 2 + 43 * 2  # the first 128 of 150 tokens: 43, 43 and 42 of each kind
    off = WinnerTakeAll(4, groups=2, winners=1, inhibition="off")
    off(f_BF)
    assert {name: int(count) for name, count in off.counts.items()} == {"inhibited": 0, "outcompeted": 3}
    off.eval()(torch.ones(9, 4))
    assert int(off.counts["outcompeted"]) == 3  # the last training batch's count


@pytest.mark.parametrize(
    "d_sae, options, groups, winners",
    [
        (64, {}, 16, 1),  # 0.1 of a group's 4 latents, rounded up
        (192, {}, 16, 2),  # 0.1 of 12 latents
        (320, {}, 16, 2),  # 0.1 of 20 latents
        (192, {"wta_scope": "global"}, 1, 32),
        (192, {"wta_share": 0.5, "groups": 8}, 8, 12),
    ],
)
def test_winners_of_a_built_run_are_a_share_of_a_group_rounded_up(
    d_sae: int, options: dict, groups: int, winners: int, build: Callable[..., Variant]
) -> None:
    link = build("collapse-09", d_sae=d_sae, **options).sae.activation[-1]
    assert (link.groups, link.winners) == (groups, winners)


@pytest.mark.parametrize("near, d_in, d_sae", [("encoder", 6, 64), ("decoder", 6, 64), ("decoder", 2, 1040)])
def test_neighbours_of_the_whole_dictionary_are_the_nearest_of_all(
    near: str, d_in: int, d_sae: int, step_of: Callable[..., Step]
) -> None:
    torch.manual_seed(0)
    sae = SAE(d_in, d_sae)
    sae.W_enc.data = torch.randn(d_in, d_sae)
    link = WinnerTakeAll(d_sae, groups=16, winners=1, neighbours=8, near_scope="dictionary")
    Neighbours(link, sae, near)
    rows_FD = (sae.W_enc.T if near == "encoder" else sae.W_dec).detach()
    unit_FD = torch.nn.functional.normalize(rows_FD, dim=1)
    cosine_FF = (unit_FD @ unit_FD.T).fill_diagonal_(-2.0)
    best = cosine_FF.topk(8, dim=1)
    torch.testing.assert_close(link.closeness_FN, best.values.clamp(min=0), rtol=1e-5, atol=1e-6)
    found = cosine_FF.gather(1, link.near_FN.long())
    torch.testing.assert_close(found, best.values, rtol=1e-5, atol=1e-6)
    assert (link.near_FN.long() // (d_sae // 16) != torch.arange(d_sae)[:, None] // (d_sae // 16)).any()


def test_an_sae_says_where_its_neighbours_were_sought_only_if_it_was_the_dictionary(
    build: Callable[..., Variant],
) -> None:
    """By default an SAE is saved as in earlier versions, whose SAEs therefore still load."""
    usual, wide = build("collapse-09").sae, build("collapse-09", near_scope="dictionary").sae
    assert (usual.activation[-1].neighbours, wide.activation[-1].neighbours) == (3, 8)
    assert "near_scope" not in sae_spec(usual)["activation"][-1]
    for sae in (usual, wide):
        again = build_sae(sae_spec(sae), sae.state_dict())
        x_BD = torch.randn(5, 32)
        assert torch.equal(again.eval().encode(x_BD), sae.eval().encode(x_BD))
