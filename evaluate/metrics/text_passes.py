"""The model's passes over the text on which core is measured, stored in the artifact cache so that they are not
repeated for later SAEs.

Shape suffixes: N contexts, S positions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...common.device import copy_to_device
from ...common.errors import UnavailableError
from ...common.files import free_space
from ...harvest.architectures import hook_width
from ...harvest.model import ForwardPass
from ..context import ContextBatch, EvalContext
from .base import Progress

MAX_BYTES = 2 * 10**9  # the passes over a text are not stored if they take more than this
FREE_SHARE = 0.25  # share of the free disk space that the passes may take
KIND = "text_pass"  # kind of the artifacts: the activations of a batch at one hook, or its last hidden state


class TextPasses:
    """The model's passes over the batches of a text, up to the hooks or, if losses are measured, through all layers."""

    def __init__(self, ctx: EvalContext, hooks: Sequence[Hook], batches: Sequence[ContextBatch]) -> None:
        self.ctx, self.hooks, self.batches = ctx, hooks, batches
        self.keeps: bool | None = None  # whether passes are stored; decided by the size of the first pass

    def activations(self, batch: ContextBatch) -> Mapping[Hook, Tensor]:
        """The activations (N, S, d) at the hooks."""
        if (found := self.read(batch, self.hooks, final=False)) is not None:
            return found[0]
        activations = self.ctx.model.capture_hooks(batch.ids, self.hooks)
        self.keep(batch, activations, None)
        return activations

    def whole(self, batch: ContextBatch) -> ForwardPass:
        """A pass through all layers of the model. It can be run again from any of the hooks onward."""
        model = self.ctx.model
        kept = model.hooks_to_keep(self.hooks)
        if (found := self.read(batch, kept, final=True)) is not None:
            return model.resume(batch.ids, self.hooks, *found)
        run = model.forward(batch.ids, self.hooks)
        self.keep(batch, run.kept, run.final)
        return run

    def compute_together(self, with_losses: int, progress: Progress) -> None:
        """Divide the passes that are not stored yet among the ranks, so that each batch is computed by one rank.

        The first `with_losses` batches run through all layers of the model, the others only up to the hooks. Does
        nothing if the command has a single process. If the results of the passes are too large to be stored, each rank
        runs the passes itself when it needs them.
        """
        if not self.ctx.artifacts.shared:
            return
        wholly_kept = self.ctx.model.hooks_to_keep(self.hooks)
        for wait in (False, True):  # first the free batches, then those that another rank has begun but not finished
            for number, batch in enumerate(self.batches):
                hooks, final = (wholly_kept, True) if number < with_losses else (self.hooks, False)
                if self.keeps is False or self.contains(batch, hooks, final):
                    continue
                progress(number, len(self.batches), "passes of the model, divided among all ranks")
                with self.ctx.artifacts.turn(f"{KIND}-batch-{digest_of_ids(batch)[:16]}", wait) as is_mine:
                    if is_mine and not self.contains(batch, hooks, final):
                        self.whole(batch) if final else self.activations(batch)

    def contains(self, batch: ContextBatch, hooks: Sequence[Hook], final: bool) -> bool:
        """Whether a batch's activations at the hooks are stored and, if `final` is true, its last hidden state as
        well."""
        return all(self.ctx.artifacts.contains(KIND, key) for key in self.keys(batch, hooks, final))

    def keys(self, batch: ContextBatch, hooks: Sequence[Hook], final: bool) -> list[dict[str, Any]]:
        return [self.key(batch, self.depends(one)) for one in (*hooks, *([None] if final else []))]

    def read(self, batch: ContextBatch, hooks: Sequence[Hook], final: bool) -> tuple[dict[Hook, Tensor], Tensor] | None:
        """The stored tensors of a batch, on the model's device; None unless all of them are stored."""
        if not self.contains(batch, hooks, final):
            return None
        parts = [self.get(key) for key in self.keys(batch, hooks, final)]
        if any(part is None for part in parts):
            return None
        tensors = [copy_to_device(part, self.ctx.model.device) for part in parts if part is not None]
        return dict(zip(hooks, tensors, strict=False)), tensors[-1]

    def get(self, key: Mapping[str, Any]) -> Tensor | None:
        """The stored tensor, or None if its file is damaged."""

        def missing() -> dict[str, Tensor]:
            raise LookupError

        try:
            return self.ctx.artifacts.get_or_compute(KIND, key, missing)["x"]
        except LookupError:
            return None

    def keep(self, batch: ContextBatch, kept: Mapping[Hook, Tensor], final: Tensor | None) -> None:
        tensors: list[tuple[Hook | None, Tensor]] = [*kept.items()]
        if final is not None:
            tensors.append((None, final))
        if self.keeps is None:
            self.keeps = self.fits(sum(x.shape[-1] * x.element_size() for _, x in tensors))
        if self.keeps:
            for hook, x_NSD in tensors:
                key = self.key(batch, self.depends(hook))
                try:
                    self.ctx.artifacts.get_or_compute(KIND, key, partial(dict[str, Tensor], x=x_NSD))
                except UnavailableError:  # another program has filled the disk; the results do not need the stored pass
                    self.keeps = False
                    return

    def fits(self, bytes_per_position: int) -> bool:
        """Whether passes with `bytes_per_position` bytes for each position of the text are small enough to be
        stored."""
        needed = bytes_per_position * sum(one.ids.numel() for one in self.batches)
        return needed <= min(MAX_BYTES, FREE_SHARE * free_space(self.ctx.artifacts.folder))

    def missing_bytes(self, with_losses: int) -> int:
        """How many bytes are not in the cache yet, if the first `with_losses` batches run through all layers.

        Does not need the model. The number is an upper bound if a hook lies inside a block.
        """
        size = getattr(torch, self.ctx.model_identity["llm_dtype"]).itemsize
        starts = [Hook(hook.layer - 1) for hook in self.hooks if hook.site != "resid_post" and hook.layer > 0]
        widths: dict[Hook | None, int] = {
            hook: size * hook_width(hook, self.ctx.model_config) for hook in (*self.hooks, *starts)
        }
        widths[None] = size * hook_width(Hook(0), self.ctx.model_config)
        if not self.fits(sum(widths.values())):
            return 0
        contains = self.ctx.artifacts.contains
        return sum(
            width * batch.ids.numel()
            for number, batch in enumerate(self.batches)
            for hook, width in widths.items()
            if hook in self.hooks or number < with_losses
            if not contains(KIND, self.key(batch, self.depends(hook)))
        )

    def depends(self, hook: Hook | None) -> dict[str, Any]:
        return {"final": True} if hook is None else hook.record

    def key(self, batch: ContextBatch, of: Mapping[str, Any]) -> dict[str, Any]:
        """The key contains the padded shape, because results may be rounded differently with different padding."""
        return {**self.ctx.model_identity, "ids": digest_of_ids(batch), "shape": list(batch.ids.shape), **of}


def digest_of_ids(batch: ContextBatch) -> str:
    return hashlib.sha256(batch.ids.cpu().contiguous().numpy().tobytes()).hexdigest()
