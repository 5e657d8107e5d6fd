"""The recipes of paper 001: their losses, readings, ablations and refusals."""

import pytest
import torch

from sae.common.errors import UsageError
from sae.train.activation_functions import Activation, ReLU
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig
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
