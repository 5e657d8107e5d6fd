"""Paper 002: what its recipes build, and short training runs."""

import pytest
import torch

from sae.common.errors import UsageError
from sae.evaluate.papers.parse import load_paper
from sae.train.activation_functions import TopK
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig
from sae.train.variants.competition.pairs import MIN_RATE, DensePairs, PairTable
from sae.train.variants.competition.penalty import (
    CompetitionLoss,
    CompetitionMonitor,
    add_competition,
    competition_strength,
)
from sae.train.variants.competition.recipes import CompetitionOptions

from .latents import step_of

NAMES = ["competition", *(f"competition-{n}" for n in ("no-warmup", "off", "small", "k320", "baseline"))]


def test_the_printed_diagonal_leaves_a_unit_decoder_alone(make_trainer, take) -> None:
    """The diagonal adds n/k for each latent that fires. Its gradient is along the row, so the unit norm removes it."""
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
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=2e-3)  # five Adam steps of at most 3e-4 amplify rounding


@pytest.mark.parametrize(("name", "moves"), [("competition-off", False), ("competition-no-warmup", True)])
def test_the_built_variant_counts_only_what_has_a_strength(name: str, moves: bool, make_trainer, take) -> None:
    trainer = make_trainer(name, steps=12, k=6, tau=0.15)
    list(take(trainer, range(12)))
    metrics = trainer.pop_metrics()
    assert metrics["pairs_above"] > 0
    assert metrics["penalized"] == pytest.approx(moves * 12 * metrics["pairs_above"])


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
    """Competition can be added to matryoshka. Its statistics come before the unit norm, and pairs are penalized."""
    variant = make_variant("matryoshka", k=8)
    term = CompetitionLoss(PairTable(variant.sae.d_sae, 1000, every=2), 8 / variant.sae.d_sae, tau=0.2)
    add_competition(variant, competition_strength(0.03, 0), term)
    assert variant.mechanisms[len(variant.mechanisms) - 3] is term.pairs
    assert isinstance(variant.mechanisms[len(variant.mechanisms) - 2], CompetitionMonitor)
    trainer = Trainer(variant, 30, "cpu")
    list(take(trainer, range(6)))
    metrics = trainer.pop_metrics()
    assert metrics["pairs_above"] > 0 and metrics["competition"] > 0
    assert metrics["penalized"] == pytest.approx(6 * metrics["pairs_above"])  # `pairs_above` is a mean over six steps
    assert metrics["correlation_pairs"] >= 3 and 0 < abs(metrics["correlation_cosine"]) <= 1


@pytest.mark.parametrize(("turns", "share"), [(1, 0.8), (8, 0.9)])
def test_bound_directions_are_pushed_apart(make_trainer, take, turns: int, share: float) -> None:
    """From the same start, pairs above tau end less similar with the penalty than without it."""
    similar = []
    for strength in (0.0, 3.0):
        trainer = make_trainer(
            "competition", k=6, tau=0.15, strength=strength, strength_warmup=0, lr=3e-3, warmup=0,
            turns=turns,
        )  # fmt: skip
        list(take(trainer, range(30)))
        (store,) = [m for m in trainer.variant.mechanisms if isinstance(m, PairTable)]
        bound_P = store.conditional() >= 0.15
        similarity_P = store.inner(trainer.variant.sae.W_dec, trainer.variant.sae.W_dec).square()
        similar.append(similarity_P[bound_P].mean().item())
    assert similar[1] < share * similar[0]


def test_options_reach_the_built_variant() -> None:
    """The defaults are the printed constants, and options that differ from the defaults reach the built parts."""
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
        assert len(loss.pairs.first_P) == 16 * 18432 and loss.pairs.turns == 8
        other = find_recipe("competition").make(
            paper,
            {"tau": 0.5, "tau_on": "lift", "weight": "conditional", "pair_vec": "activation", "direction": "child_only",
             "reduction": "n", "target": "absorption", "beta": 0.9, "pairs": 3, "refresh": 7,
             "turns": 3},
        ).terms["competition"]  # fmt: skip
        assert other.tau == pytest.approx(0.5 * 100 / 18432) and other.unit == 1.0
        assert (other.pair_vec, other.direction, other.reduction) == ("activation", "child_only", "n")
        assert (other.target, other.pairs.beta, other.pairs.every) == ("absorption", 0.9, 7)
        assert other.pairs.turns == 3
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
    """(4) has a warm-up of 2,000 steps in runs of 4,882 or more, and the same share of a shorter run."""
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
    """The coefficients of (5) at the first of 4,882 steps. The only warm-up that the paper prints is t_w.

    `literal` sums over all i and j, as printed.
    """
    paper = load_paper("002")
    (chosen,) = (one for one in paper.readings if one.name == reading)
    config = RunConfig(128, 1024, 4882, 2048, paper_exact=chosen.literal)
    variant = find_recipe("competition").make(config, chosen.options)
    loss = variant.terms["competition"]
    k = 100 if chosen.literal else 6
    assert loss.tau == pytest.approx(0.6 if tau_on == "conditional" else 0.6 * k / 1024)
    assert (loss.reduction, type(loss.pairs), loss.diagonal) == (reduction, store, diagonal)
    assert loss.pairs.turns == 1  # every step compares the whole table
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
