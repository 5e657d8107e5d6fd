"""Code shared by the peer scripts that agree_train.py calls. It runs in a peer's environment, without our package."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Deviation = Callable[[Any, dict[str, Any]], None]  # removes the deviation that its docstring describes


class Peer(NamedTuple):
    version: str
    deviations: dict[str, list[Deviation]]  # by recipe
    build: Callable[[str, dict[str, Any]], Any]  # (recipe, options) -> trainer
    weights: Callable[[Any], dict[str, Tensor]]  # trainer -> its weights as views, with our names and shapes
    step: Callable[[Any, int, Tensor], dict[str, float]]  # (trainer, number, x_BD) -> the losses


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Create tensors with this dtype, and let `.float()` convert to it, because both sides call `.float()` to get
    at least float32."""
    before = torch.Tensor.float
    torch.set_default_dtype(dtype)
    torch.Tensor.float = lambda self: self.to(dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = before  # type: ignore[assignment]


def train(peer: Peer, folder: Path, recipe: str, dtype: torch.dtype, removed: list[Deviation]) -> dict[str, Tensor]:
    """The losses of every step and the final weights of a peer's trainer, trained without the `removed` deviations."""
    with safe_open(folder / f"{recipe}.safetensors", "pt") as file:
        options = json.loads(file.metadata()["options"])
        initial = {name: file.get_tensor(name) for name in file.keys()}
    x_SBD = load_file(folder / "data.safetensors")["x"].to(dtype)
    with precision(dtype):
        trainer = peer.build(recipe, options)
        with torch.no_grad():
            for name, tensor in peer.weights(trainer).items():
                if tensor.requires_grad:  # a threshold computed from batches keeps the peer's initial value
                    tensor.copy_(initial[name])
        for deviation in removed:
            deviation(trainer, options)
        losses = [peer.step(trainer, number, x_BD) for number, x_BD in enumerate(x_SBD)]
    seen = {f"seen.{name}": torch.tensor([s[name] for s in losses], dtype=torch.float64) for name in losses[0]}
    return seen | {f"final.{name}": t.detach().clone().contiguous() for name, t in peer.weights(trainer).items()}


def answer(peer: Peer, folder: Path) -> None:
    """Train each recipe with initial weights in `folder`: without deviations, with a single one, and as published."""
    torch.set_num_threads(1)
    for path in sorted(folder.glob("*.safetensors")):
        recipe = path.stem
        if recipe not in peer.deviations:
            continue
        all_of_them = peer.deviations[recipe]
        cases = {"float32": (torch.float32, all_of_them), "float64": (torch.float64, all_of_them)}
        cases["published"] = (torch.float64, [])
        for kept in all_of_them:
            cases[f"kept.{kept.__name__}"] = (torch.float64, [d for d in all_of_them if d is not kept])
        for case, (dtype, removed) in cases.items():
            about = {
                "version": peer.version,
                "torch": torch.__version__,
                **{d.__name__: d.__doc__ for d in all_of_them},
            }
            save_file(train(peer, folder, recipe, dtype, removed), folder / f"{recipe}.{case}", about)
