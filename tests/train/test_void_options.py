"""Options that another option makes void are refused in a new run and have no effect in runs of earlier versions."""

from dataclasses import asdict
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.common.errors import UsageError
from sae.train.loop import Trainer
from sae.train.optimization import ANY_NUMBER, SWITCHED_OFF
from sae.train.recipe import RECIPES, Recipe, recipe
from sae.train.variant import RunConfig

STEPS = 6
CONFIG = RunConfig(16, 64, STEPS, 32)
VOID = [  # if several recipes share an option, it is listed for one of them
    ("topk", "aux_k"), ("decorrelation", "block"), ("hierarchical", "lambda_by"),
    *(("relu", name) for name in SWITCHED_OFF),
    *((name, void) for name in ("competition", "collapse-10", "progressive") for void in RECIPES[name].switched_off),
]  # fmt: skip
SMALL = {"k": 4, "turns": 2, "pairs": 4, "refresh": 2, "groups": 8, "neighbours": 2, "l1_warmup": 0, "interval": 1}


def others(value: Any, kind: Any) -> list[Any]:
    """Values of an option that differ from `value`."""
    choices = [one for part in (kind, *get_args(kind)) if get_origin(part) is Literal for one in get_args(part)]
    if choices or isinstance(value, bool):
        return [one for one in choices or (True, False) if one != value]
    return [3 if value is None else 2 * value if value else 1]


def void_by(recipe: Recipe, name: str) -> tuple[str, tuple[Any, ...]]:
    other, off = recipe.options_without_effect()[name]
    return other, (0.25,) if off is ANY_NUMBER else off


def trained(recipe: Recipe, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after STEPS steps of a run of an earlier version. Such a run may have any combination of options."""
    small = {name: value for name, value in SMALL.items() if name in recipe.options}
    built = recipe.make(CONFIG, {})
    stored = built.options | asdict(built.optimization) | small | options
    torch.manual_seed(0)
    trainer = Trainer(recipe.make(CONFIG, options, stored), STEPS, "cpu")
    generator = torch.Generator().manual_seed(1)
    for number in range(STEPS):
        x_BD = torch.randn(CONFIG.batch_size, CONFIG.d_in, generator=generator)
        trainer.run_periodic(number, trainer.step(x_BD))
    return dict(trainer.variant.sae.named_parameters())


@pytest.mark.parametrize(("recipe", "name"), VOID)
def test_they_have_no_effect(recipe: str, name: str) -> None:
    made = RECIPES[recipe]
    other, off = void_by(made, name)
    default = made.make(CONFIG, {})
    value = SMALL.get(name, (default.options | asdict(default.optimization))[name])
    before = trained(made, **{other: off[0]})
    for changed in others(value, made.option_types()[name]):
        after = trained(made, **{other: off[0], name: changed})
        assert all(torch.equal(before[key], after[key]) for key in before), changed


@pytest.mark.parametrize(("recipe", "name"), VOID)
def test_a_new_run_with_one_is_refused_by_a_sentence(recipe: str, name: str) -> None:
    made = RECIPES[recipe]
    other, off = void_by(made, name)
    default = made.make(CONFIG, {})
    value = (default.options | asdict(default.optimization))[name]
    changed = others(value, made.option_types()[name])[0]
    for void in off:
        with pytest.raises(UsageError, match=f"{name}={changed} has no effect with {other}={void}: leave it out"):
            made.make(CONFIG, {other: void, name: changed})


def test_an_option_that_only_a_fixed_one_makes_void_is_taken_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe fixes `aux`, whose value 0 would make aux_k void, so `aux` is not one of its options."""
    monkeypatch.setattr("sae.train.recipe.RECIPES", registered := dict[str, Recipe]())
    topk = RECIPES["topk"]
    build = topk.declared_by
    recipe("topk-aux", fixed={"aux": 1 / 32}, paper=topk.paper, switched_off=topk.switched_off)(build)
    recipe("topk-whole", paper=topk.paper, switched_off=topk.switched_off)(build)
    made = registered["topk-aux"].make(CONFIG, {"k": 4, "aux_k": 3})
    assert made.options["aux_k"] == 3 and "aux" not in made.options
    with pytest.raises(UsageError, match="aux_k=3 has no effect with aux=0"):
        registered["topk-whole"].make(CONFIG, {"k": 4, "aux_k": 3, "aux": 0})
