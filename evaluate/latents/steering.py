"""Steer a language model with a latent: add its decoder direction to the residual stream, or clamp its activation."""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.hooks import Hook
from ...cache.outliers import outlier_mask
from ...common.errors import UsageError
from ...harvest.model import LanguageModel
from ...train.sae import SAE

Positions = slice | Collection[int] | None


@contextlib.contextmanager
def steering(
    model: nn.Module,
    sae: SAE,
    latent: int,
    strength: float | None = None,
    *,
    clamp: float | None = None,
    positions: Positions = None,
) -> Iterator[nn.Module]:
    """Steer a transformers model with one latent of an SAE while the context is open.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("google/gemma-2-2b")
        >>> tokenizer = AutoTokenizer.from_pretrained("google/gemma-2-2b")
        >>> topk = sae.load_sae("runs/topk-L12-s0")
        >>> with sae.steering(model, topk, latent=123, strength=8.0):
        ...     model.generate(**tokenizer("The", return_tensors="pt"))

    Args:
        model: The model that the SAE was trained on, a causal language model of `transformers`.
        sae: The SAE. `sae.origin` says which layer and site it reads.
        latent: Index of the latent, 0 to d_sae - 1.
        strength: Add `strength * d` to the activations x, where d is the latent's decoder row scaled to unit norm.
        clamp: Set the latent's activation f(x) to this value instead: x + (clamp - f(x)) * W_dec[latent]. Outlier rows,
            whose norm exceeds `sae.origin["norm_limit"]`, are not changed, because f(x) is meaningless there.
        positions: The token positions to change, as a slice or a collection of numbers (default: all). Positions count
            from 0 and include padding on the left. Position 0 is usually BOS, which caches exclude, so the SAE has not
            been trained on it: use `positions=slice(1, None)` with `clamp`.

    Yields:
        The model. Steering ends when the context is closed, even after an error. Contexts can be nested.

    Raises:
        UsageError: the SAE does not fit the model or does not record its layer, the latent does not exist or has a zero
            decoder row, or strength and clamp are both given or both missing.
    """
    if not isinstance(sae, SAE) or not hasattr(model, "config"):
        raise UsageError(
            "Steering needs a transformers model and an SAE: sae.steering(model, sae.load_sae(...), latent=...)."
        )
    language_model, mask = LanguageModel(model), PositionMask(positions)
    hook = hook_of_sae(sae, language_model)
    if positions is not None and hook.is_outside:
        raise UsageError(
            f"The SAE reads {hook}, which is outside the blocks. Token positions are known only inside blocks, so "
            "omit positions."
        )
    if latent not in range(sae.d_sae):
        raise UsageError(f"There is no latent {latent!r}: the SAE has latents 0 to {sae.d_sae - 1}.")
    if (strength is None) == (clamp is None):
        raise UsageError("Give either strength (to add the direction) or clamp (to fix the activation).")
    for name, value in (("strength", strength), ("clamp", clamp)):
        if value is not None and not math.isfinite(value):
            raise UsageError(f"invalid {name} {value}: expected a finite number.")
    row_D = sae.W_dec[latent].detach().float()
    if strength is not None and not row_D.norm() > 0:
        raise UsageError(f"Latent {latent} has no direction: its decoder row is zero.")

    def steering_vector(x_NSD: Tensor) -> Tensor:
        if strength is not None:
            return (strength * (row_D / row_D.norm())).to(x_NSD)
        f_NS = sae.encode(x_NSD.to(row_D))[..., latent]
        assert clamp is not None
        vector_NSD = ((clamp - f_NS)[..., None] * row_D).to(x_NSD)
        return torch.where(outlier_mask(x_NSD, sae.origin.get("norm_limit"))[..., None], 0, vector_NSD)

    def change(x_NSD: Tensor) -> Tensor:
        return x_NSD + torch.where(mask.mask(x_NSD.device)[..., None], steering_vector(x_NSD), 0)

    with mask.record_positions(language_model.blocks[hook.layer]), language_model.patching(hook, change):
        yield model


def hook_of_sae(sae: SAE, model: LanguageModel) -> Hook:
    """The hook that the SAE reads. Raises UsageError if the model has no such hook, or if the hook's width differs from
    the SAE's."""
    if "layer" not in sae.origin:
        raise UsageError(
            "This SAE does not record its layer. Set sae.origin['layer'] to the number of a block, counted from 0."
        )
    hook = Hook.from_record(sae.origin)
    name, blocks = type(model.model).__name__, len(model.blocks)
    width = model.width(hook) if hook.layer < blocks else int(model.config.hidden_size)
    if hook.layer >= blocks or width != sae.d_in:
        raise UsageError(
            f"The SAE reads {hook} of width {sae.d_in}, but this {name} has {blocks} blocks of width {width} there. "
            "Load the model that the SAE was trained on."
        )
    return hook


class PositionMask:
    """Selects tokens by position. Positions are recorded, because with a KV cache a forward pass contains only the new
    tokens."""

    def __init__(self, positions: Positions) -> None:
        if isinstance(positions, slice) and any(
            end is not None and end < 0 for end in (positions.start, positions.stop)
        ):
            raise UsageError(
                f"invalid positions {positions}: negative positions are not defined during generation. Count from 0."
            )
        self.positions = positions
        self.position_ids: Any = None

    @contextlib.contextmanager
    def record_positions(self, block: nn.Module) -> Iterator[None]:
        """Record the positions that a block is called with."""

        def record(_module: nn.Module, _inputs: Any, keywords: dict[str, Any]) -> None:
            ids = keywords.get("position_ids")
            self.position_ids = ids if ids is not None else keywords.get("cache_position")

        handle = block.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def mask(self, device: torch.device) -> Tensor:
        """True at the selected positions: (N or 1, S) bool, or (1,) if all are selected."""
        if self.positions is None:
            return torch.ones(1, dtype=torch.bool, device=device)
        if self.position_ids is None:
            raise UsageError("This model does not pass the positions of tokens to its blocks. Omit positions.")
        position_NS = self.position_ids.reshape(-1, self.position_ids.shape[-1]).to(device)
        if not isinstance(self.positions, slice):
            return torch.isin(position_NS, torch.tensor(sorted(self.positions), device=device))
        start, stop, step = self.positions.start or 0, self.positions.stop, self.positions.step or 1
        selected_NS = (position_NS >= start) & ((position_NS - start) % step == 0)
        return selected_NS if stop is None else selected_NS & (position_NS < stop)
