"""Steer a model with a latent: add its direction to the residual stream while the model runs, or hold it at a value."""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.layout import Hook
from ...common.errors import UsageError
from ...harvest.model import LanguageModel
from ...train.sae import SAE

Positions = slice | Collection[int] | None


@contextlib.contextmanager
def steering(
    model: nn.Module, sae: SAE, latent: int, strength: float | None = None, *, clamp: float | None = None,
    positions: Positions = None,
) -> Iterator[nn.Module]:  # fmt: skip
    """While this is open, a model of transformers runs with a latent of an SAE pushed; gives the model.

    With `strength`, x becomes x + strength * d where the SAE reads, d being the latent's decoder row at unit norm. With
    `clamp` the latent's activation f(x) is set to that value instead: x + (clamp - f(x)) * W_dec[latent]. Both at every
    token, or at `positions` only: a slice, or numbers, as the model counts its tokens from 0, padding on the left too.
    Position 0 is BOS, whose rows a cache leaves out: an SAE has not seen one, so clamp at `slice(1, None)`.

        with sae.steering(model, s, latent=123, strength=8.0):
            model.generate(**tokenizer("The", return_tensors="pt"))

    The model is as it was afterwards, also after an error. Several can be open at once. Raises UsageError when the SAE
    does not fit the model or does not say which layer it is of, or when neither or both of strength and clamp are given.
    """
    if not isinstance(sae, SAE) or not hasattr(model, "config"):
        raise UsageError(
            "Steering takes a model of transformers and an SAE: sae.steering(model, sae.load_sae(...), latent=...)."
        )
    language_model, where = LanguageModel(model), PositionMask(positions)
    hook = hook_of_sae(sae, language_model)
    if latent not in range(sae.d_sae):
        raise UsageError(f"There is no latent {latent!r}: the SAE has {sae.d_sae}, from 0 to {sae.d_sae - 1}.")
    if (strength is None) == (clamp is None):
        raise UsageError("Give either strength, which is added, or clamp, at which the latent is held.")
    if not math.isfinite(pushed := clamp if strength is None else strength):  # type: ignore[arg-type]
        raise UsageError(f"{pushed} is no activation. Give a finite number.")
    row_D = sae.W_dec[latent].detach().float()
    if strength is not None and not row_D.norm() > 0:
        raise UsageError(f"Latent {latent} has no direction: its decoder row is zero.")

    def added(x_NSD: Tensor) -> Tensor:
        if strength is not None:
            return (strength * (row_D / row_D.norm())).to(x_NSD)
        f_NS = sae.encode(x_NSD.to(row_D))[..., latent]
        return ((clamp - f_NS)[..., None] * row_D).to(x_NSD)

    def change(x_NSD: Tensor) -> Tensor:
        return x_NSD + torch.where(where.mask(x_NSD.device)[..., None], added(x_NSD), 0)

    with where.watching(language_model.blocks[hook.layer]), language_model.patching(hook, change):
        yield model


def hook_of_sae(sae: SAE, model: LanguageModel) -> Hook:
    """Where the SAE reads; UsageError when the model has no such place, or another width there."""
    if "layer" not in sae.origin:
        raise UsageError("This SAE does not say of which layer it is. Set sae.origin['layer'], a zero-based block.")
    hook = Hook(sae.origin["layer"], sae.origin.get("site", "resid_post"))
    if hook.layer >= len(model.blocks) or model.width(hook) != sae.d_in:
        raise UsageError(
            f"The SAE is of {hook} and {sae.d_in} wide; this {type(model.model).__name__} has {len(model.blocks)} blocks and is "
            f"{model.width(hook)} wide there. Load the model that the SAE was trained on."
        )
    return hook


class PositionMask:
    """Which tokens of a pass are meant; a pass with a cache brings only those that are new."""

    def __init__(self, positions: Positions) -> None:
        if isinstance(positions, slice) and any(
            end is not None and end < 0 for end in (positions.start, positions.stop)
        ):
            raise UsageError(f"{positions} counts from an end that is not known while the model writes. Count from 0.")
        self.positions = positions
        self.here: Any = None

    @contextlib.contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Note what positions the block is called with."""

        def note(_module: nn.Module, _inputs: Any, keywords: dict[str, Any]) -> None:
            here = keywords.get("position_ids")
            self.here = here if here is not None else keywords.get("cache_position")

        handle = block.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def mask(self, device: torch.device) -> Tensor:
        """(N or 1, S) bool, or (1,) for all."""
        if self.positions is None:
            return torch.ones(1, dtype=torch.bool, device=device)
        if self.here is None:
            raise UsageError("This model does not tell its blocks the positions of tokens. Leave positions out.")
        here_NS = self.here.reshape(-1, self.here.shape[-1]).to(device)
        if not isinstance(self.positions, slice):
            return torch.isin(here_NS, torch.tensor(sorted(self.positions), device=device))
        start, stop, step = self.positions.start or 0, self.positions.stop, self.positions.step or 1
        inside_NS = (here_NS >= start) & ((here_NS - start) % step == 0)
        return inside_NS if stop is None else inside_NS & (here_NS < stop)
