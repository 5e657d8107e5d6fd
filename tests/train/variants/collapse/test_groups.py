"""Paper 000: learning rates of groups, and winner-take-all."""

from collections.abc import Callable

import pytest
import torch

from sae.train.loop import Trainer
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import Variant
from sae.train.variants.collapse.groups import DecoderRows, GroupLearningRate, GroupUtilization, WinnerTakeAll
from sae.train.variants.collapse.monitors import UtilizationEMA


def rates(mode: str, u_G: list[float]) -> tuple[GroupLearningRate, UtilizationEMA]:
    utilisation = UtilizationEMA(4 * len(u_G))
    utilisation.rate_F.copy_(0.1 * torch.tensor(u_G).repeat_interleave(4))
    utilisation.gathered.fill_(0.1)  # as after the first step
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
    """Adam's first update is lr times the gradient's sign, however long the gradient is."""
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
    expected = [[16 / 4.75, 0.0, 2.0, 1 / 4, 6.0, 0.0]]  # and 9 / 5 is the third of its group
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
