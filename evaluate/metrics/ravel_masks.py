"""Masks that select the latents to exchange so that one attribute of an entity changes and the others stay (RAVEL).

The mask of an SAE is a vector theta (F,), trained by differential binary masking (Cao et al. 2020; Huang et al. 2024,
RAVEL) as in SAEBench 0.6.0 (`ravel/mdbm.py`). At the entity's last token, the model's activations are replaced by the
decoding of

    (1 - m) * f_base + m * f_source,    m = sigmoid(theta / T) in training, theta > 0 afterwards

without the SAE's error term. The loss is the cross entropy of the first token of the wanted answer. The temperature T
falls from 1 to 1e-4 geometrically over the steps.

The blocks up to the hook run once for all SAEs; the blocks after the hook run for each SAE.

Shape suffixes: N pairs, S positions, D d_in, F latents, K generated tokens.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...common.device import copy_to_device
from ...common.errors import SaeError
from ...harvest.model import PrefixPass
from ..context import EvalContext
from .base import EvalTarget, Progress, SAELike, encode_finite, reconstruct
from .ravel_prompts import FactPair, FactPrompt, PaddedPrompts, generate, pad_id, pad_prompts

FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 1e-4
PAIRS_PER_GENERATION = 64


class Mask:
    """The mask of one SAE, and its optimizer."""

    def __init__(self, target: EvalTarget, width: int, learning_rate: float, device: str) -> None:
        self.target = target
        self.theta_F = torch.zeros(width, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.theta_F], lr=learning_rate)
        self.loss = float("nan")  # of the last step, in nats
        self.error: SaeError | None = None  # why the SAE cannot be measured

    @property
    def selected(self) -> int:
        """The number of latents that the mask replaces."""
        return int((self.theta_F > 0).sum())

    def step(self, ctx: EvalContext, batch: "PairBatch", source_ND: Tensor, temperature: float) -> None:
        """One step of training."""
        hook = self.target.hook
        mask_F = torch.sigmoid(self.theta_F / temperature)
        x_NSD = exchange(self.target.sae, batch.run.activations[hook], batch.prompts.entity_N, source_ND, mask_F)
        final_NSD = batch.run.run_from(hook, x_NSD)
        logits_NV = ctx.model.unembed(final_NSD[torch.arange(len(final_NSD)), batch.prompts.last_N]).float()
        loss = torch.nn.functional.cross_entropy(logits_NV, batch.target_N)
        (self.theta_F.grad,) = torch.autograd.grad(loss, self.theta_F)
        self.optimizer.step()
        self.loss = float(loss.detach())


@dataclass(frozen=True)
class PairBatch:
    """A batch of pairs: the base prompts, the model's pass over them up to the hooks, the indices of the source prompts
    (N,), and the wanted tokens (N,)."""

    prompts: PaddedPrompts
    run: PrefixPass
    source_N: Tensor  # indices of the prompts
    target_N: Tensor

    @classmethod
    def of(
        cls, ctx: EvalContext, prompts: Sequence[FactPrompt], pairs: Sequence[FactPair], hooks: Sequence[Hook]
    ) -> Self:
        padded = pad_prompts([prompts[pair.base] for pair in pairs], pad_id(ctx.tokenizer), ctx.model.device)
        indices_N2 = torch.tensor([[p.source, p.target] for p in pairs])
        source_N, target_N = copy_to_device(indices_N2, ctx.model.device).T
        return cls(padded, ctx.model.prefix(padded.ids_NS, hooks), source_N, target_N)


def exchange(sae: SAELike, x_NSD: Tensor, position_N: Tensor, source_ND: Tensor, mask_F: Tensor) -> Tensor:
    """The activations (N, S, D), where those at `position_N` are decoded from base and source latents mixed by the
    mask.

    Raises SaeError if the latents are NaN or infinite.
    """
    row_N = torch.arange(len(x_NSD))
    base_ND = x_NSD[row_N, position_N]
    with torch.no_grad():
        base_NF, source_NF = encode_finite(sae, base_ND), encode_finite(sae, source_ND)
    mixed_NF = (1 - mask_F) * base_NF + mask_F * source_NF
    changed_NSD = x_NSD.clone()
    changed_NSD[row_N, position_N] = reconstruct(sae, mixed_NF, base_ND).to(x_NSD.dtype)
    return changed_NSD


def temperatures(steps: int, dtype: torch.dtype) -> list[float]:
    """The temperature of every step, rounded to the model's dtype as in SAEBench."""
    first, last = (float(torch.log10(torch.tensor(end))) for end in (FIRST_TEMPERATURE, LAST_TEMPERATURE))
    found: list[float] = torch.logspace(first, last, steps, dtype=dtype).tolist()
    return found


def train_masks(
    ctx: EvalContext,
    masks: Sequence[Mask],
    prompts: Sequence[FactPrompt],
    rows: dict[Hook, Tensor],
    batches: Sequence[Sequence[FactPair]],
    epochs: int,
    what: str,
    progress: Progress,
) -> None:
    """Train the masks of all SAEs on the same batches. `rows` contains the entity's activations for every prompt (N,
    d).

    An SAE that cannot be measured gets an `error` and is left out.
    """
    schedule = temperatures(epochs * len(batches), next(ctx.model.model.parameters()).dtype)
    for number, temperature in enumerate(schedule):
        working = [mask for mask in masks if mask.error is None]
        if not working:
            return
        hooks = sorted({mask.target.hook for mask in working})
        batch = PairBatch.of(ctx, prompts, batches[number % len(batches)], hooks)
        for mask in working:
            try:
                with torch.enable_grad():
                    mask.step(ctx, batch, rows[mask.target.hook][batch.source_N], temperature)
            except SaeError as error:
                mask.error = error
        progress(number + 1, len(schedule), f"steps of the masks for {what}")


@torch.no_grad()
def answer_under(
    ctx: EvalContext, mask: Mask, prompts: Sequence[FactPrompt], rows_ND: Tensor, pairs: Sequence[FactPair], tokens: int
) -> list[str]:
    """The model's answer to the base of each pair, with the masked latents taken from the source."""
    pad = pad_id(ctx.tokenizer)
    mask_F = (mask.theta_F > 0).float()
    answers: list[str] = []
    for start in range(0, len(pairs), PAIRS_PER_GENERATION):
        chosen = pairs[start : start + PAIRS_PER_GENERATION]
        batch = pad_prompts([prompts[pair.base] for pair in chosen], pad, ctx.model.device, left=True)
        source_ND = rows_ND[[pair.source for pair in chosen]]
        change = partial(exchange, mask.target.sae, position_N=batch.entity_N, source_ND=source_ND, mask_F=mask_F)
        with ctx.model.patching(mask.target.hook, in_first_pass(change)):
            answers += ctx.tokenizer.batch_decode(generate(ctx.model, batch, tokens, pad))
    return answers


def in_first_pass(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply `change` in the first pass of a generation only: the later passes contain only generated tokens."""
    passes = itertools.count()
    return lambda x_NSD: change(x_NSD) if next(passes) == 0 else x_NSD
