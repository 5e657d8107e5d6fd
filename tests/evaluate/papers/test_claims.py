"""The files with the claims of the five papers: their contents, how they are read and which are refused."""

import dataclasses
import functools
import runpy
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.evaluate.datasets.labeled import HUB
from sae.evaluate.metrics import sparse_probing
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.papers.claims import CLAIM_METRICS, EXTRA_METRICS, PAPERS, STEP_TIME, TRAINING_LOG, Claim, PaperFact
from sae.evaluate.papers.parse import CLAIMS_FOLDER, MAX_QUOTE, load_paper
from sae.evaluate.papers.quotes import printed_numbers
from sae.evaluate.papers.verdict import measured_value
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.run import evaluate
from sae.train.activation_functions import ReLU
from sae.train.loop import Trainer
from sae.train.recipe import RECIPES
from sae.train.sae import SAE, save_sae
from sae.train.variant import RunConfig

ALL = [load_paper(number) for number in PAPERS]
CLAIMS = [(paper, claim) for paper in ALL for claim in paper.claims]
every_paper = pytest.mark.parametrize("paper", ALL, ids=PAPERS)


# --- the files --------------------------------------------------------------------------------------------------------


def test_every_paper_has_a_file_and_every_file_a_paper():
    assert [path.stem for path in sorted(CLAIMS_FOLDER.glob("*.toml"))] == list(PAPERS)
    assert [paper.number for paper in ALL] == list(PAPERS)


def test_the_files_are_installed_with_the_package():
    root = Path(__file__).parents[3]
    shipped = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = {
        path.name for pattern in shipped["sae.evaluate.papers"] for path in (root / "evaluate" / "papers").glob(pattern)
    }
    assert found >= {path.name for path in CLAIMS_FOLDER.glob("*.toml")}


def test_the_overview_is_of_these_claims():
    """docs/explanation/claims.md has the output of benchmarks/claims_table.py."""
    root = Path(__file__).parents[3]
    made = runpy.run_path(str(root / "benchmarks" / "claims_table.py"))["overview"]()
    assert (root / "docs" / "explanation" / "claims.md").read_text(encoding="utf-8") == made


@pytest.mark.parametrize(("paper", "claim"), CLAIMS, ids=lambda one: getattr(one, "id", getattr(one, "number", "")))
def test_a_claim_stands_on_a_line_that_holds_its_value(paper, claim):
    for quote in (claim.quote, *(place.quote for place in claim.also)):
        assert len(quote) <= MAX_QUOTE
        assert claim.says or any(abs(number) == abs(claim.value) for number, _ in printed_numbers(quote))
    assert (
        claim.metric in CLAIM_METRICS
        or claim.metric.startswith(f"{TRAINING_LOG}.")
        or (claim.metric == "none" and claim.why)
    )
    assert claim.metric == "none" or claim.system in paper.systems
    assert set(claim.layers) <= set(paper.setup.layers) and claim.layers


@every_paper
def test_ids_are_unique(paper):
    assert [name for name, count in Counter(claim.id for claim in paper.claims).items() if count > 1] == []


@every_paper
def test_a_change_is_that_of_the_two_numbers_beside_it_or_a_contradiction(paper):
    """A printed change is within 1 (for % and pp) or 0.1 (for x) of the change between the printed numbers."""
    for change in (claim for claim in paper.claims if claim.is_change and claim.metric != "none"):
        own, other = (
            [
                c.value
                for c in paper.claims
                if (c.system, c.metric, c.entries) == (system, change.metric, change.entries)
                and c.value is not None
                and not c.is_change
            ]
            for system in (change.system, change.against)
        )
        given = [{"%": 100 * (a - b) / abs(b), "pp": a - b, "x": a / b}[change.unit] for a in own for b in other]
        slack = 0.1 if change.unit == "x" else 1
        right = all(abs(one - change.value) < slack for one in given)
        assert right or paper.inconsistent(change), (change.id, given)


@every_paper
def test_claims_of_one_number_that_differ_are_inconsistent(paper):
    """If a paper prints two numbers for one system and metric that differ by more than 5 %, neither gets a verdict."""
    groups: dict[tuple, list] = {}
    for claim in paper.claims:
        if claim.value is not None and not claim.is_change and claim.metric != "none":
            groups.setdefault((claim.system, claim.metric, claim.entries), []).append(claim)
    for group in groups.values():
        values = [claim.value for claim in group]
        if max(values) - min(values) > 0.05 * max(map(abs, values)):
            assert all(paper.inconsistent(claim) for claim in group), [claim.id for claim in group]


# --- what they refer to -----------------------------------------------------------------------------------------------


@every_paper
@pytest.mark.parametrize("d_in", [2304, 128])
def test_systems_are_recipes_that_can_be_built(paper, d_in):
    """Every reading can be built at the paper's width; at another width, only `field` has to be."""
    for reading in paper.readings:
        if d_in != 2304 and reading.name != "field":
            continue
        for system in paper.systems.values():
            for name in system.recipes:
                width = round(float(system.width.removesuffix("x")) * d_in)
                setting = RunConfig(
                    d_in, width, paper.reproduction.steps, paper.reproduction.batch_size, None, reading.literal, 24.0
                )
                asked = {
                    **{k: v for k, v in reading.options.items() if k in RECIPES[name].option_types()},
                    **system.options,
                }
                with torch.device("meta"):
                    variant = RECIPES[name].make(setting, asked)
                assert variant.sae.d_sae == width
    assert "field" in [reading.name for reading in paper.readings]


@every_paper
def test_an_option_of_a_reading_is_one_of_some_recipe(paper):
    names = [name for system in paper.systems.values() for name in system.recipes]
    for reading in paper.readings:
        for option in reading.options:
            assert any(option in RECIPES[name].option_types() for name in names), option


@every_paper
def test_a_system_at_the_paper_s_size_has_its_width(paper):
    widths = {s.width for s in paper.systems.values() if s.recipes}
    assert f"{paper.setup.d_sae // paper.setup.d_in}x" in widths
    assert len(paper.reproduction.seeds) >= 3


@functools.cache
def logged_scalars(recipe: str) -> set[str]:
    """The scalars that a recipe logs after one step."""
    torch.manual_seed(0)
    trainer = Trainer(RECIPES[recipe].make(RunConfig(32, 64, 20, 16), {}), 20, "cpu")
    trainer.step(torch.randn(16, 32))
    return set(trainer.pop_metrics())


@every_paper
def test_a_scalar_of_training_is_one_that_its_recipes_log(paper):
    for claim in (*paper.claims, *paper.unreported):
        if not claim.metric.startswith(f"{TRAINING_LOG}."):
            continue
        asked = [getattr(claim, name, "") for name in ("system", "against")]
        systems = [paper.systems[name] for name in asked if name] or list(paper.systems.values())
        recipes = {name for system in systems for name in system.recipes}
        logged = [claim.metric.removeprefix(f"{TRAINING_LOG}.") in logged_scalars(recipe) for recipe in recipes]
        assert all(logged) if asked[0] else any(logged), claim


@every_paper
def test_the_counter_of_a_mechanism_is_one_that_its_recipes_log(paper):
    for system in paper.systems.values():
        for recipe in system.recipes if system.counter else ():
            assert system.counter in logged_scalars(recipe), (system.id, recipe)


def test_what_no_table_shows_is_in_results(tiny_cache, home):
    """Results of mode 2024-12 contain the numbers in EXTRA_METRICS, which no table shows."""
    torch.manual_seed(0)
    sae = SAE(32, 16, [ReLU()])
    origin = {"model": tiny_cache.identity["model"], "layer": 0, "cache": str(tiny_cache.folder)}
    save_sae(sae, home / "run", origin | {"fingerprint": tiny_cache.attributes["fingerprint"]})
    options = ("absorption.words=260", "absorption.k_sparse_probe_num_epochs=1")
    (row,) = evaluate(
        EvaluateConfig(
            [home / "run"], "core,absorption", 60, "2024-12", options=options, device="cpu", references=False
        )
    )
    assert not row.errors
    scores = sparse_probing.ProbingScores(
        {"a": 0.5}, {k: {"a": 0.5} for k in METRICS["sparse_probing"]().ks("2024-12")}
    )
    scores.constant = dict.fromkeys(scores.top, 0)
    by_dataset = dict.fromkeys(HUB, scores)
    results = row.results | {
        "sparse_probing": sparse_probing.build_result(by_dataset, by_dataset, [*scores.top], 100, False)
    }
    for name in EXTRA_METRICS:
        if name == STEP_TIME:  # comes from step_times.json, not from a result
            continue
        metric, category, field = name.split(".", 2)
        result = results[metric]
        found = {"n": [result.n], "details": result.details}.get(category) or [result.metrics[category]]
        assert all(field in one for one in found), name
    labels = {entry["dataset_name"].removesuffix("_results") for entry in results["sparse_probing"].details}
    letters = {entry["first_letter"] for entry in results["absorption"].details}
    for _, claim in CLAIMS:
        assert set(claim.entries) <= (letters if claim.metric.startswith("absorption") else labels)
        if claim.metric.startswith("sparse_probing"):
            assert measured_value(claim, results, []) == 0.5


def claim_of(name, number="001"):
    return next(claim for claim in load_paper(number).claims if claim.id == name)


def test_targets_are_in_the_unit_of_the_metric_and_changes_in_their_own():
    assert claim_of("ev", "004").target == pytest.approx(0.902)
    assert claim_of("l0-change").target == -53.6
    assert claim_of("l0-change").effect == -53.6
    assert claim_of("ev-change", "004").effect == 7.8
    assert claim_of("l0-change", "004").effect == pytest.approx(4.4)  # 5.4 times is an increase of 4.4 times
    assert claim_of("l0").effect == pytest.approx(42.05 / 90.60 - 1)
    assert claim_of("l0-baseline").effect is None
    risen = Claim("", "", "-0.004", value=-0.004, against="baseline", against_value=-0.008)
    assert (risen.effect, risen.direction) == (pytest.approx(0.5), 1)


def test_the_last_printed_digit_is_that_of_the_paper():
    assert claim_of("absorption", "000").rounding == pytest.approx(0.05)  # 0.0
    assert claim_of("ev", "004").rounding == pytest.approx(0.0005)  # 90.2 %
    assert claim_of("scr-10").rounding == pytest.approx(0.0005)  # -0.008
    assert claim_of("l0", "004").rounding == 0.5  # 1,735
    assert Claim("", "", "0.9, or 0.900", value=0.9).rounding == pytest.approx(0.0005)  # the more precise of the two


def test_what_is_claimed_is_shown_with_its_unit_and_an_equivalence_with_its_margin():
    assert claim_of("ev", "004").claimed == "90.2 %"
    assert claim_of("l0-change", "004").claimed == "5.4 x"
    assert claim_of("l0", "004").claimed == "1735"
    assert claim_of("ev-merging", "004").claimed == "equal, within 0.8 pp"
    assert claim_of("stability", "003").claimed == "equal"  # without a metric there is no margin
    assert claim_of("absorption-static", "004").claimed == "less"


def test_the_better_direction_is_that_of_the_metric():
    assert [claim_of(one, "004").better for one in ("ev", "kl", "mse", "l0")] == ["up", "down", "down", ""]


def test_what_was_never_trained_is_known():
    steps = {paper.number: (paper.setup.steps, paper.setup.peak_reached) for paper in ALL}
    assert steps["000"] == (100_000 // 125, False)
    assert steps["003"] == (0, False)
    assert steps["001"] == steps["002"] == steps["004"] == (4882, True)
    setup = load_paper("002").setup
    edges = [
        dataclasses.replace(setup, steps=n, warmup=w).peak_reached for n, w in ((999, 1000), (1000, 1000), (0, None))
    ]
    assert edges == [False, True, False]


def test_the_check_finds_quotes_over_line_ends_and_numbers_in_none():
    script = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "check_quotes.py"))
    paper = dataclasses.replace(
        load_paper("003"),
        facts=(PaperFact("", "an ortho-gonal code"), PaperFact("", "an L0 of 42.05")),
        claims=(),
        contradictions=(),
        unreported=(),
    )
    text = (
        "1 Introduction\nAn autoencoder, an ortho-\ngonal code, has an L0\nof 42.05 "
        "(Smith, 2024) at\nMSE 7.5 (Figure 2)."
        "\n\nREFERENCES\n\nSmith 99."
    )
    assert script["missing"](paper, text) == []
    assert script["missing"](paper, text.replace("42.05", "42.06")) == ["an L0 of 42.05"]
    assert [line.split(">>")[1][:3] for line in script["loose_numbers"](paper, text)] == ["7.5"]
    unhyphened = dataclasses.replace(paper, facts=(PaperFact("", "an orthogonal code"),))
    assert script["missing"](unhyphened, text) == []


@every_paper
def test_a_claim_is_about_a_number_that_its_mode_has(paper):
    """The SAEBench version of December 2024 has no misc_metrics, so claims about them could never be measured."""
    named = [claim.metric for claim in paper.claims] + [one.metric for one in paper.unreported]
    assert paper.mode == "2024-12" and not [name for name in named if name.startswith("core.misc_metrics.")]
