"""The options of recipes: how they are declared, and that each is documented."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sae
import sae.train.variants  # registers the recipes
from sae.common.errors import UsageError
from sae.train.optimization import Optimization
from sae.train.options import (
    Option,
    RecipeOptions,
    argument_docs,
    field_docs,
    options_class,
    read_option_docs,
    read_options,
)
from sae.train.recipe import RECIPES, recipe
from sae.train.variant import RunConfig, Variant
from sae.train.variants.baselines import relu


@dataclass(frozen=True)
class BaseOptions(RecipeOptions):
    """Not the documentation of a field."""

    k: int = 3
    """Latents
    per token."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        if self.k > config.steps:
            yield "more latents than steps"


@dataclass(frozen=True)
class MoreOptions(BaseOptions):
    rate: float = 0.5
    bare: bool = False
    """The documentation of `bare`, not of `rate`."""


def build_with_class(config: RunConfig, options: MoreOptions) -> Variant:
    """A recipe."""
    assert isinstance(options, MoreOptions)
    return relu(config, l1=options.rate)


def build_with_arguments(config: RunConfig, k: int = 3, *, rate: float = 0.5) -> None:
    """A recipe.

    Args:
        k: Latents
            per token: how many.
        rate: A rate.

    Not an option: text.
    """


def test_options_of_a_class_are_its_fields_with_those_of_its_base_first() -> None:
    assert options_class(build_with_class) is MoreOptions
    assert read_options(MoreOptions) == {
        "k": Option(int, 3),
        "rate": Option(float, 0.5),
        "bare": Option(bool, False),
    }
    assert field_docs(MoreOptions) == {"k": "Latents per token.", "bare": "The documentation of `bare`, not of `rate`."}


def test_options_of_a_function_are_its_arguments() -> None:
    assert options_class(build_with_arguments) is None
    assert read_options(build_with_arguments) == {"k": Option(int, 3), "rate": Option(float, 0.5)}
    assert argument_docs(build_with_arguments) == {"k": "Latents per token: how many.", "rate": "A rate."}


def test_a_recipe_of_a_class_is_built_and_validated_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.train.recipe.RECIPES", {})
    recipe("made-up", paper="none", fixed={"bare": True}, unused=["k"])(build_with_class)
    recipe("whole", paper="none", options=MoreOptions, summary="Another summary.")(build_with_class)
    from sae.train.recipe import RECIPES

    made_up, whole = RECIPES["made-up"], RECIPES["whole"]
    assert (dict(made_up.options), made_up.summary) == ({"rate": 0.5}, "A recipe.")
    assert (list(whole.options), whole.summary) == (["k", "rate", "bare"], "Another summary.")
    config = RunConfig(4, 8, 10, 2)
    assert made_up.make(config, {"rate": 0.25}).options == {"rate": 0.25}
    with pytest.raises(UsageError, match="made-up has no option bare"):
        made_up.make(config, {"bare": False})
    with pytest.raises(UsageError, match="more latents than steps"):
        whole.make(RunConfig(4, 8, 2, 2), {})


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_option_of_every_recipe_is_documented(name: str) -> None:
    docs = RECIPES[name].option_docs()
    assert [option for option in RECIPES[name].options if len(docs.get(option, "")) < 10] == []
    assert [option for option, doc in docs.items() if not doc.endswith(".")] == []


def test_every_shared_option_is_documented() -> None:
    docs = read_option_docs(Optimization)
    assert docs.keys() == vars(Optimization()).keys()


def test_the_measured_numbers_are_those_of_the_documentation() -> None:
    root = Path(sae.__path__[0])
    measured = json.loads((root / "train" / "variants" / "measured.json").read_text())["recipes"]
    assert measured.keys() == RECIPES.keys()
    pages = [page.read_text() for page in (root / "docs").rglob("*.md")]
    (table,) = (page.split("| run | L0 | KL score")[1] for page in pages if "| run | L0 | KL score" in page)
    documented: dict[str, dict[str, float]] = {}
    for name, cells in re.findall(r"^\| `([\w-]+)` \| (.*)$", table, re.MULTILINE):
        l0, kl_score, _, _, explained_variance = (float(cell.split()[0]) for cell in cells.split(" | ")[:5])
        numbers = {"l0": l0, "explained_variance": explained_variance, "kl_score": kl_score}
        documented.setdefault(name, numbers)
    assert measured == {name: documented[name] for name in measured}
