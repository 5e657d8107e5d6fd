"""Paper 004: schedule, resampling, window, modulation and merging, by hand-worked numbers."""

import math

import pytest
import torch

from sae.common.errors import UsageError
from sae.train.activation_functions import BatchTopK, TopK
from sae.train.loop import Trainer
from sae.train.mechanisms import DeadLatents, ResampleDead
from sae.train.recipe import find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant
from sae.train.variants.hierarchical import AdaptivePenalty, MergeSimilar, ResampleByWindow, match_pairs

LADDER = [
    "hierarchical-linear",
    "hierarchical-resample",
    "hierarchical-window",
    "hierarchical-adaptive",
    "hierarchical",
]


def step_on(sae: SAE, x_BD: torch.Tensor, i: int = 0) -> Step:
    """A forward pass, with Adam moments of one everywhere."""
    optimizer = torch.optim.AdamW(sae.parameters())
    for parameter in sae.parameters():
        optimizer.state[parameter] = {name: torch.ones_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter]["step"] = torch.ones(())
    with torch.no_grad():
        return Step(torch.tensor(i), sae, optimizer, x_BD, *sae(x_BD))


def firing(f_BF: torch.Tensor, i: int) -> Step:
    """A step with these latents. Its pre-activations are NaN, so that nothing can read them instead."""
    sae = SAE(1, f_BF.shape[1])
    x_BD, pre_BF = torch.zeros(len(f_BF), 1), torch.full_like(f_BF, torch.nan)
    return Step(torch.tensor(i), sae, torch.optim.AdamW(sae.parameters()), x_BD, pre_BF, f_BF, x_BD)


def build(name: str, d_in: int = 32, d_sae: int = 64, steps: int = 1000, **options: object) -> Variant:
    torch.manual_seed(0)
    return find_recipe(name).make(RunConfig(d_in, d_sae, steps, 64), options)


def rows(seed: int, count: int = 64) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5


# (3)


def test_lambda_falls_from_its_width_to_zero() -> None:
    with torch.device("meta"):
        variant = find_recipe("hierarchical-linear").make(RunConfig(2304, 2304, 4882, 2048), {})
    f_BF = torch.zeros(1, 4)
    values = [float(variant.coefficients["l1"](firing(f_BF, i))) for i in (0, 2441, 4881, 4882)]
    assert values == pytest.approx([0.0208333, 0.0104167, 0.0208333 / 4882, 0.0], abs=1e-6)


def test_lambda_is_logged_and_its_ends_are_options() -> None:
    variant = build("hierarchical-linear", l1=0.5, l1_end=0.1)
    step = firing(torch.zeros(1, 64), 500)
    assert float(variant.coefficients["l1"](step)) == pytest.approx(0.3)
    assert step.metrics["lambda"].item() == pytest.approx(0.3)


# Resampling


def reconstructing() -> tuple[SAE, torch.Tensor]:
    """Latents 0 and 1 rebuild the first two tokens; the third, (0, 0, 3, 4), is not rebuilt at all."""
    sae = SAE(4, 3, pre_bias=False)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3, 4))
        sae.W_enc.copy_(torch.eye(3, 4).T)
        sae.W_enc[2, 2] = 0
        sae.W_enc[0, 0], sae.W_enc[1, 1] = 1.0, 1.0
        sae.b_enc[2] = -7.0
    return sae, torch.tensor([[1.0, 0, 0, 0], [0.0, 2, 0, 0], [0.0, 0, 3, 4]])


def test_a_dead_latent_restarts_on_the_worst_token() -> None:
    """v = (0, 0, 3, 4), |v| = 5; the others' encoders have norm 1 and 3, 0.2 of their mean is 0.4."""
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
    """Losses 1 and 2, so chances 1/5 and 4/5; 500 draws have a standard deviation of 9."""
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
    """p < 0.01 over 100 steps says: silent for 100 steps. The window is full of firing at first."""
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
    """Two steps of four tokens: latent 0 fires on 1 and 2 of them, 3/8; latent 1 on 0 and 1, 1/8."""
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


# (5)


def modulated(reading: str, error_BD: torch.Tensor, x_BD: torch.Tensor, scale: float = 1.0) -> float:
    modulate = AdaptivePenalty(lambda: torch.tensor(scale), reading, 2.5, 0.1, 2.0, 0.0)
    step = Step(torch.tensor(0), SAE(x_BD.shape[1], 1), None, x_BD, None, None, x_BD - error_BD)
    modulate.after_step(step)
    assert modulate.scalars()["alpha"] == modulate(step)
    return float(modulate(step))


@pytest.mark.parametrize(("loss", "alpha"), [(2.66, 0.9398), (4.69, 0.5330), (4668.0, 0.1), (1.0, 2.0)])
def test_alpha_by_loss(loss: float, alpha: float) -> None:
    x_BD = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    error_BD = torch.full_like(x_BD, math.sqrt(loss))
    assert modulated("mean", error_BD, x_BD) == pytest.approx(alpha, abs=5e-5)
    assert modulated("sum", error_BD / 8**0.5, x_BD) == pytest.approx(alpha, abs=5e-5)
    assert modulated("mean", error_BD / 10, x_BD / 10, scale=10.0) == pytest.approx(alpha, abs=5e-5)


def test_the_target_of_alpha_scales_with_the_variance_unless_given_or_paper_exact() -> None:
    """A cache of a quarter of the variance has a quarter of the error at the same share, and alpha is the same."""
    make, run = find_recipe("hierarchical").make, RunConfig(32, 64, 20, 64, variance=6.0)

    def target(run: RunConfig, **options: object) -> float:
        return next(m.target for m in make(run, options).mechanisms if isinstance(m, AdaptivePenalty))

    assert target(run) == pytest.approx(2.5 / 4)
    assert target(run, target=2.0) == 2.0
    assert target(run._replace(paper_exact=True)) == target(run._replace(variance=None)) == 2.5


def test_alpha_of_an_average() -> None:
    """Losses 2 and 4 with ema 0.75: 2, then 0.75 * 2 + 0.25 * 4 = 2.5."""
    modulate = AdaptivePenalty(lambda: torch.ones(()), "mean", 2.5, 0.1, 2.0, 0.75)
    x_BD = torch.zeros(2, 3)
    for i, (loss, alpha) in enumerate(((2.0, 1.25), (4.0, 1.0))):
        step = Step(torch.tensor(i), SAE(3, 1), None, x_BD, None, None, x_BD + math.sqrt(loss))
        assert float(modulate(step)) == pytest.approx(alpha)
        modulate.after_step(step)


def test_the_penalty_is_lambda_alpha_l1_without_a_gradient_through_alpha() -> None:
    variant = build("hierarchical-adaptive", recon_in_alpha="mean", target=1e-3, alpha_low=0.0)
    step = variant(torch.tensor(500), rows(0), torch.optim.AdamW(variant.parameters()))
    alpha = 1e-3 / step.error_BD.detach().square().mean()
    variant.losses(step)["l1"].backward()
    got = variant.sae.W_enc.grad.clone()
    variant.zero_grad()
    step = variant(torch.tensor(500), rows(0), torch.optim.AdamW(variant.parameters()))
    (0.5 * 32**-0.5 * alpha * step.f_BF.sum(1).mean()).backward()
    torch.testing.assert_close(got, variant.sae.W_enc.grad)
    assert variant.sae.W_dec.grad is None


# (7)


def test_a_merge_is_a_matching_of_the_most_similar() -> None:
    """0-1 at 0.95 yields to 1-2 at 0.99; 0 is left alone though 0-2 is at 0.92; 3-4 is apart from them."""
    cosine_FF = torch.eye(5)
    for i, j, value in ((0, 1, 0.95), (1, 2, 0.99), (0, 2, 0.92), (3, 4, 0.91), (0, 3, 0.5)):
        cosine_FF[i, j] = cosine_FF[j, i] = value
    i_M, j_M = match_pairs(cosine_FF, 0.9)
    assert list(zip(i_M.tolist(), j_M.tolist(), strict=True)) == [(1, 2), (3, 4)]


def test_a_matching_names_no_latent_twice_and_leaves_no_pair() -> None:
    rows_FD = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True)
    i_M, j_M = match_pairs(unit_FD @ unit_FD.T, 0.9)
    named = torch.cat([i_M, j_M]).tolist()
    assert len(named) == len(set(named)) > 20
    free_FD = unit_FD[[n for n in range(60) if n not in named]]
    assert ((free_FD @ free_FD.T).triu(1) <= 0.9).all()


def merging(**options: str) -> tuple[SAE, MergeSimilar, Step]:
    """Rows 0 and 1 at cosine 0.96, rows 2 and 3 at right angles to them."""
    settings = {"on": "decoder", "weights": "equal", "partner": "recycle", **options}
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
    torch.testing.assert_close(sae.W_dec[1], torch.tensor([0, 0.6, 0.8, 0]))  # the only token
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
    """Latent 0 fired in three of four steps, latent 1 in one: shares 3/4 and 1/4."""
    sae, merge, step = merging(weights="activity")
    merge.resample.fired_WF.copy_(torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1]]))
    merge.every_n_steps(step)
    assert sae.W_enc[:, 0].tolist() == [0.75 * 1 + 0.25 * 3, 0, 0.75 * 5 + 0.25 * 1, 0] and sae.b_enc[0] == 1.25


def test_cosines_of_the_encoder_are_another_reading() -> None:
    """Columns (1, 0, 5, 0) and (3, 0, 1, 0) of W_enc are at 0.5, so nothing is merged."""
    sae, merge, step = merging(on="encoder")
    merge.every_n_steps(step)
    assert merge.merged == 0 and sae.b_enc.tolist() == [1, 2, 3, 4]


# The recipes


def test_each_ablation_adds_one_part() -> None:
    def parts(name: str) -> set[str]:
        return {type(mechanism).__name__ for mechanism in build(name).mechanisms} - {"DeadLatents", "UnitNormDecoder"}

    linear, resample, window, adaptive, full = (parts(name) for name in LADDER)
    assert linear == set() and resample == {"ResampleDead"} and window == {"ResampleByWindow"}
    assert adaptive == window | {"AdaptivePenalty"} and full == adaptive | {"MergeSimilar"}


def test_baselines_keep_the_same_share_of_the_width() -> None:
    """k = 320 of 2304 is 32 of 230; all are trained alike."""
    topk, batchtopk = build("hierarchical-topk320", d_in=230), build("hierarchical-batchtopk", d_in=2304, d_sae=2304)
    assert [a.k for a in topk.sae.modules() if isinstance(a, TopK)] == [32]
    assert [a.k for a in batchtopk.sae.modules() if isinstance(a, BatchTopK)] == [320]
    assert [a.k for a in build("hierarchical-topk320", k=7).sae.modules() if isinstance(a, TopK)] == [7]
    for name in ("hierarchical-topk320", "hierarchical-batchtopk", "hierarchical-l1", *LADDER):
        how = build(name).optimization
        assert (how.lr, how.weight_decay, how.clip) == (3e-4, 0.01, 1.0), name


def test_a_collapsed_dictionary_is_merged_and_comes_back() -> None:
    """All latents start as copies of sixteen: merging and restarting separates them, and rows stay unit."""
    variant = build("hierarchical", d_sae=32, steps=40, window=4, merge_every=4, lr=1e-2, warmup=0)
    variant.sae.W_dec.data[16:] = variant.sae.W_dec.data[:16]
    trainer = Trainer(variant, 40, "cpu")
    for i in range(20):
        trainer.run_periodic(i, trainer.step(rows(i)))
    cosine_FF = variant.sae.W_dec @ variant.sae.W_dec.T
    assert trainer.pop_metrics()["merged"] >= 16
    assert (cosine_FF.triu(1) <= 0.9).all()
    assert (cosine_FF.diagonal() - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("hierarchical", {"merge_partner": "drop"}, "merge_partner=drop is unknown: expected one of recycle, disable"),
        ("hierarchical", {"recon_in_alpha": "max"}, "recon_in_alpha=max is unknown: expected one of mean, sum"),
        ("hierarchical-adaptive", {"merge_above": 0.8}, "hierarchical-adaptive has no option merge_above"),
        ("hierarchical", {"window": 0}, "invalid window=0: expected 1 step or more"),
        ("hierarchical-linear", {"window": 50}, "hierarchical-linear has no option window"),
    ],
)
def test_invalid_options_raise_a_usage_error(name: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_recipe(name).make(RunConfig(32, 64, 100, 64), given)
