"""The canonical form of an SAE: every export is written from it and every import is read into it.

    z = x W_enc + b_enc                     b_dec is folded into b_enc, and W_dec has unit rows
    relu      f = ReLU(z)
    topk      f = ReLU(z) where z is among the k largest of its token
    jumprelu  f = ReLU(z) where z > threshold
    gated     f = ReLU(exp(r_mag) x W_enc + b_mag) where z > 0
    x_hat = f W_dec + b_dec

If `layer_norm` is set, x is the layer-normalized token and x_hat is its reconstruction before the norm is undone.

All tensors are float64. `to_canonical` folds the activation chain of an SAE into this form link by link (`fold_link`).
A link without a folding rule makes the latents of a token depend on each other in the encoder. No other library can
store such an SAE, so for such a link, `fold_link` raises an error with the name of the link.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import cast

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..activation_functions import Activation, BatchTopK, ReLU, TopK
from ..layer_norm import layer_normalize
from ..sae import SAE
from ..variants.collapse.batch_norm import BatchNorm
from ..variants.collapse.orthogonality import GramSchmidtLatents
from ..variants.gated import Gated
from ..variants.jumprelu import JumpReLU
from ..variants.progressive.growth import EnabledLatents

FLOAT32_ROUNDING = 2.0**-22  # four times the relative rounding of float32: weights and biases are rounded several times
UNIT_NORM_TOLERANCE = 1e-6  # how far a unit row's norm can be from 1 after rounding to float32


@dataclass(frozen=True)
class CanonicalSAE:
    """An SAE without its activation chain, in float64.

    `activation` is "relu", "topk", "jumprelu" or "gated". While the chain is being folded, it is "" until a link turns
    z into latents.
    """

    W_enc: Tensor  # (d_in, d_sae)
    b_enc: Tensor  # (d_sae); for a gated SAE, the gate's bias
    W_dec: Tensor  # (d_sae, d_in)
    b_dec: Tensor  # (d_in)
    activation: str = ""
    k: int = 0  # topk
    threshold: Tensor | None = None  # (d_sae), jumprelu; not negative
    r_mag: Tensor | None = None  # (d_sae), gated
    b_mag: Tensor | None = None  # (d_sae), gated
    layer_norm: bool = False

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def has_unit_rows(self) -> bool:
        return bool((self.W_dec.norm(dim=1) - 1).abs().max() < UNIT_NORM_TOLERANCE)

    @property
    def centered_b_enc(self) -> Tensor:
        """(d_sae): the b_enc of an encoder whose input is x - b_dec."""
        return self.b_enc + self.b_dec @ self.W_enc

    def with_unit_rows(self) -> "CanonicalSAE":
        """The same SAE, rescaled to unit rows of W_dec.

        A topk SAE whose rows do not have unit norm is returned unchanged: rescaling would change which latents are the
        k largest.
        """
        if self.activation == "topk" and not self.has_unit_rows:
            return self
        n_F = self.W_dec.norm(dim=1)
        n_F = torch.where(n_F > 0, n_F, 1)
        scaled = {name: n_F * t for name in ("threshold", "b_mag") if (t := getattr(self, name)) is not None}
        return replace(self, W_enc=self.W_enc * n_F, b_enc=self.b_enc * n_F, W_dec=self.W_dec / n_F[:, None], **scaled)

    def convert_to(self, activations: Sequence[str]) -> "CanonicalSAE | None":
        """The same SAE expressed with one of these activations, or None if there is no exact conversion.

        relu is a jumprelu with threshold 0. gated is a jumprelu too, since its gate and magnitude share W_enc.
        """
        if self.activation in activations:
            return self
        if "jumprelu" in activations and self.activation == "relu":
            return replace(self, activation="jumprelu", threshold=torch.zeros_like(self.b_enc))
        if "jumprelu" in activations and self.activation == "gated":
            assert self.r_mag is not None and self.b_mag is not None
            gain_F = self.r_mag.exp()
            threshold_F = self.b_mag - gain_F * self.b_enc  # the magnitude's pre-activation when the gate opens
            return replace(
                self, activation="jumprelu", W_enc=self.W_enc * gain_F, b_enc=self.b_mag,
                threshold=threshold_F.clamp_min(0), r_mag=None, b_mag=None,
            )  # fmt: skip
        return None

    def is_ambiguous(self, x_BD: Tensor) -> Tensor:
        """(B, d_sae) bool: where rounding the weights to float32 could change whether a latent is active.

        x_BD: raw activations.
        """
        x_BD = layer_normalize(x_BD).x_BD if self.layer_norm else x_BD
        canonical = self.convert_to(("jumprelu", "topk"))
        assert canonical is not None
        z_BF = x_BD @ canonical.W_enc + canonical.b_enc
        magnitude_BF = x_BD.abs() @ canonical.W_enc.abs() + canonical.b_enc.abs()
        if canonical.activation == "jumprelu":
            assert canonical.threshold is not None
            return (z_BF - canonical.threshold).abs() <= FLOAT32_ROUNDING * (magnitude_BF + canonical.threshold)
        cutoff_BF = torch.zeros_like(z_BF)
        if canonical.k < canonical.d_sae:  # halfway between the smallest selected latent and the next one
            cutoff_BF += z_BF.topk(canonical.k + 1, dim=-1).values[:, -2:].mean(1, keepdim=True).clamp_min(0)
        largest_B1 = magnitude_BF.amax(1, keepdim=True)
        distance_BF = torch.minimum((z_BF - cutoff_BF).abs(), z_BF.abs())
        return distance_BF <= FLOAT32_ROUNDING * (magnitude_BF + largest_B1)


# --- from an SAE ------------------------------------------------------------------------------------------------------


def to_canonical(sae: SAE) -> CanonicalSAE:
    """The SAE as a function of raw activations, in float64 with unit decoder rows (except for topk).

    Raises UsageError if a link makes latents depend on each other; the message names the link.
    """
    canonical = linear_part(sae)
    for link in activation_chain(sae):
        canonical = fold_link(link, canonical)
    return require_activation(canonical).with_unit_rows()


def fold_until_coupling(sae: SAE) -> CanonicalSAE:
    """Fold the links of the activation chain up to, but not including, the first that makes latents interdependent."""
    canonical = linear_part(sae)
    for link in activation_chain(sae):
        try:
            canonical = fold_link(link, canonical)
        except UsageError:
            break
    return canonical


def linear_part(sae: SAE) -> CanonicalSAE:
    """The encoder and decoder of an SAE, without its activation chain."""
    W_enc, b_enc, W_dec, b_dec = map(to_float64, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    b_enc = b_enc - b_dec @ W_enc if sae.pre_bias else b_enc
    return CanonicalSAE(W_enc, b_enc, W_dec, b_dec, layer_norm=sae.layer_norm)


def activation_chain(sae: SAE) -> list[Activation]:
    return [cast(Activation, link) for link in sae.activation]


def chain_name(sae: SAE) -> str:
    """The names of the links of the activation chain, joined by "+": "relu+winner_take_all"."""
    return "+".join(link.name for link in activation_chain(sae))


def require_activation(canonical: CanonicalSAE) -> CanonicalSAE:
    if not canonical.activation:
        raise UsageError("This SAE has no activation function: its latents can be negative, which no format can store.")
    return canonical


def to_float64(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


@singledispatch
def fold_link(link: Activation, canonical: CanonicalSAE) -> CanonicalSAE:
    """Fold one link of the activation chain into the links before it.

    Raises UsageError if no format can store them all.
    """
    raise UsageError(
        f"The activation {getattr(link, 'name', type(link).__name__)!r} makes the latents of a token depend on each "
        "other, which no other library's format can store. --approximate topk, jumprelu or relu writes the nearest SAE "
        "of that kind and reports how far it is from this one."
    )


def set_activation(link: Activation, canonical: CanonicalSAE, activation: str) -> CanonicalSAE:
    """Set the activation that turns z into latents.

    If an activation is already set, the new one has to be relu, and setting it changes nothing.
    """
    if canonical.activation and activation != "relu":
        raise UsageError(
            f"The activation {link.name!r} follows {canonical.activation!r}, and no format can store both."
        )
    return canonical if canonical.activation else replace(canonical, activation=activation)


@fold_link.register
def _(link: ReLU, canonical: CanonicalSAE) -> CanonicalSAE:
    return set_activation(link, canonical, "relu")


@fold_link.register
def _(link: TopK, canonical: CanonicalSAE) -> CanonicalSAE:
    return replace(set_activation(link, canonical, "topk"), k=int(link.k))


@fold_link.register
def _(link: BatchTopK, canonical: CanonicalSAE) -> CanonicalSAE:
    threshold_F = to_float64(link.threshold).clamp_min(0).expand(canonical.d_sae).clone()
    return replace(set_activation(link, canonical, "jumprelu"), threshold=threshold_F)


@fold_link.register
def _(link: JumpReLU, canonical: CanonicalSAE) -> CanonicalSAE:
    threshold_F = to_float64(link.threshold)
    if (threshold_F < 0).any():
        raise UsageError(
            f"{int((threshold_F < 0).sum())} thresholds of this jumprelu are negative, so its latents can be negative; "
            "no format can store that."
        )
    return replace(set_activation(link, canonical, "jumprelu"), threshold=threshold_F)


@fold_link.register
def _(link: Gated, canonical: CanonicalSAE) -> CanonicalSAE:
    r_mag, b_gate, b_mag = map(to_float64, (link.r_mag, link.b_gate, link.b_mag))
    gated = set_activation(link, canonical, "gated")
    return replace(gated, b_enc=canonical.b_enc + b_gate, r_mag=r_mag, b_mag=b_mag + r_mag.exp() * canonical.b_enc)


@fold_link.register
def _(link: BatchNorm, canonical: CanonicalSAE) -> CanonicalSAE:
    if canonical.activation:
        return fold_link.dispatch(Activation)(link, canonical)
    gain_F = to_float64(link.gain_F) / (to_float64(link.variance_F) + to_float64(link.eps)).sqrt()
    b_enc = gain_F * (canonical.b_enc - to_float64(link.mean_F)) + to_float64(link.shift_F)
    return replace(canonical, W_enc=canonical.W_enc * gain_F, b_enc=b_enc)


@fold_link.register
def _(link: EnabledLatents, canonical: CanonicalSAE) -> CanonicalSAE:
    if canonical.activation:
        return fold_link.dispatch(Activation)(link, canonical)
    on_F = to_float64(link.on_F) > 0
    return replace(canonical, W_enc=canonical.W_enc * on_F, b_enc=torch.where(on_F, canonical.b_enc, -1.0))


@fold_link.register
def _(link: GramSchmidtLatents, canonical: CanonicalSAE) -> CanonicalSAE:
    return canonical  # acts only while training


# --- to an SAE --------------------------------------------------------------------------------------------------------


def from_canonical(canonical: CanonicalSAE, *, pre_bias: bool = False) -> SAE:
    """An `SAE` in float32. If `pre_bias` is set, the encoder reads x - b_dec, as in many formats."""
    links: dict[str, Activation] = {
        "relu": ReLU(),
        "topk": TopK(max(canonical.k, 1)),
        "jumprelu": JumpReLU(canonical.d_sae, bandwidth=0.001),  # used only in training; no format records it
        "gated": Gated(canonical.d_sae),
    }
    link = links[canonical.activation]
    with torch.device("meta"):
        sae = SAE(canonical.d_in, canonical.d_sae, [link], pre_bias=pre_bias, layer_norm=canonical.layer_norm)
    b_enc = canonical.centered_b_enc if pre_bias else canonical.b_enc
    tensors = {"W_enc": canonical.W_enc, "b_enc": b_enc, "W_dec": canonical.W_dec, "b_dec": canonical.b_dec}
    if canonical.activation == "jumprelu":
        assert canonical.threshold is not None
        tensors["activation.0.threshold"] = canonical.threshold.clamp_min(0)  # below 0 the ReLU decides
    if canonical.activation == "gated":
        assert canonical.r_mag is not None and canonical.b_mag is not None
        # `Gated` contains the gate's bias. The gate and the magnitude read the same z, so b_enc is zero.
        b_mag = canonical.b_mag
        if pre_bias:
            b_mag = b_mag + canonical.r_mag.exp() * (canonical.b_dec @ canonical.W_enc)
        tensors |= {"activation.0.r_mag": canonical.r_mag, "activation.0.b_gate": b_enc, "activation.0.b_mag": b_mag}
        tensors["b_enc"] = torch.zeros_like(b_enc)
    sae.load_state_dict({name: t.float().contiguous() for name, t in tensors.items()}, assign=True)
    return sae.requires_grad_(False).eval()
