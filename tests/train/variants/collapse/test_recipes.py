"""Paper 000: the parts that each run adds to the run before, counters, and invalid options."""

import math
import shutil
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sae.common.errors import UsageError
from sae.train.compile import compile_step
from sae.train.loop import Trainer
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig, Variant
from sae.train.variants.collapse.options import fewest_groups

RUNS = ["collapse-baseline", *[f"collapse-{number:02d}" for number in range(1, 11)]]


def parts(variant: Variant) -> list[str]:
    chain = [*variant.terms.values(), *variant.mechanisms, *variant.sae.activation]
    return sorted(type(part).__name__ for part in chain)


def test_each_run_adds_its_parts_to_the_run_before(build: Callable[..., Variant]) -> None:
    own = [
        ["Sketch", "UtilizationEMA"],
        ["ContrastLoss", "Totals"],
        ["DynamicL1"],
        ["DiversityLoss"],
        ["GroupOrthogonalityLoss"],
        ["GramSchmidt"],
        ["GroupUtilization"],
        ["GroupLearningRate"],
        ["Neighbours", "Totals", "WinnerTakeAll"],
        ["HardOrthogonality"],
    ]
    expected = ["DeadLatents", "L1", "MSE", "ReLU", "UnitNormDecoder"]
    assert parts(build(RUNS[0])) == expected
    for name, added in zip(RUNS[1:], own, strict=True):
        expected = sorted([*expected, *added])
        assert parts(build(name)) == expected
        assert RECIPES[name].options.items() > RECIPES[RUNS[RUNS.index(name) - 1]].options.items()


READINGS: list[tuple[str, dict]] = [
    ("collapse-10", {}),
    (
        "collapse-10",
        {"gs_axis": "activation_batch", "group_lr": "softmax", "l1_controller": "none", "contrast_cos": "jl"},
    ),
    ("collapse-10", {"batch_norm": "pre", "importance": "loss_ema", "gradient_balance": 1.0, "wta_scope": "global"}),
    ("collapse-10", {"gs_gradient": "through", "gs_order": "utilisation", "jl_on": "encoder", "contrast_cos": "jl"}),
    (
        "collapse-10",
        {"units": "as_printed", "l1_controller": "recon_ratio", "inhibition": "divisive", "near": "decoder"},
    ),
    ("collapse-09", {"units": "evidence", "loss_units": "raw", "jl_on": "activations", "contrast_cos": "exact"}),
    ("collapse-08", {"gs_axis": "jl", "jl_dim": 8, "group_stat": "max", "group_lr": "inverse", "pre_bias": True}),
    ("collapse-10", {"importance": "groups", "contrast_on": "activations", "orth_on": "activations"}),
]


@pytest.mark.parametrize("d_sae", [32, 64])
@pytest.mark.parametrize("name, options", [*[(name, {}) for name in RUNS[:-1]], *READINGS])
def test_every_option_trains_and_keeps_unit_rows(
    name: str, options: dict, d_sae: int, build: Callable[..., Variant], trained: Callable[..., Trainer]
) -> None:
    trainer = trained(build(name, d_sae=d_sae, **options), 5)
    metrics = trainer.pop_metrics()
    assert int(trainer.failed_at) == -1
    assert all(math.isfinite(value) for value in metrics.values())
    assert (trainer.variant.sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name, options", READINGS)
def test_no_option_reads_back_to_the_host(name: str, options: dict, build: Callable[..., Variant]) -> None:
    with FakeTensorMode():
        trainer = Trainer(build(name, **options), 20, "cpu")
        for _ in range(2):
            trainer.step(torch.randn(64, 32))


def test_each_part_logs_its_numbers(build: Callable[..., Variant], trained: Callable[..., Trainer]) -> None:
    metrics = trained(build("collapse-10"), 5).pop_metrics()
    assert {"utilisation", "tau", "alpha", "beta", "lambda", "group_utilisation_max", "group_rate_min",
            "sketch_mean_cosine", "neighbour_cosine"} <= metrics.keys()  # fmt: skip


def test_each_part_of_a_run_logs_whether_it_acted(
    build: Callable[..., Variant], trained: Callable[..., Trainer]
) -> None:
    """Counters add up all steps, here five steps of 64 tokens. The rows of each group start orthonormal."""
    options = {"importance": "groups", "tau_max": 0.0, "tau_min": 0.0, "gradient_balance": 1e-9, "alpha_warmup": 0}
    trainer = trained(build("collapse-10", near_scope="dictionary", hard_every=2, **options), 5)
    metrics = trainer.pop_metrics()
    assert metrics["penalty_moved"] == 4 and metrics["penalty_bounded"] == 0
    assert metrics["groups_skipped"] in range(5 * 7, 5 * 10)
    assert 0 < metrics["pairs_over_tau"] <= 5 * 16 * 6
    assert 5 * 2 < metrics["losses_balanced"] < 5 * 3  # three losses, one of which has no gradient at first
    assert 0 < metrics["rates_differed"] <= 5 * 16
    assert 0 < metrics["orthogonalized"] <= 3 * 48 and 0 < metrics["rows_projected"] <= 2 * 64
    assert 0 < metrics["inhibited"] <= 5 * 64 * 64 and 0 < metrics["outcompeted"] <= 5 * 64 * 48
    names = [name for name, _ in trainer.variant.named_buffers() if name.rpartition(".")[2].startswith("acted_")]
    assert len(names) == 10
    metrics = trained(build("collapse-06", gs_axis="activation_batch"), 5).pop_metrics()
    assert 0 < metrics["orthogonalized"] <= 5 * 62  # the first latent of each of two groups never changes


def test_counters_come_after_all_that_old_checkpoints_hold(build: Callable[..., Variant]) -> None:
    """Checkpoints name tensors by the index of their mechanism, so the indices of older mechanisms must not change."""
    for name in RUNS:
        kinds = [type(m).__name__ for m in build(name).mechanisms]
        first = kinds.index("Totals") if "Totals" in kinds else len(kinds) - 1
        assert set(kinds[first:]) <= {"Totals", "UnitNormDecoder"} and kinds[-1] == "UnitNormDecoder"


@pytest.mark.parametrize("name", RUNS)
def test_the_letter_has_what_sections_4_3_and_5_put_in_every_run(name: str, trained: Callable[..., Trainer]) -> None:
    torch.manual_seed(0)
    variant = find_recipe(name).make(RunConfig(32, 64, 20, 64, paper_exact=True), {"units": "as_printed"})
    kinds = parts(variant)
    assert {"BatchNorm", "RunningStatistics", "GroupSampling"} <= set(kinds)
    losses = {"contrast", "diversity", "orthogonality"} & set(variant.terms)
    assert kinds.count("BalancedLoss") == len(losses)
    trainer = trained(variant, 5)
    assert int(trainer.failed_at) == -1
    assert all(math.isfinite(value) for value in trainer.pop_metrics().values())


def test_the_letter_of_run_3_is_run_2(trained: Callable[..., Trainer]) -> None:
    """0.04 is always within the bounds, so lambda does not change, and `penalty_moved` is 0."""
    made = []
    for name in ("collapse-02", "collapse-03"):
        torch.manual_seed(0)
        made.append(trained(find_recipe(name).make(RunConfig(32, 64, 20, 64, paper_exact=True), {}), 8))
    assert all(torch.equal(a, b) for a, b in zip(*(t.variant.sae.parameters() for t in made), strict=True))
    assert made[1].pop_metrics()["penalty_moved"] == 0


def test_the_paper_budget_stays_inside_its_warm_up() -> None:
    how = find_recipe("collapse-10").make(RunConfig(32, 64, 800, 125), {"budget": "paper"}).optimization
    assert float(how.lr_at(torch.tensor(399), 800)) == pytest.approx(3e-4 * 400 / 1000)
    assert float(how.lr_at(torch.tensor(799), 800)) == pytest.approx(3e-4 * 800 / 1000)
    with pytest.raises(UsageError, match="10,000,000 tokens, which are 4882 steps of 2048"):
        find_recipe("collapse-04").make(RunConfig(32, 64, 800, 2048), {"budget": "matched"})


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("collapse-07", dict(groups=24), "64 latents cannot be divided into 24 equal groups"),
    ("collapse-07", dict(d_sae=16), "16 latents cannot be divided into 16 equal groups of two"),
    ("collapse-07", dict(d_in=16, groups=2), "give --set groups=4"),
    ("collapse-10", dict(d_in=8, groups=4, gs_axis="activation_batch"), "Hard orthogonality needs groups"),
    ("collapse-07", dict(gs_axis="jl", jl_dim=2), "groups of at most jl_dim = 2"),
    ("collapse-02", dict(contrast_cos="jl", jl_on="activations"), "give jl_on=decoder or encoder"),
    ("collapse-02", dict(contrast_cos="jl", contrast_on="activations"), "give contrast_cos=exact or exact_group"),
    ("collapse-01", dict(importance="groups", d_sae=40), "draws from 16 equal groups, but a dictionary of 40"),
    ("collapse-01", dict(importance_share=0.0), "invalid importance_share=0: expected a share"),
    ("collapse-01", dict(importance_share=1.5), "invalid importance_share=1.5: expected a share"),
    ("collapse-03", dict(l0=65), "invalid l0=65"),
    ("collapse-08", dict(group_lr="fast"), "group_lr=fast is unknown: expected one of softmax_mean1"),
    ("collapse-08", dict(gamma=0.1), "collapse-08 has no option gamma"),
    ("collapse-09", dict(wta_share=0.0), "invalid wta_share=0: expected a share of the latents"),
    ("collapse-10", dict(hard_every=0), "invalid hard_every=0: expected a positive number of steps"),
    ("collapse-01", dict(jl_dim=0), "invalid jl_dim=0: expected a positive number"),
]


@pytest.mark.parametrize("name, options, sentence", REFUSED)
def test_invalid_options_raise_a_usage_error(
    name: str, options: dict[str, object], sentence: str, build: Callable[..., Variant]
) -> None:
    with pytest.raises(UsageError, match=sentence):
        build(name, **options)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.parametrize("options", [{}, {"gs_axis": "activation_batch", "gradient_balance": None}])
def test_a_compiled_run_counts_like_an_eager_one(
    options: dict, build: Callable[..., Variant], compiled_by_one_thread: None
) -> None:
    """Activations keep their counts in attributes, which the compiled part of a step sets too."""
    counts = []
    for compiled in (False, True):
        trainer = Trainer(build("collapse-09", near_scope="dictionary", **options), 20, "cpu")
        if compiled:
            torch._dynamo.reset()
            assert compile_step(trainer, 64) is None
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            trainer.step(torch.randn(64, 32, generator=generator))
        counts.append(trainer.variant.scalars())
    for name in ("inhibited", "outcompeted", "orthogonalized"):
        assert int(counts[0][name]) > 0
        assert int(counts[1][name]) == pytest.approx(int(counts[0][name]), rel=0.01)


def test_defaults_of_run_10() -> None:
    """The defaults are the paper's numbers where it gives one, and ours otherwise."""
    options = RECIPES["collapse-10"].options
    expected = {
        "l1": 0.04, "beta": 0.9, "alpha": 0.1, "tau_max": 0.4, "tau_min": 0.05, "contrast_power": 1.0, "kappa": 0.01,
        "diversity_strength": 0.01, "beta_orth": 0.01, "groups": 16, "wta_share": 0.1, "gamma": 0.25, "neighbours": 8,
        "hard_every": 1, "importance": "off", "importance_share": 0.5, "contrast_on": "decoder", "orth_on": "decoder",
        "near_scope": "group", "batch_norm": "off", "gradient_balance": None, "l1_warmup": None, "alpha_warmup": None,
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected


def test_the_letter_of_run_10() -> None:
    options = find_recipe("collapse-10").make(RunConfig(32, 64, 20, 64, paper_exact=True), {}).options
    expected = {
        "l1_warmup": 0, "batch_norm": "pre", "importance": "groups", "gradient_balance": 1.0, "jl_on": "activations",
        "contrast_on": "activations", "contrast_cos": "exact", "orth_on": "activations", "near_scope": "dictionary",
        "l1_controller": "none", "gs_axis": "activation_batch", "group_lr": "softmax", "jl_dim": 128,
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected


def test_groups_are_as_few_as_leave_room_for_orthogonal_rows() -> None:
    assert [fewest_groups(32, d_sae) for d_sae in (16, 32, 64, 96, 33)] == [1, 1, 2, 3, 3]


def test_winners_make_room_for_the_l0_that_is_asked_for() -> None:
    made = find_recipe("collapse-09").make(RunConfig(32, 64, 20, 64, l0=32.0), {})
    assert made.sae.activation[-1].winners == 2


def test_ten_million_tokens_have_the_usual_schedule() -> None:
    made = find_recipe("collapse-02").make(RunConfig(32, 64, 4882, 2048), {"budget": "matched"})
    assert made.optimization.decay_start == 0.8 and made.optimization.warmup_steps(4882) == 488
