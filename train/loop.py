"""The training loop: every variant of a stream takes one step on each batch."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .step import Step
from .variant import Variant


class Trainer:
    """One variant being trained on the device it is on: what has to survive a restart besides its weights is here."""

    def __init__(self, variant: Variant, steps: int, device: str) -> None:
        self.variant, self.steps, self.device = variant, steps, device
        self.i = torch.zeros((), dtype=torch.int64, device=device)
        self.failed_at = torch.full((), -1, dtype=torch.int64, device=device)  # the first step that was not finite
        self.optimizer = make_optimizer(variant, device)
        self.seen: dict[str, Tensor] = {}  # sums since they were last taken
        self.count = 0

    def step(self, x_BD: Tensor) -> Step:
        """One optimisation step on raw activations (B, d_in). Nothing here reads a value back to the host."""
        variant, optimizer = self.variant, self.optimizer
        with autocast(self.device):
            step, losses = self.forward_losses(x_BD)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        with torch.no_grad():
            for mechanism in variant.mechanisms:
                mechanism.after_backward(step)
            norm = clip_gradients(variant, variant.optimization.clip)
            self._refuse_unless_finite(loss + norm)
            optimizer.param_groups[0]["lr"].copy_(variant.optimization.lr_at(self.i, self.steps))
            optimizer.step()
            for mechanism in variant.mechanisms:
                mechanism.after_step(step)
            self._observe(step, loss, losses, norm)
            self.i += 1
        optimizer.zero_grad(set_to_none=True)
        return step

    def forward_losses(self, x_BD: Tensor) -> tuple[Step, dict[str, Tensor]]:
        """The forward pass and its losses, which change nothing: what `--compile` compiles."""
        step = self.variant(self.i, x_BD, self.optimizer)
        return step, self.variant.losses(step)

    @torch.no_grad()
    def run_periodic(self, number: int, step: Step) -> None:
        """What mechanisms do after every so many steps, outside the step proper."""
        for mechanism in self.variant.mechanisms:
            if mechanism.every and (number + 1) % mechanism.every == 0:
                mechanism.every_n_steps(step)

    def _refuse_unless_finite(self, value: Tensor) -> None:
        """From the first step that is not finite on, the optimizer moves nothing; the host finds out when it logs."""
        first = (self.failed_at < 0) & ~torch.isfinite(value)
        self.failed_at.copy_(torch.where(first, self.i, self.failed_at))
        self.optimizer.found_inf.copy_(self.failed_at >= 0)

    def _observe(self, step: Step, loss: Tensor, losses: dict[str, Tensor], norm: Tensor) -> None:
        centred = step.x_BD - step.x_BD.mean(0)
        seen = {
            "loss": loss,
            **losses,
            "l0": step.l0,
            "explained_variance": 1 - step.error_BD.square().sum() / centred.square().sum(),
            "gradient_norm": norm,
            **step.metrics,
        }
        for name, value in seen.items():
            self.seen[name] = self.seen.get(name, 0) + value.detach()
        self.count += 1

    def pop_metrics(self) -> dict[str, float]:
        """Means over the steps since the last call, and the mechanisms' scalars as they are. Reads from the device."""
        metrics = {name: total.item() / self.count for name, total in self.seen.items()}
        metrics |= {name: value.item() for name, value in self.variant.scalars().items()}
        self.seen, self.count = {}, 0
        return metrics


def make_optimizer(variant: Variant, device: str) -> torch.optim.Optimizer:
    """Fused AdamW whose rate and whose mask of refused steps live on the device."""
    how, sae = variant.optimization, variant.sae
    decayed = [sae.W_enc]
    others = [p for p in variant.parameters() if p is not sae.W_enc]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=torch.tensor(how.lr, device=device), betas=(how.beta1, how.beta2), eps=how.eps, fused=True,
    )  # fmt: skip
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=device)  # read by the fused kernel
    return optimizer


def clip_gradients(variant: Variant, limit: float | None) -> Tensor:
    """The global norm of the gradient; longer ones are scaled down to `limit`."""
    return torch.nn.utils.clip_grad_norm_(variant.parameters(), float("inf") if limit is None else limit, foreach=True)


def autocast(device: str) -> contextlib.AbstractContextManager[None]:
    """On a GPU, matrix products in bfloat16 with float32 masters; on a CPU, float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def train_loop(
    trainings: list[Trainer], batches: Iterator[Tensor], numbers: range, after_step: Callable[[int], bool]
) -> None:
    """Steps `numbers`, every variant on each batch in turn, until `after_step(number)` says stop."""
    for number in numbers:
        x_BD = next(batches)
        for training in trainings:
            training.run_periodic(number, training.step(x_BD))
        if after_step(number):
            break
