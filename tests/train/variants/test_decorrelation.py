"""Paper 003: the decorrelation loss agrees with its definition, and the recipe builds what the readings say."""

import pytest
import torch

from sae.common.errors import UsageError
from sae.evaluate.papers.parse import load_paper
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant
from sae.train.variants.decorrelation import Decorrelation

CONFIG = RunConfig(d_in=6, d_sae=24, steps=80, batch_size=40)


def decorrelation_reference(f_BF: torch.Tensor, fraction: float, tau_over: str = "alive"):
    """(2) to (4) in float64 with loops over pairs and a full sort: R, mean, tau, and the number of pairs above tau."""
    n = f_BF.shape[1]
    alive = [i for i in range(n) if f_BF[:, i].any()]
    pairs = [(f_BF[:, i] @ f_BF[:, j]) / (f_BF[:, i].norm() * f_BF[:, j].norm()) for i in alive for j in alive if i < j]
    values = torch.stack(pairs).detach()
    if tau_over == "all":
        values = torch.cat([values, torch.zeros(n * (n - 1) // 2 - len(values))])
    mean = float(values.mean())
    tau = mean + float(values.std(correction=0))
    chosen = max(1, round(fraction * n * (n - 1) / 2))
    largest = sorted(pairs, key=lambda c: c.item(), reverse=True)[:chosen]
    over = [c - tau for c in largest if c.item() > max(tau, 0)]
    return sum(over) / chosen, mean, tau, len(over)


def step_with(f_BF: torch.Tensor) -> Step:
    """A step in which all tensors but the latents are NaN, so a result that depends on them would be NaN."""
    nan_BF = torch.full_like(f_BF, torch.nan)
    return Step(torch.tensor(0), None, None, nan_BF, nan_BF, f_BF, nan_BF)


def sparse_latents() -> torch.Tensor:
    """(40, 24) in float64 with columns of unequal norm; three latents are silent."""
    torch.manual_seed(0)
    f_BF = (torch.randn(40, 24) * (torch.rand(40, 24) < 0.3)).relu().double() * torch.linspace(0.1, 5, 24)
    f_BF[:, [0, 5, 23]] = 0
    return f_BF


@pytest.mark.parametrize("pair_choice", ["exact", "blocks"])  # all latents fit into one block
@pytest.mark.parametrize("tau_over", ["alive", "all"])
@pytest.mark.parametrize("fraction", [0.002, 0.01, 0.1, 0.5, 1.0])
def test_decorrelation_is_its_definition(fraction: float, tau_over: str, pair_choice: str) -> None:
    """Value, statistics and gradient agree. Some latents are silent: at fraction 1, fewer pairs fire than it allows."""
    exact_BF = sparse_latents().requires_grad_()
    value, mean, tau, over = decorrelation_reference(exact_BF, fraction, tau_over)
    value.backward()
    latents_BF = sparse_latents().float().requires_grad_()
    step = step_with(latents_BF)
    found = Decorrelation(fraction, tau_over, pair_choice)(step)
    found.backward()
    assert over > 0 and int(step.metrics["pairs_over_tau"]) == over
    assert float(step.metrics["mean_correlation"]) == pytest.approx(mean, rel=1e-4)
    assert float(step.metrics["tau"]) == pytest.approx(tau, rel=1e-4)
    assert float(step.metrics["sd_correlation"]) == pytest.approx(tau - mean, rel=1e-4)  # the reference's sd
    assert found.item() == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(latents_BF.grad.double(), exact_BF.grad, rtol=1e-3, atol=1e-6)
    assert not latents_BF.grad[:, [0, 5, 23]].any()


def test_decorrelation_of_four_latents_worked_by_hand() -> None:
    """f_1 = (1, 1), f_2 = (1, 0), f_3 = (0, 2), f_4 = 0: C_12 = C_13 = 1/sqrt 2, C_23 = 0.

    Over the three pairs that fire: mean .4714, sd .3333, and no pair exceeds tau = .8047. Over all six pairs: mean
    .2357, sd .3333, tau .5690, and R = ((.7071 - .5690) + (.7071 - .5690))/3 with the three largest pairs.
    """
    f_BF = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0]])
    for tau_over, tau, value, over in (("alive", 0.8047, 0.0, 0), ("all", 0.5690, 0.0921, 2)):
        step = step_with(f_BF)
        assert float(Decorrelation(0.5, tau_over)(step)) == pytest.approx(value, abs=1e-4)
        assert float(step.metrics["tau"]) == pytest.approx(tau, abs=1e-4)
        assert int(step.metrics["pairs_over_tau"]) == over


@pytest.mark.parametrize("pair_choice", ["exact", "blocks"])
def test_correlations_do_not_depend_on_the_size_of_latents(pair_choice: str) -> None:
    sizes_F = torch.logspace(-5, 3, 24)
    loss = Decorrelation(0.1, pair_choice=pair_choice)
    values = [float(loss(step_with(sparse_latents().float() * size))) for size in (1, sizes_F)]
    assert values[0] > 0 and values[1] == pytest.approx(values[0], rel=1e-4)


def test_the_mean_is_over_the_chosen_pairs_whether_they_exceed_tau_or_not() -> None:
    """Two of 24 latents are equal, and all other pairs have correlation 1/2. Of eight chosen pairs, one exceeds tau."""
    f_BF = torch.cat([torch.ones(1, 24), torch.eye(24)])
    f_BF[:, 1] = f_BF[:, 0]
    exact_BF = f_BF.double().requires_grad_()
    value, _, tau, over = decorrelation_reference(exact_BF, 8 / 276)
    value.backward()
    latents_BF = f_BF.requires_grad_()
    step = step_with(latents_BF)
    found = Decorrelation(8 / 276)(step)
    found.backward()
    assert over == int(step.metrics["pairs_over_tau"]) == 1
    assert found.item() == pytest.approx((1 - tau) / 8, rel=1e-4) == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(latents_BF.grad.double(), exact_BF.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pair_choice", ["exact", "blocks"])
@pytest.mark.parametrize("tau_over", ["alive", "all"])
def test_decorrelation_of_silence_is_zero(tau_over: str, pair_choice: str) -> None:
    latents_BF = torch.zeros(8, 6, requires_grad=True)
    step = step_with(latents_BF)
    value = Decorrelation(0.5, tau_over, pair_choice, block=2)(step)
    value.backward()
    assert value.item() == 0 and not latents_BF.grad.any() and not step.metrics["pairs_over_tau"].any()


@pytest.mark.parametrize("pair_choice", ["exact", "blocks"])
@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_correlations_are_computed_in_float32(fraction: float, pair_choice: str) -> None:
    """This also holds for latents in bfloat16, which a GPU's autocast gives."""
    rounded_BF = sparse_latents().bfloat16()
    exact = decorrelation_reference(rounded_BF.double(), fraction)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        found = Decorrelation(fraction, pair_choice=pair_choice)(step_with(rounded_BF))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact, rel=1e-4)


def built(name: str = "decorrelation", **options: object) -> Trainer:
    """A trainer of a recipe, with random encoder biases."""
    torch.manual_seed(0)
    variant = find_recipe(name).make(CONFIG, options)
    variant.set_normalization(torch.linspace(-1, 2, 6), 30.0)
    variant.sae.b_enc.data.uniform_(-0.3, 0.1)
    return Trainer(variant, CONFIG.steps, "cpu")


def batch(number: int) -> torch.Tensor:
    return 2 * torch.randn(40, 6, generator=torch.Generator().manual_seed(number)) + torch.linspace(-1, 2, 6)


def exact_loss(variant: Variant, x_BD: torch.Tensor, fraction: float, strength: float, l1: float):
    """The loss (1) in float64, the weights from which it is computed, and the number of pairs above tau."""
    weights = {name: value.detach().double().requires_grad_() for name, value in variant.sae.named_parameters()}
    x_BD = x_BD.double() / 30**0.5
    f_BF = (x_BD @ weights["W_enc"] + weights["b_enc"]).relu()
    error_BD = x_BD - f_BF @ weights["W_dec"] - weights["b_dec"]
    penalty, _, _, over = decorrelation_reference(f_BF, fraction)
    return error_BD.square().sum(1).mean() + l1 * f_BF.sum(1).mean() + strength * penalty, weights, over


@pytest.mark.parametrize("pair_choice", ["exact", "blocks"])
@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_the_built_variant_minimizes_equation_1(fraction: float, pair_choice: str) -> None:
    """Loss and gradients agree in the third of four steps of L1 warm-up, and the counter agrees over several steps."""
    trainer = built(fraction=fraction, strength=0.7, l1=0.08, l1_warmup=4, pair_choice=pair_choice)
    trainer.i.fill_(2)
    step, losses = trainer.forward_losses(batch(0))
    loss, weights, over = exact_loss(trainer.variant, batch(0), fraction, strength=0.7, l1=0.06)
    loss.backward()
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.item() == pytest.approx(loss.item(), rel=1e-5) and losses["decorrelation"].item() > 0
    for name, parameter in trainer.variant.sae.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, rtol=1e-3, atol=1e-6)

    trainer.optimizer.zero_grad()
    expected = 0
    for number in range(3):
        expected += exact_loss(trainer.variant, batch(number), fraction, 0, 0)[2]
        trainer.step(batch(number))
    metrics = trainer.pop_metrics()
    assert metrics["penalized_pairs"] == expected > over
    assert metrics["pairs_over_tau"] == pytest.approx(expected / 3)


def test_without_strength_it_is_the_system_that_it_adds_to() -> None:
    """With strength 0, the weights equal those of `relu` without a pre-bias, bit for bit."""
    ours, plain, penalized = built(strength=0.0), built("relu", pre_bias=False), built(fraction=0.1)
    for trainer in (ours, plain, penalized):
        for number in range(4):
            trainer.step(batch(number))
    for name, weight in plain.variant.sae.named_parameters():
        assert torch.equal(weight, dict(ours.variant.sae.named_parameters())[name])
        assert not torch.equal(weight, dict(penalized.variant.sae.named_parameters())[name])


def test_its_defaults() -> None:
    """The paper prints them, except the strength, the L1 warm-up, tau over the latents that fire, and the blocks."""
    recipe = find_recipe("decorrelation")
    assert recipe.width == 1 and recipe.batch_size == 2048
    assert dict(recipe.options) == {
        "strength": 0.1, "fraction": 0.001, "l1": 0.04, "l1_warmup": None, "pre_bias": False, "tau_over": "alive",
        "pair_choice": "blocks", "block": 256,
    }  # fmt: skip
    variant = recipe.make(CONFIG, {})
    term = variant.terms["decorrelation"]
    assert (term.fraction, term.tau_over, term.pair_choice, term.block) == (0.001, "alive", "blocks", 256)
    assert [float(variant.coefficients[name](step_with(torch.zeros(1, 24)))) for name in ("decorrelation", "l1")] == [
        0.1, pytest.approx(0.04 / 4),
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.5}, {"tau_over": "some"}, {"block": 1}])
def test_options_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(
        UsageError, match="invalid fraction=|invalid block=1: exp|tau_over=some is unknown: expected one of alive, all"
    ):
        find_recipe("decorrelation").make(CONFIG, options)


def test_as_printed_trains_what_the_paper_prints() -> None:
    """Both systems have raw input, no pre-bias, the full L1 penalty from the first step, and tau over all pairs."""
    paper = load_paper("003")
    (reading,) = (one for one in paper.readings if one.name == "literal")
    for system in paper.systems.values():
        (recipe,) = map(find_recipe, system.recipes)
        options = {n: v for n, v in {**reading.options, **system.options}.items() if n in recipe.option_types()}
        variant = recipe.make(CONFIG, options)
        assert variant.optimization.normalize == "none" and not variant.sae.pre_bias and variant.optimization.lr == 3e-4
        assert float(variant.coefficients["l1"](step_with(torch.zeros(1, 24)))) == pytest.approx(0.04)
        if "decorrelation" in variant.terms:
            assert variant.terms["decorrelation"].tau_over == "all"
            assert variant.terms["decorrelation"].pair_choice == "exact"
