"""Paper 004: latents with nearly the same direction are merged (7)."""

import torch

from sae.train.loop import Trainer
from sae.train.mechanisms import DeadLatents
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variants.hierarchical.merging import MergeSimilar, match_pairs
from sae.train.variants.hierarchical.window import ResampleByWindow

from .steps import build, rows, step_on


def test_a_merge_is_a_matching_of_the_most_similar() -> None:
    """1-2 (cosine 0.99) and 3-4 (0.91) are merged. Latent 0 is not, because latents 1 and 2 are already matched."""
    cosine_FF = torch.eye(5)
    for i, j, value in ((0, 1, 0.95), (1, 2, 0.99), (0, 2, 0.92), (3, 4, 0.91), (0, 3, 0.5)):
        cosine_FF[i, j] = cosine_FF[j, i] = value
    i_M, j_M = match_pairs(cosine_FF, 0.9)
    assert list(zip(i_M.tolist(), j_M.tolist(), strict=True)) == [(1, 2), (3, 4)]
    assert match_pairs(cosine_FF, float(cosine_FF[3, 4]))[0].tolist() == [1]  # strictly above


def test_a_matching_names_no_latent_twice_and_leaves_no_pair() -> None:
    rows_FD = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True)
    i_M, j_M = match_pairs(unit_FD @ unit_FD.T, 0.9)
    named = torch.cat([i_M, j_M]).tolist()
    assert len(named) == len(set(named)) > 20
    free_FD = unit_FD[[n for n in range(60) if n not in named]]
    assert ((free_FD @ free_FD.T).triu(1) <= 0.9).all()


def merging(**options: str) -> tuple[SAE, MergeSimilar, Step]:
    """Rows 0 and 1 have cosine 0.96. Rows 2 and 3 are orthogonal to them and to each other."""
    settings = {"on": "decoder", "average": "all", "weights": "equal", "partner": "recycle", **options}
    sae = SAE(4, 4)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0, 0, 0], [0.96, 0.28, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]))
        sae.W_enc.copy_(torch.tensor([[1.0, 3, 0, 0], [0, 0, 2, 0], [5, 1, 0, 0], [0, 0, 0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    resample = ResampleByWindow(DeadLatents(4, 10), 4, until=100, below=0.01, stability="any")
    step = step_on(sae, torch.tensor([[0.0, 3, 4, 0]]))
    return sae, MergeSimilar(resample, above=0.9, every=4, **settings), step


def test_merged_latents_are_averaged_and_forgotten_and_the_partner_restarts() -> None:
    sae, merge, step = merging()
    merge.every_n_steps(step)
    assert sae.W_enc[:, 0].tolist() == [2.0, 0.0, 3.0, 0.0] and sae.b_enc.tolist() == [1.5, 0, 3, 4]
    sum_D = torch.tensor([1.96, 0.28, 0, 0])
    torch.testing.assert_close(sae.W_dec[0], sum_D / sum_D.norm())
    torch.testing.assert_close(sae.W_dec[1], torch.tensor([0, 0.6, 0.8, 0]))  # the direction of the only token
    for parameter, rest in ((sae.W_dec, (1,)), (sae.W_enc, (0,)), (sae.b_enc, ())):
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = step.optimizer.state[parameter][moment]
            assert (kept.sum(rest) if rest else kept).bool().tolist() == [False, False, True, True]
    assert merge.scalars()["merged"] == 1 and merge.resample.scalars()["resampled"] == 1
    assert sae.W_enc[:, 2:].tolist() == [[0, 0], [2, 0], [0, 0], [0, 1]]


def test_a_disabled_partner_stays_silent() -> None:
    sae, merge, step = merging(partner="disable")
    merge.every_n_steps(step)
    assert not sae.W_enc[:, 1].any() and sae.b_enc[1] == 0
    merge.resample.fired_WF.zero_()
    merge.resample.dead.since_F.fill_(10)
    merge.after_step(step)
    assert merge.resample.silent().tolist() == [True, False, True, True]
    assert merge.resample.dead.since_F.tolist() == [10, 0, 10, 10]
    sae.W_dec.data[1] = sae.W_dec.data[0]
    merge.every_n_steps(step)
    assert merge.merged == 1
    x_BD = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    sae.zero_grad()
    passed = sae(x_BD)
    (x_BD - passed.recon_BD).square().sum().backward()
    assert not passed.f_BF[:, 1].any() and not sae.W_enc.grad[:, 1].any() and sae.b_enc.grad[1] == 0


def test_merging_weighted_by_activity() -> None:
    """Latent 0 fired in three of four steps and latent 1 in one, so their weights are 3/4 and 1/4."""
    sae, merge, step = merging(weights="activity")
    merge.resample.fired_WF.copy_(torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1]]))
    merge.every_n_steps(step)
    assert sae.W_enc[:, 0].tolist() == [0.75 * 1 + 0.25 * 3, 0, 0.75 * 5 + 0.25 * 1, 0] and sae.b_enc[0] == 1.25


def test_the_average_of_two_latents_that_did_not_fire_is_the_second() -> None:
    """The first latent's weight is 0, not 0/0, so nothing becomes NaN."""
    sae, merge, step = merging(weights="activity")
    merge.resample.fired_WF.zero_()
    merge.every_n_steps(step)
    assert sae.W_enc[:, 0].tolist() == [3.0, 0.0, 1.0, 0.0] and sae.b_enc[0] == 2.0


def test_cosines_of_the_encoder_are_another_reading() -> None:
    """The columns (1, 0, 5, 0) and (3, 0, 1, 0) of W_enc have cosine 0.5, so nothing is merged."""
    sae, merge, step = merging(on="encoder")
    merge.every_n_steps(step)
    assert merge.merged == 0 and sae.b_enc.tolist() == [1, 2, 3, 4]


def test_the_printed_average_is_of_the_encoder_alone() -> None:
    """(7): W_enc,0 = ((1, 0, 5, 0) + (3, 0, 1, 0))/2; W_dec,0 and b_enc,0 stay. The partner is silenced."""
    sae, merge, step = merging(average="encoder", partner="disable")
    merge.every_n_steps(step)
    assert sae.W_enc[:, 0].tolist() == [2.0, 0.0, 3.0, 0.0] and sae.b_enc.tolist() == [1.0, 0.0, 3.0, 4.0]
    assert sae.W_dec[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert merge.merged == 1 and merge.resample.restarts == 0


def test_nothing_is_merged_after_the_last_restart() -> None:
    sae, merge, step = merging()
    merge.resample.until = 4
    before = sae.W_enc.detach().clone()
    step.i = torch.tensor(5)
    merge.every_n_steps(step)
    assert merge.merged == 0 and torch.equal(sae.W_enc, before)
    step.i = torch.tensor(4)
    merge.every_n_steps(step)
    assert merge.merged == 1 and not torch.equal(sae.W_enc, before)


def test_a_disabled_partner_stays_silent_under_weight_decay_and_momentum() -> None:
    """While a built variant trains, the weights of a disabled latent stay zero, and it is never resampled."""
    options = {"merge_partner": "disable", "merge_every": 2, "window": 2, "weight_decay": 0.1, "warmup": 0, "lr": 0.01}
    variant = build("hierarchical", d_sae=16, steps=20, **options)
    variant.sae.W_dec.data[8:] = variant.sae.W_dec.data[:8]
    trainer = Trainer(variant, 20, "cpu")
    for i in range(12):
        trainer.run_periodic(i, trainer.step(rows(i)))
    (merge,) = (m for m in variant.mechanisms if isinstance(m, MergeSimilar))
    disabled_F = merge.disabled_F
    assert 8 <= int(merge.merged) == int(disabled_F.sum()) < 16
    assert not variant.sae.W_enc[:, disabled_F].any() and not variant.sae.b_enc[disabled_F].any()
    assert variant.sae.W_enc[:, ~disabled_F].any(0).all()
