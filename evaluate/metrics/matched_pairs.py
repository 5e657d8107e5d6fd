"""Match two SAEs latent by latent, by the directions of their decoders and by their activations. See stability.py.

Shape suffixes: F latents, D d_in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .base import EvalTarget
from .latent_correlation import Latents
from .latent_matching import Matching, match_latents


@dataclass(frozen=True)
class Pair:
    """The matchings of two SAEs, indexed by the latents of one of them.

    Attributes:
        decoder: matching by the absolute cosine of decoder rows.
        signed: matching by their signed cosine; the same object as `decoder` if the sign has no meaning.
        activation: matching by the absolute correlation of activations.
        varying: the number of latents that are not constant over the tokens, in the SAE that has more of them.
    """

    decoder: Matching
    signed: Matching
    activation: Matching
    varying: int

    @property
    def decoder_mcc(self) -> float:
        return self.decoder.total / len(self.decoder.partner_F)

    @property
    def activation_mcc(self) -> float:
        return self.activation.total / self.varying if self.varying else math.nan

    def inverse(self) -> "Pair":
        latents = len(self.decoder.partner_F)
        decoder = self.decoder.inverse(latents)
        signed = decoder if self.signed is self.decoder else self.signed.inverse(latents)
        return Pair(decoder, signed, self.activation.inverse(latents), self.varying)


def unit_rows(target: EvalTarget, device: str) -> Tensor:
    W_dec_FD: Tensor = target.sae.W_dec  # type: ignore[attr-defined]
    return torch.nn.functional.normalize(W_dec_FD.detach().to(device).float(), dim=1)


def match_pair(
    unit_FD: Tensor, other_FD: Tensor, latents: Latents, others: Latents, exact_latents: int, signed: bool = True
) -> Pair:
    """Match two SAEs by their decoders, given as rows of unit length, and by their activations.

    If `signed` is true, also match by the signed cosines, unless a latent of either SAE is negative at some token.
    """

    def cosine(rows: slice) -> Tensor:
        return unit_FD[rows] @ other_FD.T

    decoder = match_latents(cosine, len(unit_FD), exact_latents)
    signed = signed and not (latents.has_negative or others.has_negative)
    return Pair(
        decoder,
        match_latents(cosine, len(unit_FD), exact_latents, signed=True) if signed else decoder,
        match_latents(latents.correlation(others), len(unit_FD), exact_latents),
        int(max(latents.varies_F.sum(), others.varies_F.sum())),
    )


def recurring_cosines(pair: Pair) -> np.ndarray:
    """The cosine of each latent with its match (F,), which decides whether the latent recurs; the absolute cosine if
    signs have no meaning."""
    return np.abs(pair.signed.similarity_F) if pair.signed is pair.decoder else pair.signed.similarity_F


def matched_values(pairs: Sequence[Pair], nulls: Mapping[str, Sequence[Pair]]) -> dict[str, list[float]]:
    """PW-MCC with each other seed and with each random dictionary.

    Each kind of random dictionary has a list of values, *_null_<kind>. The list with the largest mean is also stored as
    *_null.
    """
    values: dict[str, list[float]] = {}
    for what in ("decoder", "activation"):
        values[f"{what}_pw_mcc"] = [getattr(pair, f"{what}_mcc") for pair in pairs]
        kinds = {kind: [getattr(pair, f"{what}_mcc") for pair in null] for kind, null in nulls.items()}
        values[f"{what}_pw_mcc_null"] = max(kinds.values(), key=np.mean)
        values |= {f"{what}_pw_mcc_null_{kind}": numbers for kind, numbers in kinds.items()}
    return values
