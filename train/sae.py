"""The sparse autoencoder: the one object that training produces and evaluation loads.

    f     = act((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec

W_enc is (d_in, d_sae), W_dec (d_sae, d_in): its rows are the latents' directions. A saved SAE takes raw activations:
what training divided by is folded into it (`folded`).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..common.errors import DamagedError, UsageError
from ..common.files import atomic_write, read_json, write_json
from . import sparse_ops
from .activations import Activation, KeepTopK, ReLU

FORMAT = 1


class SAEOutput(NamedTuple):
    pre_BF: Tensor
    f_BF: Tensor
    recon_BD: Tensor
    kept: sparse_ops.KeptLatents | None = None  # f_BF as rows go by it; None: dense


class SAE(nn.Module):
    """Rows of W_dec start as random unit vectors, W_enc as their transpose, biases at zero.

    With `pre_bias` the encoder sees x - b_dec, without it x. `origin` says what the SAE was trained on.
    """

    def __init__(self, d_in: int, d_sae: int, activation: Sequence[Activation] = (), *, pre_bias: bool = True) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.pre_bias = d_in, d_sae, pre_bias
        w_FD = torch.randn(d_sae, d_in)
        w_FD = w_FD / w_FD.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(w_FD)
        self.W_enc = nn.Parameter(w_FD.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.activation = nn.Sequential(*(activation or [ReLU()]))
        self.origin: dict[str, Any] = {}

    def pre_activations(self, x_BD: Tensor) -> Tensor:
        """(x - b_dec) W_enc + b_enc, with the bias first: x is then shared and needs no gradient, one product less."""
        bias_F = self.b_enc - self.b_dec @ self.W_enc if self.pre_bias else self.b_enc
        z_BF = x_BD @ self.W_enc
        return z_BF.add_(bias_F) if z_BF.dtype == bias_F.dtype else z_BF + bias_F  # in place saves a pass over it

    def activate(self, z_BF: Tensor, x_BD: Tensor) -> Tensor:
        for link in self.activation:
            z_BF = link(z_BF, x_BD) if link.sees_input else link(z_BF)
        return z_BF

    def forward(self, x_BD: Tensor) -> SAEOutput:
        pre_BF = self.pre_activations(x_BD)
        if choice := self.gathers():
            at = sparse_ops.SelectedLatents.of(choice.select(pre_BF.detach()), *pre_BF.shape)
            b_D = self.b_dec if self.pre_bias else None
            kept = sparse_ops.KeptLatents(sparse_ops.encode(pre_BF, x_BD, self.W_enc, self.b_enc, b_D, at).relu(), at)
            recon_BD = sparse_ops.decode(kept, self.W_dec) + self.b_dec
            return SAEOutput(pre_BF, sparse_ops.scatter_latents(kept.value_N, at.flat_index_N, pre_BF), recon_BD, kept)
        f_BF = self.activate(pre_BF, x_BD)
        return SAEOutput(pre_BF, f_BF, self.decode(f_BF))

    def gathers(self) -> KeepTopK | None:
        """The activation, where training is to go by the rows of the latents that it chooses (`rows.pays`)."""
        choice = self.activation[0]
        alone = self.training and len(self.activation) == 1 and isinstance(choice, KeepTopK) and not choice.anneals
        return choice if alone and sparse_ops.sparse_is_faster(self.d_sae, choice.k, self.W_dec.device.type) else None

    def encode(self, x_BD: Tensor) -> Tensor:
        """Latents (..., d_sae) of activations (..., d_in), of whatever dtype; UsageError for another width."""
        x_BD = require_width(x_BD, self.d_in, "d_in").to(self.W_enc.dtype)
        return self.activate(self.pre_activations(x_BD), x_BD)

    def decode(self, f_BF: Tensor) -> Tensor:
        """Activations (..., d_in) from latents (..., d_sae); UsageError for another width."""
        return require_width(f_BF, self.d_sae, "d_sae") @ self.W_dec + self.b_dec


def require_width(rows: Tensor, width: int, name: str) -> Tensor:
    if rows.shape[-1:] != (width,):
        raise UsageError(
            f"This SAE takes rows of {name} = {width} numbers, and these are of shape {tuple(rows.shape)}."
        )
    return rows


@torch.no_grad()
def fold_normalization(sae: SAE, scale: float, mean_D: Tensor) -> SAE:
    """The SAE that does to x what `sae` does to (x - mean)/scale, its latents `scale` times as large.

    W_enc and W_dec stay; biases and thresholds scale; x_hat = scale * x_hat_normalised + mean.
    """
    raw = build_sae(sae_spec(sae), {k: v.detach().clone() for k, v in sae.state_dict().items()})
    raw.b_dec.copy_(scale * sae.b_dec + mean_D)
    raw.b_enc.copy_(scale * sae.b_enc - (0 if sae.pre_bias else mean_D @ sae.W_enc))
    for link in raw.activation:
        link.rescale_(scale)  # type: ignore[operator]
        link.recenter_(mean_D)  # type: ignore[operator]
    return raw.eval()


def sae_spec(sae: SAE) -> dict[str, Any]:
    chain = [{"name": link.name, **link.options} for link in sae.activation]  # type: ignore[dict-item]
    return {"format": FORMAT, "d_in": sae.d_in, "d_sae": sae.d_sae, "pre_bias": sae.pre_bias, "activation": chain}


def build_sae(spec: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    links = [dict(link) for link in spec["activation"]]
    unknown = [link["name"] for link in links if link["name"] not in Activation.registry]
    if unknown:
        raise UsageError(
            f"The activation {unknown[0]!r} is unknown here; known are {', '.join(sorted(Activation.registry))}. Upgrade, or convert the SAE."
        )
    with torch.device("meta"):
        sae = SAE(
            spec["d_in"],
            spec["d_sae"],
            [Activation.registry[link.pop("name")](**link) for link in links],
            pre_bias=spec["pre_bias"],
        )
    sae.load_state_dict(tensors, assign=True)
    return sae


def save_sae(sae: SAE, folder: Path, origin: dict[str, Any]) -> None:
    """Write sae.safetensors and then sae.json. `origin`: model, layer and cache, for evaluation."""
    data = to_safetensors({k: v.detach().contiguous().cpu() for k, v in sae.state_dict().items()})
    atomic_write(folder / "sae.safetensors", data)
    write_json(folder / "sae.json", {**sae_spec(sae), "sha256": hashlib.sha256(data).hexdigest(), "origin": origin})


def load_sae(folder: Path | str, device: str = "cpu") -> SAE:
    """The trained SAE of a run folder, ready to encode raw activations.

    Raises UsageError when there is none or it needs a newer version, DamagedError when its files contradict each other.
    """
    from . import variants  # noqa: F401  (registers the activations that papers bring with them)

    folder = Path(folder)
    if not (folder / "sae.json").exists():
        raise UsageError(
            f"{folder} holds no trained SAE (no sae.json). Train one with `sae train`, or finish it with `sae train --resume {folder}`."
        )
    spec = read_json(folder / "sae.json", "format", "d_in", "d_sae", "pre_bias", "activation", "sha256")
    if spec.get("format") != FORMAT:
        raise UsageError(f"{folder}/sae.json has format {spec.get('format')}; this version reads {FORMAT}. Upgrade.")
    weights = folder / "sae.safetensors"
    mend = "Remove sae.json and run the same `sae train` again: it is written anew from the last checkpoint."
    try:
        check_shapes(weights, spec["d_in"], spec["d_sae"])
        data = weights.read_bytes()
        if hashlib.sha256(data).hexdigest() != spec["sha256"]:
            raise DamagedError(f"{weights} does not have the checksum that sae.json records. {mend}")
        sae = build_sae(spec, {name: tensor.to(device) for name, tensor in load(data).items()})
    except (safetensors.SafetensorError, RuntimeError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{weights} does not hold the SAE that sae.json describes: {str(error).splitlines()[0].rstrip('.')}. {mend}"
        ) from error
    broken = [name for name, tensor in sae.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DamagedError(f"{weights}: {', '.join(broken)} has values that are not finite.")
    sae.origin = spec.get("origin", {})
    return sae.eval().requires_grad_(False)


def check_shapes(weights: Path, d_in: int, d_sae: int) -> None:
    """Read the header only: nothing is allocated for a file whose shapes are not those of its description."""
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_enc": [d_sae], "b_dec": [d_in]}
    with safetensors.safe_open(weights, "pt") as file:
        for name, shape in expected.items():
            found = file.get_slice(name).get_shape()
            if found != shape:
                raise DamagedError(f"{weights}: {name} is {tuple(found)}, but sae.json says {tuple(shape)}.")
