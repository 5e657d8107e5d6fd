"""Find the tokens of a text on which randomly chosen latents of each SAE fire (autointerp).

Shape suffixes: N rows of one forward pass, S positions, P tokens on which a latent fires, T counted tokens, D d_in,
B tokens of one encode, K latents.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...cache.outliers import outlier_mask
from ...common.device import copy_to_device
from ..context import EvalContext
from .base import EvalTarget, Progress
from .packing import TOKENS_PER_ENCODE, PackedRows, encode_float32, forward_batches

MAX_FIRINGS = 20_000_000  # activations held in memory in one pass of the model


def collect_firings(
    ctx: EvalContext,
    rows: PackedRows,
    targets: Sequence[EvalTarget],
    drawn: Sequence[Sequence[int]],
    shares: Sequence[np.ndarray],
    progress: Progress,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """For every latent in `drawn`, yield (index of the target, latent, flat positions in the rows, activations there).

    The model makes as few passes over the rows as MAX_FIRINGS allows. The number of firings of each latent is estimated
    from `shares`, the shares of tokens on which the latents fire.
    """
    passes: list[list[list[int]]] = []  # for each pass, the latents of each target
    total = MAX_FIRINGS + 1.0
    for number, latents in enumerate(drawn):
        for latent in latents:
            count = float(shares[number][latent]) * rows.ids.numel()
            if total + count > MAX_FIRINGS:
                passes.append([[] for _ in drawn])
                total = 0.0
            passes[-1][number].append(latent)
            total += count
    for pass_number, latents_of_target in enumerate(passes, 1):
        report = partial(progress, note=f"rows for passages, pass {pass_number} of {len(passes)}")
        firings = collect_in_one_pass(ctx, rows, targets, latents_of_target, report)
        for number, of_target in enumerate(firings):
            for latent, (flat_P, value_P) in zip(latents_of_target[number], of_target, strict=True):
                yield number, latent, flat_P, value_P


def collect_in_one_pass(
    ctx: EvalContext,
    rows: PackedRows,
    targets: Sequence[EvalTarget],
    latents_of_target: Sequence[list[int]],
    progress: Progress,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """For each target and each of its latents, the flat positions where it fires and its activations there."""
    device = ctx.model.device
    hooks = sorted({target.hook for target, latents in zip(targets, latents_of_target, strict=True) if latents})
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in targets]
    ids, counted = (forward_batches(copy_to_device(part, device)) for part in (rows.ids, rows.counted))
    done = 0
    for ids_NS, counted_NS in zip(ids, counted, strict=True):
        flat_T = counted_NS.flatten().nonzero().squeeze(1) + done * ids_NS.shape[1]
        activations = ctx.model.capture_hooks(ids_NS, hooks)
        for target, latents, of_target in zip(targets, latents_of_target, parts, strict=True):
            if latents:
                x_TD = activations[target.hook][counted_NS]
                kept_T = ~outlier_mask(x_TD, target.norm_limit)
                kept = zip(*(part.split(TOKENS_PER_ENCODE) for part in (x_TD[kept_T], flat_T[kept_T])), strict=True)
                for x_BD, flat_B in kept:
                    f_BK = encode_float32(target.sae, x_BD)[:, latents]
                    token, k = (f_BK > 0).nonzero(as_tuple=True)
                    of_target.append((flat_B[token].cpu(), k.to(torch.int32).cpu(), f_BK[token, k].cpu()))
        done += len(ids_NS)
        progress(done, len(rows.ids))
    return [
        group_by_latent(of_target, len(latents)) for of_target, latents in zip(parts, latents_of_target, strict=True)
    ]


def group_by_latent(parts: list[tuple[Tensor, Tensor, Tensor]], latents: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Group (position, latent, value) triples by latent. Positions stay in ascending order."""
    if not latents:
        return []
    flat, k, value = (torch.cat(column) for column in zip(*parts, strict=True))
    order = k.argsort(stable=True)
    ends = torch.bincount(k, minlength=latents).cumsum(0)[:-1].numpy()
    return list(zip(np.split(flat[order].numpy(), ends), np.split(value[order].numpy(), ends), strict=True))
