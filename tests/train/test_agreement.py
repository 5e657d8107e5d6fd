"""Our recipes against the peers' own trainers, step for step, without the peers.

Each fixture holds the initial weights of both sides, and the losses of every step and the final weights of the peer's
trainer. The peer trained in float64 on the rows of data.safetensors. The fixture's metadata has the versions, our
options, what was taken out of the peer's trainer, and the command that wrote the fixture. For more, see
benchmarks/peers/agree_train.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

FOLDER = Path(__file__).parent / "fixtures" / "agree"
PEERS = {
    "dictionary_learning": ("april", "batchtopk", "gated", "jumprelu", "matryoshka", "p-anneal", "relu", "topk"),
    "saelens": ("april", "batchtopk", "gated", "jumprelu-step", "jumprelu-tanh", "matryoshka", "relu", "topk"),
}
every_fixture = pytest.mark.parametrize("name", [f"{peer}-{recipe}" for peer in PEERS for recipe in PEERS[peer]])


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64: rounding is then far below the effect of any deviation."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agree(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """The largest relative difference of each loss over the steps, and of each weight after the last one."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    x_SBD = load_file(FOLDER / "data.safetensors")["x"]
    initial, theirs, final = (
        {key.removeprefix(f"{kind}."): t for key, t in tensors.items() if key.startswith(f"{kind}.")}
        for kind in ("initial", "seen", "final")
    )
    steps, batch, d_in = x_SBD.shape
    setting = RunConfig(d_in, len(initial["b_enc"]), steps, batch)
    variant = find_recipe(about["recipe"]).make(setting, json.loads(about["options"]))
    variant.dead.every = int(about["dead_every"])
    variant.sae.load_state_dict(initial)
    training = Trainer(variant, steps, "cpu")
    training.optimizer.found_inf = torch.zeros((), dtype=torch.float32)  # the fused optimizer reads it as float32
    seen = []
    for number, x_BD in enumerate(x_SBD):
        training.run_periodic(number, training.step(x_BD))
        seen.append(training.pop_metrics())
    ours = {key: torch.tensor([metrics[key] for metrics in seen], dtype=torch.float64) for key in theirs}
    return (
        {key: apart(ours[key], theirs[key]) for key in theirs},
        {key: apart(variant.sae.state_dict()[key], final[key]) for key in final},
    )


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@every_fixture
def test_in_float64_it_is_the_same_training(name: str, float64: None) -> None:
    """Differences are below 1e-12.

    Rounding alone gives 2e-15, and an error of 1e-6 in the length of a row gives 3e-7.
    """
    losses, weights = agree(name)
    if name in ("dictionary_learning-batchtopk", "dictionary_learning-matryoshka"):
        assert weights.pop("activation.0.threshold") < 1e-6  # float32 in the peer
    assert {key: far for key, far in {**losses, **weights}.items() if not far < 1e-12} == {}


@every_fixture
def test_in_float32_it_stays_within_rounding(name: str) -> None:
    losses, weights = agree(name)
    assert {key: far for key, far in {**losses, **weights}.items() if not far < 1e-5} == {}


def test_there_is_a_fixture_for_every_peer_and_recipe_and_no_other() -> None:
    names = {f"{peer}-{recipe}" for peer, recipes in PEERS.items() for recipe in recipes}
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {"data", *names}
