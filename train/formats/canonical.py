"""An SAE without its chain: what every format can be written from.

    z = x W_enc + b_enc                     b_dec is inside b_enc, and W_dec has unit rows
    relu      f = ReLU(z)
    topk      f = ReLU(z) where z is among the k largest of its token
    jumprelu  f = ReLU(z) where z > threshold
    gated     f = ReLU(exp(r_mag) x W_enc + b_mag) where z > 0
    x_hat = f W_dec + b_dec

All in float64. A chain folds into it link by link (`settle`); a link that is not known here couples the latents of a
token when it encodes, and is refused by its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..activations import Activation, BatchTopK, ReLU, TopK
from ..sae import SAE
from ..variants.collapse import BatchNorm, GramSchmidtLatents
from ..variants.gated import Gated
from ..variants.jumprelu import JumpReLU
from ..variants.progressive import EnabledLatents

FLOAT32_ROUNDING = 2.0**-22  # of float32, four times: a weight and a bias here and there
UNIT_NORM_TOLERANCE = 1e-6  # how far from 1 the norm of a unit row of float32 can be


@dataclass(frozen=True)
class CanonicalSAE:
    """`kind` is "" while no link has made latents of z yet."""

    W_enc: Tensor  # (d_in, d_sae)
    b_enc: Tensor  # (d_sae)
    W_dec: Tensor  # (d_sae, d_in)
    b_dec: Tensor  # (d_in)
    kind: str = ""
    k: int = 0
    threshold: Tensor | None = None  # (d_sae), of jumprelu, not negative
    r_mag: Tensor | None = None  # (d_sae), of gated
    b_mag: Tensor | None = None  # (d_sae), of gated; b_enc is then that of the gate

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def unit_rows(self) -> bool:
        return bool((self.W_dec.norm(dim=1) - 1).abs().max() < UNIT_NORM_TOLERANCE)

    @property
    def input_bias(self) -> Tensor:
        """(d_sae): b_enc for an encoder that sees x - b_dec."""
        return self.b_enc + self.b_dec @ self.W_enc

    def unit(self) -> "CanonicalSAE":
        """The same with unit rows of W_dec. Of a topk it would change which latents are chosen, unless they nearly are."""
        if self.kind == "topk" and not self.unit_rows:
            return self
        n_F = self.W_dec.norm(dim=1)
        n_F = torch.where(n_F > 0, n_F, 1)
        scaled = {name: n_F * t for name in ("threshold", "b_mag") if (t := getattr(self, name)) is not None}
        return replace(self, W_enc=self.W_enc * n_F, b_enc=self.b_enc * n_F, W_dec=self.W_dec / n_F[:, None], **scaled)

    def within(self, kinds: Sequence[str]) -> "CanonicalSAE | None":
        """The same SAE as one of these kinds, or None. A relu jumps at 0; a gate is a jump, its two paths sharing W_enc."""
        if self.kind in kinds:
            return self
        if "jumprelu" in kinds and self.kind == "relu":
            return replace(self, kind="jumprelu", threshold=torch.zeros_like(self.b_enc))
        if "jumprelu" in kinds and self.kind == "gated":
            assert self.r_mag is not None and self.b_mag is not None
            gain_F = self.r_mag.exp()
            shift_F = self.b_mag - gain_F * self.b_enc  # where z + b_gate is 0
            return replace(
                self, kind="jumprelu", W_enc=self.W_enc * gain_F, b_enc=self.b_mag, threshold=shift_F.clamp_min(0),
                r_mag=None, b_mag=None,
            )  # fmt: skip
        return None

    def doubt(self, x_BD: Tensor) -> Tensor:
        """(B, d_sae) bool: where float32's rounding of the weights could decide whether a latent fires."""
        plain = self.within(("jumprelu", "topk"))
        assert plain is not None
        z_BF = x_BD @ plain.W_enc + plain.b_enc
        size_BF = x_BD.abs() @ plain.W_enc.abs() + plain.b_enc.abs()
        if plain.kind == "jumprelu":
            assert plain.threshold is not None
            return (z_BF - plain.threshold).abs() <= FLOAT32_ROUNDING * (size_BF + plain.threshold)
        edge_BF = torch.zeros_like(z_BF)
        if plain.k < plain.d_sae:  # the middle between the last that is kept and the first that is not
            edge_BF += z_BF.topk(plain.k + 1, dim=-1).values[:, -2:].mean(1, keepdim=True).clamp_min(0)
        largest_B1 = size_BF.amax(1, keepdim=True)
        return torch.minimum((z_BF - edge_BF).abs(), z_BF.abs()) <= FLOAT32_ROUNDING * (size_BF + largest_B1)


def to_canonical(sae: SAE) -> CanonicalSAE:
    """The SAE, taking raw activations, in float64 with unit rows. UsageError names a link that couples latents."""
    plain = linear_part(sae)
    for link in sae.activation:
        plain = fold_link(link, plain)
    return require_activation(plain)


def linear_part(sae: SAE) -> CanonicalSAE:
    """An SAE before its chain."""
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).detach().double().cpu() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return CanonicalSAE(W_enc, b_enc - b_dec @ W_enc if sae.pre_bias else b_enc, W_dec, b_dec)


def fold_until_coupling(sae: SAE) -> CanonicalSAE:
    """An SAE as far as its chain codes each latent by itself."""
    plain = linear_part(sae)
    for link in sae.activation:
        try:
            plain = fold_link(link, plain)
        except UsageError:
            break
    return plain


def require_activation(plain: CanonicalSAE) -> CanonicalSAE:
    if not plain.kind:
        raise UsageError("Latents of this SAE are never made zero or positive; no format holds that.")
    return plain.unit()


def to_float64(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


@singledispatch
def fold_link(link: Activation, plain: CanonicalSAE) -> CanonicalSAE:
    """What follows of the chain up to this link. UsageError where no format can hold it."""
    raise UsageError(
        f"The activation {getattr(link, 'name', type(link).__name__)!r} makes the latents of a token depend on each other, "
        "which no format of another library can hold. "
        "--approximate topk, jumprelu or relu writes the nearest of these, and says how far it is."
    )


def set_activation(link: Activation, plain: CanonicalSAE, kind: str) -> CanonicalSAE:
    """z becomes latents; a second time only a relu can follow, which then changes nothing."""
    if plain.kind and kind != "relu":
        raise UsageError(f"The activation {link.name!r} follows another one ({plain.kind}); no format holds both.")
    return plain if plain.kind else replace(plain, kind=kind)


@fold_link.register
def _(link: ReLU, plain: CanonicalSAE) -> CanonicalSAE:
    return set_activation(link, plain, "relu")


@fold_link.register
def _(link: TopK, plain: CanonicalSAE) -> CanonicalSAE:
    return replace(set_activation(link, plain, "topk"), k=int(link.k))


@fold_link.register
def _(link: BatchTopK, plain: CanonicalSAE) -> CanonicalSAE:
    jump_F = to_float64(link.threshold).clamp_min(0).expand(plain.d_sae).clone()
    return replace(set_activation(link, plain, "jumprelu"), threshold=jump_F)


@fold_link.register
def _(link: JumpReLU, plain: CanonicalSAE) -> CanonicalSAE:
    jump_F = to_float64(link.threshold)
    if (jump_F < 0).any():
        raise UsageError(
            f"{int((jump_F < 0).sum())} thresholds of this jumprelu are negative, so latents can be; no format holds that."
        )
    return replace(set_activation(link, plain, "jumprelu"), threshold=jump_F)


@fold_link.register
def _(link: Gated, plain: CanonicalSAE) -> CanonicalSAE:
    r_mag, b_gate, b_mag = map(to_float64, (link.r_mag, link.b_gate, link.b_mag))
    whole = set_activation(link, plain, "gated")
    return replace(whole, b_enc=plain.b_enc + b_gate, r_mag=r_mag, b_mag=b_mag + r_mag.exp() * plain.b_enc)


@fold_link.register
def _(link: BatchNorm, plain: CanonicalSAE) -> CanonicalSAE:
    if plain.kind:
        return fold_link.dispatch(Activation)(link, plain)
    gain_F = to_float64(link.gain_F) / (to_float64(link.variance_F) + to_float64(link.eps)).sqrt()
    b_enc = gain_F * (plain.b_enc - to_float64(link.mean_F)) + to_float64(link.shift_F)
    return replace(plain, W_enc=plain.W_enc * gain_F, b_enc=b_enc)


@fold_link.register
def _(link: EnabledLatents, plain: CanonicalSAE) -> CanonicalSAE:
    if plain.kind:
        return fold_link.dispatch(Activation)(link, plain)
    on_F = to_float64(link.on_F) > 0
    return replace(plain, W_enc=plain.W_enc * on_F, b_enc=torch.where(on_F, plain.b_enc, -1.0))


@fold_link.register
def _(link: GramSchmidtLatents, plain: CanonicalSAE) -> CanonicalSAE:
    return plain  # of a trained SAE it does nothing


def from_canonical(plain: CanonicalSAE, *, pre_bias: bool = False) -> SAE:
    """An SAE of ours in float32. With `pre_bias` its encoder sees x - b_dec, as that of many formats does."""
    links: dict[str, Activation] = {
        "relu": ReLU(),
        "topk": TopK(max(plain.k, 1)),
        "jumprelu": JumpReLU(plain.d_sae, bandwidth=0.001),  # of the training, and unknown
        "gated": Gated(plain.d_sae),
    }
    link = links[plain.kind]
    with torch.device("meta"):
        sae = SAE(plain.d_in, plain.d_sae, [link], pre_bias=pre_bias)
    b_enc = plain.input_bias if pre_bias else plain.b_enc
    tensors = {"W_enc": plain.W_enc, "b_enc": b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if plain.kind == "jumprelu":
        assert plain.threshold is not None
        tensors["activation.0.threshold"] = plain.threshold.clamp_min(0)  # a latent is not negative below it
    if plain.kind == "gated":
        assert plain.r_mag is not None and plain.b_mag is not None
        # The gate's bias goes where ours has it; both paths see the same z.
        tensors |= {"activation.0.r_mag": plain.r_mag, "activation.0.b_gate": b_enc, "b_enc": torch.zeros_like(b_enc)}
        b_mag = plain.b_mag + plain.r_mag.exp() * (plain.b_dec @ plain.W_enc) if pre_bias else plain.b_mag
        tensors["activation.0.b_mag"] = b_mag
    sae.load_state_dict({name: t.float().contiguous() for name, t in tensors.items()}, assign=True)
    return sae.requires_grad_(False).eval()
