"""The recipes of paper 001: their losses, readings, ablations and invalid options."""

import math
from dataclasses import replace

import pytest
import torch

from sae.common.errors import UsageError
from sae.evaluate.papers.parse import load_paper
from sae.train.activation_functions import Activation, ReLU
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig, Variant
from sae.train.variants.progressive.competition import CompetitionTemperature, SoftCompetition
from sae.train.variants.progressive.growth import EnabledLatents, EnabledUtilization, GrowCapacity


def rows(seed: int, count: int = 64) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5


def test_annealing_ends_at_the_base_after_its_steps(step_of) -> None:
    variant = find_recipe("progressive").make(
        RunConfig(32, 64, 5000, 64), {"anneal_steps": 2000, "competition": "softmax"}
    )
    (temper,) = (m for m in variant.mechanisms if isinstance(m, CompetitionTemperature))
    f_BF = torch.zeros(1, 64)
    bases = [float(temper.base(step_of(f_BF, i))) for i in (0, 1000, 2000, 4000)]
    assert bases == pytest.approx([0.3, 0.2, 0.1, 0.1])
    assert temper.competition.T.item() == pytest.approx(0.3)


def loss_terms(**options: object) -> dict[str, float]:
    torch.manual_seed(0)
    variant = find_recipe("progressive").make(RunConfig(32, 64, 100, 64), options)
    sae = variant.sae
    optimizer = torch.optim.AdamW(sae.parameters())
    return {name: value.item() for name, value in variant.losses(variant(torch.tensor(0), rows(0), optimizer)).items()}


def test_readings_of_the_penalty() -> None:
    alpha, z, both = (loss_terms(l1_on=on) for on in ("alpha", "z", "both"))
    assert both == {**alpha, **z} and set(alpha) == {"mse", "l1"} and set(z) == {"mse", "l1_z"}
    assert z["l1_z"] > alpha["l1"] > 0


def test_competition_outside_the_reconstruction_is_only_penalised() -> None:
    beside, off, inside = loss_terms(competition_in_recon=False), loss_terms(competition="off"), loss_terms()
    assert beside["mse"] == off["mse"] != inside["mse"]
    assert beside["l1"] == inside["l1"] < off["l1"]


def test_a_mean_over_d_in_weighs_the_error_less() -> None:
    assert loss_terms(reconstruction="mean")["mse"] == pytest.approx(loss_terms()["mse"] / 32)


def test_ablations_remove_what_they_name() -> None:
    def parts(name: str, *kinds: type) -> list[torch.nn.Module]:
        return [m for m in find_recipe(name).make(RunConfig(32, 64, 100, 64), {}).modules() if isinstance(m, kinds)]

    assert parts("progressive-all-at-once", EnabledLatents)[0].on_F.all() and parts(
        "progressive-all-at-once", SoftCompetition
    )
    assert not parts("progressive", EnabledLatents)[0].on_F.all()
    assert [g.hybrid for g in parts("progressive-fixed-increment", GrowCapacity)] == [False]
    assert [u.beta for u in parts("progressive-no-ema", EnabledUtilization)] == [0.0]
    assert not parts("progressive-no-competition", SoftCompetition, CompetitionTemperature) and parts(
        "progressive-no-competition", GrowCapacity
    )
    assert [type(m) for m in parts("progressive-baseline", Activation)] == [ReLU]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("progressive", {"competition": "max"}, "competition=max is unknown: expected one of softmax_peak, softmax"),
        ("progressive", {"start": 0.0}, "invalid start=0: expected a share of the latents"),
        ("progressive", {"interval": 0}, "invalid interval=0: expected 1 step or more"),
        ("progressive", {"utilization": "median"}, "utilization=median is unknown"),
        ("progressive-no-competition", {"temperature": 0.2}, "progressive-no-competition has no option temperature"),
        ("progressive-no-ema", {"beta": 0.5}, "progressive-no-ema has no option beta"),
    ],
)
def test_invalid_options_raise_a_usage_error(name: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_recipe(name).make(RunConfig(32, 64, 100, 64), given)


# --- the paper's readings -----------------------------------------------------------------------------------------


def paper_variant(reading: str, recipe: str = "progressive", **given: object) -> Variant:
    """The variant that `sae reproduce 001 --reading ...` trains, at width 32."""
    paper = load_paper("001")
    (chosen,) = (one for one in paper.readings if one.name == reading)
    known = find_recipe(recipe).option_types()
    options = {name: value for name, value in chosen.options.items() if name in known}
    torch.manual_seed(0)
    config = RunConfig(32, 32, 4882, 64, paper_exact=chosen.literal)
    return find_recipe(recipe).make(config, paper.setup.optimization() | options | given)


def parts(variant: Variant, kind: type) -> list[torch.nn.Module]:
    return [module for module in variant.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("reading", ["evidence", "literal"])
def test_the_papers_readings_are_its_equations(reading: str) -> None:
    """alpha is (5) over the enabled latents, rho is (3), n grows by (4), and T is annealed and follows (6)."""
    variant = paper_variant(reading)
    (enabled,), (use,), (grow,) = (parts(variant, k) for k in (EnabledLatents, EnabledUtilization, GrowCapacity))
    (competition,), (temper,) = parts(variant, SoftCompetition), parts(variant, CompetitionTemperature)
    competition.T.fill_(0.7)
    step = variant(torch.tensor(0), 3 * rows(0) + 1, torch.optim.AdamW(variant.parameters()))
    z_BF = step.pre_BF.relu()
    e_BF = (z_BF / 0.7).exp() * enabled.on_F
    torch.testing.assert_close(step.f_BF, e_BF / e_BF.sum(1, keepdim=True) * z_BF)
    assert enabled.on_F.sum() == 8 and (step.f_BF > 0).sum() == (z_BF[:, :8] > 0).sum() > 0  # nothing is cut
    use.after_step(step)
    v_F = 0.1 * (step.f_BF > 0.01).float().mean(0)
    assert use.rho.item() == pytest.approx(v_F.sum().item() / 8)
    assert grow.interval == 1 and grow.pace == 1 and grow.n_ref == 32
    before, rho = competition.T.item(), use.rho.item()
    temper.after_step(step)
    target = 0.3 * (1 + (math.exp(math.exp(rho) - 1) - 1) * 0.3)  # T_base starts at 0.3, the maximum of T
    assert target > 0.3 and competition.T.item() == pytest.approx(0.99 * before + 0.01 * 0.3)
    assert [float(temper.base(replace(step, i=torch.tensor(i)))) for i in (0, 1000, 2000, 4881)] == pytest.approx(
        [0.3, 0.2, 0.1, 0.1]
    )


def test_the_gradient_of_the_papers_readings_is_7() -> None:
    """(7) is dL/dz_i = sum_j dL/dalpha_j dalpha_j/dz_i + lambda sign(z_i).

    L is (2), so dL/dalpha_j contains lambda sign(alpha_j). With w the softmax of z/T, dalpha_j/dz_i is
    w_j delta_ij + w_j z_j (delta_ij - w_i)/T.
    """
    variant = paper_variant("literal")
    (competition,), (enabled,) = parts(variant, SoftCompetition), parts(variant, EnabledLatents)
    enabled.on_F.fill_(1)
    competition.T.fill_(0.6)
    step = variant(torch.tensor(0), rows(0, 5), torch.optim.AdamW(variant.parameters()))
    (found_BF,) = torch.autograd.grad(sum(variant.losses(step).values()), step.pre_BF)
    sae, T, lam = variant.sae, 0.6, 0.04
    for b in range(5):
        z_F = step.pre_BF[b].detach().relu()
        w_F = (z_F / T).softmax(0)
        error_D = w_F * z_F @ sae.W_dec + sae.b_dec - step.x_BD[b]
        to_alpha_F = 2 * sae.W_dec @ error_D + lam * (w_F * z_F > 0)
        jacobian_FF = torch.diag(w_F) + (w_F * z_F)[:, None] * (torch.eye(32) - w_F) / T
        expected_F = (to_alpha_F @ jacobian_FF + lam) * (z_F > 0)
        torch.testing.assert_close(5 * found_BF[b], expected_F.detach(), rtol=1e-4, atol=1e-5)


def test_the_two_readings_differ_in_their_units() -> None:
    literal, evidence = paper_variant("literal"), paper_variant("evidence")
    x_BD = 5 * rows(0) + 2
    normed_BD, raw_BD = literal.normalize(x_BD), evidence.normalize(x_BD)
    torch.testing.assert_close(normed_BD.norm(dim=1), torch.full((64,), 31**0.5), rtol=1e-4, atol=0)
    assert torch.equal(raw_BD, x_BD)
    for variant in (literal, evidence):  # both have the printed tau, T and lambda
        (use,), (temper,) = parts(variant, EnabledUtilization), parts(variant, CompetitionTemperature)
        assert (use.threshold, temper.low, temper.high, use.beta, temper.momentum) == (0.01, 0.05, 0.3, 0.9, 0.99)
        settings = variant.optimization
        assert (settings.lr, settings.warmup, settings.decay_start, settings.clip) == (3e-4, 1000, 1.0, None)
        assert (settings.weight_decay, settings.weight_decay_on, settings.b_dec_init) == (0.01, "all", "zero")
    error = {"sum": 1.0, "mean": 1 / 32}
    for variant, reading in ((literal, "sum"), (evidence, "mean")):
        assert float(variant.coefficients["mse"](None)) == error[reading]


@pytest.mark.parametrize("recipe", ["progressive", "progressive-baseline", "progressive-no-competition"])
def test_every_system_of_the_paper_starts_uniform(recipe: str) -> None:
    """W_enc is uniform in +-1/sqrt(d_in) and independent of W_dec, whose rows have norm 1. Biases are zero."""
    torch.manual_seed(0)
    sae = find_recipe(recipe).make(RunConfig(64, 256, 100, 64), {"init": "uniform"}).sae
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    assert W_enc.abs().max() <= 1 / 8 and W_enc.min() < -0.124 and W_enc.max() > 0.124
    assert W_enc.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)  # as for a uniform distribution
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(256))
    assert W_dec.abs().max() < 0.3  # normal rows would have elements above 0.4
    cosine_F = torch.nn.functional.cosine_similarity(W_enc.T, W_dec)
    assert abs(cosine_F.mean()) < 0.05
    assert not sae.b_enc.any() and not sae.b_dec.any()
    tied = find_recipe(recipe).make(RunConfig(64, 256, 100, 64), {}).sae
    assert torch.equal(tied.W_enc, tied.W_dec.T)


def test_the_papers_systems_are_started_so_by_its_readings() -> None:
    for reading in ("evidence", "literal"):
        for recipe in ("progressive", "progressive-baseline", "progressive-all-at-once", "progressive-no-competition"):
            sae = paper_variant(reading, recipe).sae
            assert sae.W_enc.abs().max() <= 32**-0.5 and not torch.equal(sae.W_enc, sae.W_dec.T)
            assert not sae.pre_bias  # E(x) = ReLU(W_e x + b_e), section 2.1


def test_each_system_has_the_counter_that_its_ablation_lacks() -> None:
    """After the same steps, a system's counter is positive, and it is zero or absent in the system it adds to."""
    systems = load_paper("001").systems

    def scalars(system: str) -> dict[str, float]:
        torch.manual_seed(0)
        (recipe,) = systems[system].recipes
        variant = find_recipe(recipe).make(RunConfig(32, 64, 20, 64), {"lr": 1e-2, "warmup": 0})
        trainer = Trainer(variant, 20, "cpu")
        for i in range(6):
            trainer.run_periodic(i, trainer.step(3 * rows(i, 4)))  # few tokens, so not every latent fires
        return trainer.pop_metrics()

    checked = [system for system in systems.values() if system.counter]
    assert {system.counter for system in checked} == {"competed", "grown", "adapted", "smoothed"}
    for system in checked:
        assert scalars(system.id)[system.counter] > 0, system.id
        assert not scalars(system.adds_to).get(system.counter), system.id
