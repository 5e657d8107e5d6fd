"""Compare our recipes, step by step, with the peers' trainers, which run their own code.

    python -m venv env-dl       # only its trainers are used, and they need no more than this
    env-dl/bin/pip install --no-deps dictionary-learning==0.1.0
    env-dl/bin/pip install torch==2.13.0 einops numpy safetensors tqdm
    python -m venv env-saelens
    env-saelens/bin/pip install sae-lens==6.54.12 torch==2.13.0

    python benchmarks/peers/agree_train.py --dictionary-learning env-dl/bin/python --saelens env-saelens/bin/python
    python benchmarks/peers/agree_train.py ... --fixtures tests/train/fixtures/agree

Both sides get the same weights, rows and hyperparameters. The peer's own update runs, after the functions in
agree_dictionary_learning.py and agree_saelens.py have removed its deviations from our recipe, one function per
deviation. The first table compares the results in float32 and, to tell rounding from real differences, in float64. Its
columns `ours moved` show how far our own result moves when every initial weight is replaced by the next larger number
of the same precision. The second table shows the effect of each deviation when only this one is left in. `--fixtures`
writes the fixtures of tests/train/test_agreement.py, from a smaller problem.

    loss      max over steps of |ours - theirs| / |theirs|; in the first table also of the loss' parts, relative to the
              part's maximum
    weights   max over tensors of max |ours - theirs| / max |theirs|, after the last step; in float64 without the
              threshold of dictionary_learning's BatchTopK, which stays float32
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from agree_peer import precision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig, Variant


class Size(NamedTuple):
    d_in: int
    d_sae: int
    batch: int
    steps: int


LARGE, SMALL, DEAD_EVERY = Size(64, 256, 256, 100), Size(16, 64, 64, 40), 10

SCHEDULE = {"lr": 1e-3, "warmup": 10, "decay_start": 0.8}
L1 = {"l1": 0.1, "l1_warmup": 5}
TOPK = {"k": 4, "aux": 1 / 32}
JUMP = {"beta1": 0.0, "bandwidth": 0.05, "penalty_warmup": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": L1,
    "april": {"l1": 0.8, "l1_warmup": 5},
    "p-anneal": {**L1, "l1": 0.05, "start": 0.4, "updates": 4, "queue": 5, "p_end": 0.2},
    "gated": {**L1, "beta1": 0.0},
    "topk": TOPK,
    "batchtopk": TOPK,
    "matryoshka": {**TOPK, "prefixes": 5},
    "jumprelu": {**JUMP, "l0": 200, "penalty": 1.0},
    "jumprelu-step": {**JUMP, "penalty": 5e-3},
    "jumprelu-tanh": {"penalty": 2.0, "c": 4.0, "reach": 0.03, "bandwidth": 0.5},
}
# The recipes of each peer, and the options of our recipes that are set to the peer's values.
CLIP, NO_CLIP = {"clip": 1.0}, {"clip": None}
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "dictionary_learning": {
        **{name: NO_CLIP for name in ("relu", "p-anneal", "gated")},
        **{name: CLIP for name in ("april", "topk", "batchtopk", "matryoshka", "jumprelu")},
    },
    "saelens": {
        name: CLIP
        for name in ("relu", "april", "gated", "topk", "batchtopk", "matryoshka", "jumprelu-step", "jumprelu-tanh")
    },
}


def options_of(peer: str, recipe: str) -> dict[str, Any]:
    return {**SCHEDULE, "normalize": "none", **PEERS[peer][recipe], **OPTIONS[recipe]}


def rows(size: Size) -> Tensor:
    """Rows of shape (steps, batch, d_in) in bfloat16: each is a mean plus a few of 2 * d_in atoms.

    E|x|^2 = 10, so that gradients start above the clipping norm.
    """
    random = torch.Generator().manual_seed(0)
    atoms_AD = normalize(torch.randn(2 * size.d_in, size.d_in, generator=random), dim=1)
    shape = (size.steps, size.batch, len(atoms_AD))
    weights = (torch.rand(shape, generator=random) < 4 / len(atoms_AD)) * (0.5 + torch.rand(shape, generator=random))
    x_SBD = weights @ atoms_AD + 0.1 * torch.randn(size.d_in, generator=random)
    return (x_SBD * (10 / x_SBD.square().sum(-1).mean()).sqrt()).bfloat16()


def start(variant: Variant, mean_D: Tensor) -> dict[str, Tensor]:
    """The recipe's initial weights, perturbed so that no two are equal; every tenth latent is too small to be kept."""
    sae, random = variant.sae, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec" and parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=random)
        sae.W_enc[:, ::10] *= 0.05
        sae.b_enc[::10] = 0.0
        sae.b_dec.copy_(mean_D)
        for name, threshold in sae.named_parameters():
            if name.endswith("threshold"):
                threshold.copy_(0.1 * torch.rand(threshold.shape, generator=random))
    return {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}


def train_ours(
    recipe: str, options: dict[str, Any], initial: dict[str, Tensor], x_SBD: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The losses of every step and the final weights of our trainer."""
    with precision(dtype):
        variant = build(recipe, options, x_SBD)
        variant.sae.load_state_dict(initial)
        training = Trainer(variant, len(x_SBD), "cpu")
        training.optimizer.found_inf = torch.zeros((), dtype=torch.float32)  # the fused step reads it as float32
        losses = []
        for number, x_BD in enumerate(x_SBD):
            training.run_periodic(number, training.step(x_BD))
            losses.append(training.pop_metrics())
    seen = {f"seen.{name}": torch.tensor([s[name] for s in losses], dtype=torch.float64) for name in losses[0]}
    return seen | {f"final.{name}": tensor.detach() for name, tensor in variant.sae.state_dict().items()}


def build(recipe: str, options: dict[str, Any], x_SBD: Tensor) -> Variant:
    steps, batch, d_in = x_SBD.shape
    torch.manual_seed(0)
    variant = find_recipe(recipe).make(RunConfig(d_in, 4 * d_in, steps, batch), options)
    variant.dead.every = DEAD_EVERY
    return variant


def ask(peer: str, python: str, size: Size, folder: Path) -> None:
    """Let the peer train all of its recipes, and write its answers to `folder`."""
    x_SBD = rows(size)
    save_file({"x": x_SBD}, folder / "data.safetensors")
    for recipe in PEERS[peer]:
        options = options_of(peer, recipe)
        with precision(torch.float64):
            variant = build(recipe, options, x_SBD)
            initial = start(variant, x_SBD.double().mean((0, 1)))
        whole = {
            **find_recipe(recipe).options, "beta1": variant.optimization.beta1, **options, **size._asdict(),
            "dead_tokens": variant.dead.after_tokens, "dead_every": variant.dead.every,
        }  # fmt: skip
        save_file(initial, folder / f"{recipe}.safetensors", {"options": json.dumps(whole)})
    subprocess.run([python, str(Path(__file__).with_name(f"agree_{peer}.py")), str(folder)], check=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def compare(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float, float]:
    """The differences of loss, parts of the loss, and weights, as the docstring of this file defines them."""
    loss = float(((mine["seen.loss"] - theirs["seen.loss"]) / theirs["seen.loss"]).abs().max())
    parts = [n for n in theirs if n.startswith("seen.") and theirs[n].any()]
    kept = [n for n in theirs if n.startswith("final.") and theirs[n].any() and theirs[n].dtype == mine[n].dtype]
    return loss, max(farthest(mine[n], theirs[n]) for n in parts), max(farthest(mine[n], theirs[n]) for n in kept)


def farthest(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in PEERS:
        parser.add_argument(f"--{peer.replace('_', '-')}", dest=peer, help="Python of an environment with this peer")
    parser.add_argument("--fixtures", type=Path, help="write the fixtures of the tests and print no tables")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    agreeing: list[str] = []
    effects: dict[str, list[str]] = {}
    for peer in PEERS:
        if python := getattr(asked, peer):
            with tempfile.TemporaryDirectory() as folder:
                ask(peer, python, SMALL if asked.fixtures else LARGE, Path(folder))
                if asked.fixtures:
                    write_fixtures(peer, Path(folder), asked.fixtures)
                else:
                    report(peer, Path(folder), agreeing, effects)
    if not asked.fixtures:
        half, full = "loss, float32 | weights | ours moved", "loss, float64 | weights | ours moved"
        print(f"| recipe | peer | {half} | {full} | as published: loss | weights |\n|{'---|' * 10}")
        print(*agreeing, sep="\n")
        print("\n| peer | deviation left in | what it is | loss / weights |\n|---|---|---|---|")
        print(*(f"| {what} | {', '.join(recipes)} |" for what, recipes in sorted(effects.items())), sep="\n")


def report(peer: str, folder: Path, agreeing: list[str], effects: dict[str, list[str]]) -> None:
    """One line of the first table for each recipe, and its lines of the second table."""
    x_SBD, _ = read(folder / "data.safetensors")
    for recipe in PEERS[peer]:
        initial, _ = read(folder / f"{recipe}.safetensors")
        cells = []
        for dtype in (torch.float32, torch.float64):
            theirs, about = read(folder / f"{recipe}.{str(dtype).removeprefix('torch.')}")
            mine = train_ours(recipe, options_of(peer, recipe), initial, x_SBD["x"], dtype)
            up = torch.tensor(torch.inf, dtype=dtype)
            beside = {n: torch.where(t == 0, t, t.to(dtype).nextafter(up)) for n, t in initial.items()}
            moved = train_ours(recipe, options_of(peer, recipe), beside, x_SBD["x"], dtype)
            loss, parts, weights = compare(mine, theirs)
            cells += [max(loss, parts), weights, compare(mine, moved)[2]]
        taken = {name: text for name, text in about.items() if name not in ("version", "torch")}
        for case in ("published", *(f"kept.{name}" for name in taken)):
            loss, _, weights = compare(mine, read(folder / f"{recipe}.{case}")[0])
            if case == "published":
                cells += [loss, weights]
            else:
                name = case.removeprefix("kept.")
                effects.setdefault(f"{peer} | {name} | {taken[name]}", []).append(
                    f"{recipe} {loss:.0e} / {weights:.0e}"
                )
        agreeing.append(f"| {recipe} | {peer} {about['version']} | {' | '.join(f'{cell:.0e}' for cell in cells)} |")


def write_fixtures(peer: str, folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    x_SBD, _ = read(folder / "data.safetensors")
    save_file(x_SBD, to / "data.safetensors")
    for recipe in PEERS[peer]:
        initial, _ = read(folder / f"{recipe}.safetensors")
        theirs, about = read(folder / f"{recipe}.float64")
        taken = {name: text for name, text in about.items() if name not in ("version", "torch")}
        about = {
            "recipe": recipe, "options": json.dumps(options_of(peer, recipe)), "dead_every": str(DEAD_EVERY),
            "peer": f"{peer} {about['version']}, torch {about['torch']}, float64", "taken_out": json.dumps(taken),
            "command": "python benchmarks/peers/agree_train.py "
            "--dictionary-learning PYTHON --saelens PYTHON --fixtures FOLDER",
        }  # fmt: skip
        save_file({f"initial.{n}": t for n, t in initial.items()} | theirs, to / f"{peer}-{recipe}.safetensors", about)


if __name__ == "__main__":
    main()
