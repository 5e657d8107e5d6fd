"""Mistakes that a mechanism could make in a step, to test that they are found. Tests refer to lines of this file."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from sae.train.loop import Trainer
from sae.train.mechanisms import DeadLatents
from sae.train.step import Step

from . import training
from .functions import simulated_gpu
from .ledger import watch


def reads_a_value(step: Step) -> None:
    step.l0.item()


def branches_on_a_value(step: Step) -> None:
    if step.l0 > 1e9:
        raise AssertionError


def copies_a_list(step: Step) -> None:
    torch.tensor([1.0, 2.0], device=step.x_BD.device)


def indexes_by_a_mask(step: Step) -> None:
    step.f_BF[step.fired_F.expand_as(step.f_BF)]


def mixes_devices(step: Step) -> None:
    step.x_BD * torch.ones(step.x_BD.shape[1])


def moves_a_tensor(step: Step) -> None:
    step.x_BD + torch.ones(step.x_BD.shape[1]).to(step.x_BD.device)


def changes_a_value(step: Step) -> None:
    step.sae.b_enc.data.add_(1e-6 if step.sae.b_enc.device.type == "cuda" else 0)


def passes_once_more(step: Step) -> None:
    step.f_BF.detach().abs()


def adds_by_an_index(step: Step) -> None:
    torch.zeros(3, device=step.x_BD.device).index_add_(0, some_of(step, 3), step.x_BD[:, 0])


def scatters_to_a_place_twice(step: Step) -> None:
    torch.zeros(3, device=step.x_BD.device).scatter_(0, some_of(step, 3), step.x_BD[:, 0])


def scatters_a_sum(step: Step) -> None:
    torch.zeros(3, device=step.x_BD.device).scatter_add(0, some_of(step, 3), step.x_BD[:, 0])


def puts_at_a_place_twice(step: Step) -> None:
    torch.zeros(3, device=step.x_BD.device)[some_of(step, 3)] = step.x_BD[:, 0]


def sums_cumulatively(step: Step) -> None:
    step.x_BD.cumsum(0)


def keeps_the_order(step: Step) -> None:
    """Writes each element once, adds exact numbers, and sums integers, so any order gives the same bits."""
    place_B, device = some_of(step, len(step.x_BD)), step.x_BD.device
    torch.zeros(len(place_B), device=device).index_add_(0, place_B, step.x_BD[:, 0])
    torch.zeros(len(place_B), device=device).scatter_(0, place_B, step.x_BD[:, 0])
    torch.zeros(3, device=device).index_add_(0, some_of(step, 3), torch.ones(len(place_B), device=device))
    torch.zeros(3, device=device).index_put_((some_of(step, 3),), step.x_BD[:, 0], accumulate=True)  # it sorts
    torch.zeros(len(place_B), 4, device=device)[place_B] = step.x_BD[:, :4]
    place_B.cumsum(0)


def some_of(step: Step, count: int) -> Tensor:
    """An index below `count` for each token."""
    return torch.arange(len(step.x_BD), device=step.x_BD.device).flip(0) % count


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x_BD: Tensor) -> Tensor:
        return x_BD.clone()

    @staticmethod
    def backward(ctx: object, gradient_BD: Tensor) -> Tensor:  # type: ignore[override]
        return gradient_BD * float(gradient_BD.sum() * 0 + 1)


@contextlib.contextmanager
def after_each_step(fault: str) -> Iterator[None]:
    """A context in which a mechanism makes the mistake `fault` after each step."""
    mistake: Callable[[Step], None] = globals()[fault]
    original = DeadLatents.after_step

    def after_step(self: DeadLatents, step: Step) -> None:
        original(self, step)
        mistake(step)

    with mock.patch.object(DeadLatents, "after_step", after_step):
        yield


def walk_with(fault: str) -> dict[str, object]:
    """Like `training.walk` for relu, with a fault injected after each step."""
    with after_each_step(fault):
        return training.walk("relu")


def waits_in_backward() -> list[str]:
    """The waits that the ledger records for a gradient that reads a value."""
    original = Trainer.forward_losses

    def forward_losses(self: Trainer, x_BD: Tensor) -> object:
        step, losses = original(self, x_BD)
        return step, {name: _ReadsInBackward.apply(loss) for name, loss in losses.items()}

    with simulated_gpu(), mock.patch.object(Trainer, "forward_losses", forward_losses):
        walk = training.Walk("relu", (), False, training.D_SAE, "cuda", Path(), 1)
        trainer, x_BD = walk.new_trainer(), training.batches(1, training.BATCH)[0].to("cuda")
        with watch() as seen:
            trainer.step(x_BD)
    return seen.waits
