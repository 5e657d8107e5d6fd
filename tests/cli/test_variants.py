"""`sae variants`: the table of the recipes, and a page for each."""

import pytest
from typer.testing import CliRunner

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.cli.main import app
from sae.train.optimization import Optimization
from sae.train.recipe import RECIPES
from sae.train.variant import RunConfig


def output_of(*names: str) -> str:
    result = CliRunner().invoke(app, ["variants", *names])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table_has_a_line_for_every_recipe_and_fits_100_columns() -> None:
    lines = output_of().splitlines()
    assert [line for line in lines if len(line) > 100] == []
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(RECIPES)
    for recipe in RECIPES.values():
        assert any(line.startswith(f"  {recipe.name} ") and line.endswith(recipe.summary) for line in lines)


def test_the_table_is_grouped_by_paper() -> None:
    """Published papers by year, then the numbered ones with their titles."""
    headings = [line for line in output_of().splitlines() if line and not line.startswith((" ", "sae variants"))]
    assert headings[0] == "Bricken et al. 2023"
    assert headings[-5:] == [
        "Paper 000: The feature collapse problem",
        "Paper 001: Competitive progressive autoencoders",
        "Paper 002: CompeteSAE",
        "Paper 003: Selective feature decorrelation",
        "Paper 004: HierarchicalSAE",
    ]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_page_describes_every_option(name: str) -> None:
    page, recipe = output_of(name), RECIPES[name]
    lines = page.splitlines()
    assert [line for line in lines if len(line) > 100] == []
    assert lines[0] == name and recipe.summary in page
    own, shared = page.split("\noptions (--set NAME=VALUE)\n")[1].split("\noptimizer options")
    for options, section in ((recipe.options, own), (vars(Optimization()), shared)):
        found = [
            line.split("=")[0].strip() for line in section.split("\n--paper-exact\n")[0].splitlines() if "=" in line
        ]
        assert [option for option in options if option not in found] == []
    assert "not documented" not in page
    assert "--paper-exact" in page


def test_a_page_says_which_options_another_one_makes_void() -> None:
    page = " ".join(output_of("decorrelation").split())
    assert "Has no effect with pair_choice=exact." in page and page.count("Has no effect with weight_decay=0.") == 2
    page = " ".join(output_of("collapse-baseline").split())
    assert "Has no effect with importance=off or loss_ema." in page and "Has no effect with inhibition" not in page


def test_a_page_says_what_paper_exact_does_and_where_it_does_nothing() -> None:
    page = output_of("competition")
    assert "  tau_on=lift\n      warning: chance is 1 on the scale of c and tau is 0.6" in page
    assert "Uses the paper's number for k, without scaling it to the run." in page
    assert "A k above the number of latents (--width) is still scaled to d_in." in page
    assert "A k above" not in output_of("progressive")


@pytest.mark.parametrize("name", ["progressive-baseline", "topk"])
def test_a_page_and_a_plan_say_alike_that_paper_exact_changes_nothing(name: str) -> None:
    why = {
        "progressive-baseline": "every default is the paper's own setting",
        "topk": "have not been compared with a paper",
    }
    assert f"Changes nothing: {RECIPES[name].why_not_paper_exact}." in output_of(name)
    assert why[name] in RECIPES[name].why_not_paper_exact
    (note,) = RECIPES[name].make(RunConfig(16, 64, 10, 32, paper_exact=True), {"k": 4} if name == "topk" else {}).notes
    assert note == f"{name}: --paper-exact changes nothing: {RECIPES[name].why_not_paper_exact}"


def test_paper_exact_changes_something_where_it_only_keeps_the_papers_k() -> None:
    recipe, config = RECIPES["hierarchical-topk320"], RunConfig(16, 512, 10, 32)
    assert "Changes nothing" not in output_of("hierarchical-topk320")
    assert [recipe.make(config._replace(paper_exact=e), {}).options["k"] for e in (False, True)] == [2, 320]
    (note,) = recipe.make(config._replace(paper_exact=True), {}).notes
    assert note.endswith("--paper-exact uses the paper's number for k without scaling it to the run")
    assert recipe.make(config._replace(paper_exact=True), {"k": 4}).notes == []


def test_a_page_shows_defaults_types_equations_and_measurements() -> None:
    page = output_of("competition")
    assert "k=100 at d_in 2304" in page
    assert "direction=symmetric               symmetric | child_only | parent_only\n" in page
    assert "alpha = min(1, t / t_w)" in page
    assert "measured  L0 6, explained variance 0.7268, KL score 0.9217" in page
    assert "weight_decay=0.01" in output_of("hierarchical")  # the recipe's default for a shared option


def test_several_pages_at_once() -> None:
    assert output_of("relu", "topk") == f"{output_of('relu')}\n{output_of('topk')}"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    result = CliRunner().invoke(app, ["variants", "topk", "batchtopkk"])
    assert result.exit_code == 2 and result.stdout == ""
    assert "'batchtopkk'; did you mean batchtopk?" in result.stderr
