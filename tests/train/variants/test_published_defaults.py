"""The defaults of the recipes of published methods, each with its source, and the parts that are built from them."""

import pytest
import torch

from sae.train.activation_functions import BatchTopK, TopK
from sae.train.losses import AuxK
from sae.train.optimization import Optimization
from sae.train.recipe import RECIPES, find_recipe
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant
from sae.train.variants.gated import Gated
from sae.train.variants.jumprelu import JumpReLU
from sae.train.variants.ortsae import OrtSAELoss
from sae.train.variants.switch import Switch

CONFIG = RunConfig(d_in=16, d_sae=64, steps=400, batch_size=8)

# Gao et al. 2024: k = 32 is the middle of the sweep from 8 to 128. The weight of AuxK is 1/32, and k_aux is a power of
# two near d/2 (A.2). Multi-TopK (5.3) and annealing are off by default.
AUX = {"aux": 1 / 32, "aux_k": None}
ANNEAL = {"k_anneal_steps": 0, "k_start": None}
PUBLISHED: dict[str, dict[str, object]] = {
    "relu": {"l1": 0.04, "l1_warmup": None, "pre_bias": True},  # 0.04 in papers 001 to 004; x - b_dec: Bricken et al.
    "topk": {"k": 32, **AUX, "multi": 0.0, **ANNEAL},
    "batchtopk": {"k": 32, **AUX, **ANNEAL},  # Bussmann et al. 2024: AuxK as in Gao et al.
    "matryoshka": {"k": 32, "prefixes": 5, **AUX, **ANNEAL},  # Bussmann et al. 2025: five nested sizes
    "ortsae": {"k": 32, "strength": 0.25, "chunk": 8192, **AUX},  # Korznikov et al. 2025: chunks of 8192; ours: 0.25
    # Korznikov et al. 2026: rows drawn with the activations' covariance (App. E); cosine 0.8. Ours: k and AuxK.
    "frozen-decoder": {"k": 32, "base": "batchtopk", "init": "cov", **AUX},
    "soft-frozen-decoder": {"k": 32, "cosine": 0.8, "base": "batchtopk", **AUX},
    "frozen-encoder": {"k": 32, "base": "batchtopk", **AUX},
    "switch": {"k": 32, "experts": None, "balance": 0.1},  # Mudide et al. 2024: 16 to 128 experts; ours: 0.1
    "gated": {"l1": 0.04, "l1_warmup": None},
    "april": {"l1": 5.0, "l1_warmup": None},  # Conerly et al. 2024: lambda = 5
    # Karvonen et al. 2024: p falls to 0.2, and the penalty is measured over a queue of ten batches.
    "p-anneal": {"l1": 0.015, "p_end": 0.2, "start": 0.3, "updates": 10, "queue": 10, "l1_warmup": None},
    # Rajamanoharan et al. 2024b: for inputs with E|x|^2 = 1, the bandwidth and the initial threshold are 0.001.
    "jumprelu": {"l0": 32, "penalty": 1.0, "penalty_warmup": None, "bandwidth": 0.001, "threshold": 0.001},
    "jumprelu-step": {"penalty": 1e-3, "penalty_warmup": None, "bandwidth": 0.001, "threshold": 0.001},
    # Conerly et al. 2025: lambda_S = 20, c = 4, lambda_P = 3e-6, bandwidth 2, threshold 0.1.
    "jumprelu-tanh": {
        "penalty": 20.0, "c": 4.0, "reach": 3e-6, "bandwidth": 2.0, "threshold": 0.1, "ste_to_input": False,
    },
}  # fmt: skip
CONTROLS = ("frozen-decoder", "soft-frozen-decoder", "frozen-encoder")
BY_WIDTH = 2e-4 / (64 / 2**14) ** 0.5  # dictionary_learning's rule for TopK, after the sweep of Gao et al. 2024
OPTIMIZATION = {
    **{name: Optimization(lr=BY_WIDTH) for name in ("topk", "batchtopk", "matryoshka", "ortsae", *CONTROLS)},
    # The authors initialize both b_dec and b_router to the data's center.
    "switch": Optimization(lr=BY_WIDTH, center=True),
    "relu": Optimization(),
    "gated": Optimization(beta1=0.0),  # Rajamanoharan et al. 2024a: Adam without momentum
    "april": Optimization(lr=5e-5, b_dec_init="zero"),  # Conerly et al. 2024: rate 5e-5, b_dec = 0
    "p-anneal": Optimization(),
    "jumprelu": Optimization(lr=7e-5, beta1=0.0),  # Lieberum et al. 2024 (Gemma Scope): rate 7e-5, betas 0 and 0.999
    "jumprelu-step": Optimization(lr=7e-5, beta1=0.0),
    "jumprelu-tanh": Optimization(lr=2e-4),
}
WIDTH = dict.fromkeys(PUBLISHED, 8) | dict.fromkeys(("relu", "april", "p-anneal"), 1)


def built(name: str) -> Variant:
    torch.manual_seed(0)
    return find_recipe(name).make(CONFIG, {})


def weights(variant: Variant, i: int) -> dict[str, float]:
    """The coefficient of each term at step i."""
    x_BD = torch.zeros(8, 16)
    step = Step(torch.tensor(i), variant.sae, torch.optim.SGD(variant.parameters()), x_BD, x_BD, x_BD, x_BD)
    return {name: float(coefficient(step)) for name, coefficient in variant.coefficients.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_those_of_the_sources(name: str) -> None:
    recipe = find_recipe(name)
    assert dict(recipe.options) == PUBLISHED[name]
    assert recipe.width == WIDTH[name] and recipe.batch_size == 2048
    assert built(name).optimization == OPTIMIZATION[name]


def test_every_recipe_of_the_field_is_listed() -> None:
    assert {name for name, recipe in RECIPES.items() if not recipe.paper.startswith("00")} == PUBLISHED.keys()


def test_terms_are_weighted_as_published_in_the_built_variant() -> None:
    """Penalties have the published weight after a warm-up of 400 / 20 steps, and half of it in the middle."""
    at_end = {name: weights(built(name), 399) for name in PUBLISHED}
    for name in ("topk", "batchtopk", "matryoshka", *CONTROLS):
        assert at_end[name] == {"mse": 1.0, "aux": 1 / 32}
    assert at_end["ortsae"] == {"mse": 1.0, "aux": 1 / 32, "orthogonality": 0.25}
    assert at_end["switch"] == {"mse": 1.0, "balance": pytest.approx(0.1)}
    assert at_end["relu"] == {"mse": 1.0, "l1": pytest.approx(0.04)}
    assert at_end["gated"] == {"mse": 1.0, "l1": pytest.approx(0.04), "gate": 1.0}
    assert at_end["april"] == {"mse": 1.0, "l1": pytest.approx(5 / 4)}  # d_in = 16
    assert at_end["p-anneal"] == {"mse": 1.0, "lp": pytest.approx(0.015)}
    assert at_end["jumprelu"] == {"mse": 1.0, "l0_penalty": pytest.approx(1.0)}
    assert at_end["jumprelu-step"] == {"mse": 1.0, "l0_penalty": pytest.approx(1e-3)}
    assert at_end["jumprelu-tanh"] == {"mse": 1.0, "tanh": pytest.approx(20 / 16), "reach": pytest.approx(3e-6 / 4)}
    penalties = [*((name, "l1") for name in ("relu", "gated", "april")), ("p-anneal", "lp")]
    penalties += [(name, "l0_penalty") for name in ("jumprelu", "jumprelu-step")]
    for name, term in penalties:
        assert weights(built(name), 9)[term] == pytest.approx(at_end[name][term] / 2), name
    assert weights(built("jumprelu-tanh"), 199)["tanh"] == pytest.approx(20 / 16 / 2)  # its warm-up is the whole run


def test_parts_have_the_published_sizes_in_the_built_variant() -> None:
    for name in ("topk", "batchtopk", "matryoshka", "ortsae", *CONTROLS):
        variant = built(name)
        (activation,) = variant.sae.activation
        assert isinstance(activation, TopK if name == "topk" else BatchTopK) and activation.k == 32
        aux = variant.terms["aux"]
        assert isinstance(aux, AuxK) and aux.k_aux == 8  # d_in / 2
    loss = built("ortsae").terms["orthogonality"]
    assert isinstance(loss, OrtSAELoss) and loss.chunk == 8192
    (switch,) = built("switch").sae.activation
    assert isinstance(switch, Switch) and (switch.k, switch.experts) == (32, 2)  # 64 latents: two experts of 32
    (switch,) = find_recipe("switch").make(CONFIG._replace(d_sae=1024), {}).sae.activation
    assert isinstance(switch, Switch) and switch.experts == 16
    assert isinstance(built("gated").sae.activation[0], Gated)
    for name, width, threshold in (
        ("jumprelu", 1e-3, 1e-3),
        ("jumprelu-step", 1e-3, 1e-3),
        ("jumprelu-tanh", 0.5, 0.025),
    ):
        (jump,) = built(name).sae.activation
        assert isinstance(jump, JumpReLU) and jump.bandwidth == width and not jump.ste_to_input
        torch.testing.assert_close(jump.threshold.detach(), torch.full((64,), threshold))


@pytest.mark.parametrize("name", ["ortsae", "matryoshka", "topk", "batchtopk"])
def test_given_options_reach_the_parts(name: str) -> None:
    variant = find_recipe(name).make(CONFIG, {"aux": 0.5, "aux_k": 3, "k": 7})
    aux = variant.terms["aux"]
    assert weights(variant, 0)["aux"] == 0.5 and isinstance(aux, AuxK) and aux.k_aux == 3
    assert variant.sae.activation[0].k == 7


def test_given_chunk_reaches_the_loss() -> None:
    loss = find_recipe("ortsae").make(CONFIG, {"chunk": 5}).terms["orthogonality"]
    assert isinstance(loss, OrtSAELoss) and loss.chunk == 5


@pytest.mark.parametrize("name", ["matryoshka", "topk", "batchtopk"])
def test_given_annealing_reaches_the_activation(name: str) -> None:
    """Annealing starts at 40 latents, so the activation has room for 40."""
    variant = find_recipe(name).make(CONFIG, {"k": 7, "k_anneal_steps": 100, "k_start": 40})
    assert float(variant.sae.activation[0].now) == 40.0 and variant.sae.activation[0].max_k == 40
