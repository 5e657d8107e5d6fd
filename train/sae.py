"""The sparse autoencoder: the one object that training produces and evaluation loads.

    f     = act((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec

W_enc is (d_in, d_sae), W_dec (d_sae, d_in): its rows are the latents' directions. A saved SAE takes raw activations:
what training divided by is folded into it (`folded`).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import safetensors
import torch
from safetensors.torch import load
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..cache.errors import DamagedError, UsageError
from ..cache.files import publish, read_json, write_json
from . import rows

FORMAT = 1


class Activation(nn.Module):
    """One link in the chain from pre-activations to latents; its name and `options` rebuild it."""

    registry: ClassVar[dict[str, type["Activation"]]] = {}
    name: ClassVar[str]
    sees_input: ClassVar[bool] = False  # whether forward takes (z_BF, x_BD): a router does

    def __init_subclass__(cls, *, name: str = "") -> None:
        if not name:
            return  # a base of several
        if name in Activation.registry:
            raise TypeError(
                f"two activations are called {name!r}: {Activation.registry[name].__module__}, {cls.__module__}"
            )
        cls.name = name
        Activation.registry[name] = cls

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def rescale_(self, factor: float) -> None:
        """Make act(factor * z) = factor * act_before(z). Nothing to do where that holds already."""

    def recenter_(self, mean_D: Tensor) -> None:
        """Make act(z, x) = act_before(z, x - mean). Nothing to do for what does not see the input."""


class ReLU(Activation, name="relu"):
    def forward(self, z_BF: Tensor) -> Tensor:
        return z_BF.relu()


class KeepsK(Activation):
    """Chooses k latents a token and keeps the positive ones of those.

    While `AnnealK` lowers their number it is `now`, at most the `room` that tensors have.
    """

    now: Tensor | None  # () float32; of the training, and not saved with an SAE

    def __init__(self, k: float) -> None:
        super().__init__(k=k)
        self.k = self.room = k
        self.register_buffer("now", None, persistent=False)

    @property
    def anneals(self) -> bool:
        return self.training and self.now is not None and self.room != self.k

    def choose(self, z_BF: Tensor) -> Tensor:
        """(N) int64: places in the flattened z of the latents chosen, rising by token."""
        raise NotImplementedError

    def forward(self, z_BF: Tensor) -> Tensor:
        flat_N = self.choose(z_BF.detach().reshape(-1, z_BF.shape[-1]))
        return rows.spread(z_BF.flatten().index_select(0, flat_N).relu(), flat_N, z_BF)

    def annealed(self, z: Tensor, tokens: int) -> Tensor:
        """The latents (..., n) that are positive and among the largest `now` `tokens` of their row; the others are zero."""
        assert self.now is not None
        top = z.relu().topk(int(self.room * tokens))
        rank = torch.arange(top.values.shape[-1], device=z.device)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values * (rank < (self.now * tokens).floor()))


def largest(z_BF: Tensor, k: int) -> Tensor:
    """Which k of each row are the largest (B, k), in any order.

    On a CPU, where `topk` takes as long as the encoder's product: they are in those k groups whose maxima are the largest.
    """
    groups, rest = divmod(z_BF.shape[1], 8)
    if z_BF.device.type != "cpu" or rest or groups < 2 * k:
        return z_BF.topk(k, sorted=False).indices
    z_B8G = z_BF.unflatten(1, (8, groups))
    group_BK = z_B8G.amax(1).topk(k, sorted=False).indices
    place_BK = z_B8G.gather(2, group_BK[:, None].expand(-1, 8, -1)).flatten(1).topk(k, sorted=False).indices
    return place_BK // k * groups + group_BK.gather(1, place_BK % k)


class TopK(KeepsK, name="topk"):
    """Keep the k largest latents of each token, and of those the positive ones (Gao et al. 2024)."""

    def __init__(self, k: int) -> None:
        super().__init__(k)

    def choose(self, z_BF: Tensor) -> Tensor:
        index_BK = largest(z_BF, self.k)
        begin_B = torch.arange(0, z_BF.numel(), z_BF.shape[1], device=z_BF.device)
        return (index_BK + begin_B[:, None]).flatten()

    def forward(self, z_BF: Tensor) -> Tensor:
        return self.annealed(z_BF, 1) if self.anneals else super().forward(z_BF)


class BatchTopK(KeepsK, name="batchtopk"):
    """Training: keep the B k largest latents of the batch. Afterwards: keep what exceeds `threshold` (Bussmann et al. 2024).

    So a loaded SAE codes each token by itself. The threshold is moved by the mechanism `Threshold`.
    """

    threshold: Tensor  # ()

    def __init__(self, k: float) -> None:
        super().__init__(k)
        self.register_buffer("threshold", torch.zeros(()))

    def choose(self, z_BF: Tensor) -> Tensor:
        return z_BF.flatten().topk(int(self.k * len(z_BF)), sorted=False).indices.sort().values

    def forward(self, z_BF: Tensor) -> Tensor:
        if not self.training:
            return z_BF.relu() * (z_BF > self.threshold)
        if self.anneals:
            return self.annealed(z_BF.flatten(), z_BF.shape[:-1].numel()).view_as(z_BF)
        return super().forward(z_BF)

    def rescale_(self, factor: float) -> None:
        self.threshold.mul_(factor)


class Pass(NamedTuple):
    pre_BF: Tensor
    f_BF: Tensor
    recon_BD: Tensor
    kept: rows.Kept | None = None  # f_BF as rows go by it; None: dense


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

    def forward(self, x_BD: Tensor) -> Pass:
        pre_BF = self.pre_activations(x_BD)
        if choice := self.gathers():
            at = rows.Chosen.of(choice.choose(pre_BF.detach()), *pre_BF.shape)
            b_D = self.b_dec if self.pre_bias else None
            kept = rows.Kept(rows.encode(pre_BF, x_BD, self.W_enc, self.b_enc, b_D, at).relu(), at)
            recon_BD = rows.decode(kept, self.W_dec) + self.b_dec
            return Pass(pre_BF, rows.spread(kept.value_N, at.flat_N, pre_BF), recon_BD, kept)
        f_BF = self.activate(pre_BF, x_BD)
        return Pass(pre_BF, f_BF, self.decode(f_BF))

    def gathers(self) -> KeepsK | None:
        """The activation, where training is to go by the rows of the latents that it chooses (`rows.pays`)."""
        choice = self.activation[0]
        alone = self.training and len(self.activation) == 1 and isinstance(choice, KeepsK) and not choice.anneals
        return choice if alone and rows.pays(self.d_sae, choice.k, self.W_dec.device.type) else None

    def encode(self, x_BD: Tensor) -> Tensor:
        """Latents (..., d_sae) of activations (..., d_in), of whatever dtype; UsageError for another width."""
        x_BD = of_width(x_BD, self.d_in, "d_in").to(self.W_enc.dtype)
        return self.activate(self.pre_activations(x_BD), x_BD)

    def decode(self, f_BF: Tensor) -> Tensor:
        """Activations (..., d_in) from latents (..., d_sae); UsageError for another width."""
        return of_width(f_BF, self.d_sae, "d_sae") @ self.W_dec + self.b_dec


def of_width(rows: Tensor, width: int, name: str) -> Tensor:
    if rows.shape[-1:] != (width,):
        raise UsageError(
            f"This SAE takes rows of {name} = {width} numbers, and these are of shape {tuple(rows.shape)}."
        )
    return rows


@torch.no_grad()
def folded(sae: SAE, scale: float, mean_D: Tensor) -> SAE:
    """The SAE that does to x what `sae` does to (x - mean)/scale, its latents `scale` times as large.

    W_enc and W_dec stay; biases and thresholds scale; x_hat = scale * x_hat_normalised + mean.
    """
    raw = rebuild(spec_of(sae), {k: v.detach().clone() for k, v in sae.state_dict().items()})
    raw.b_dec.copy_(scale * sae.b_dec + mean_D)
    raw.b_enc.copy_(scale * sae.b_enc - (0 if sae.pre_bias else mean_D @ sae.W_enc))
    for link in raw.activation:
        link.rescale_(scale)  # type: ignore[operator]
        link.recenter_(mean_D)  # type: ignore[operator]
    return raw.eval()


def spec_of(sae: SAE) -> dict[str, Any]:
    chain = [{"name": link.name, **link.options} for link in sae.activation]  # type: ignore[dict-item]
    return {"format": FORMAT, "d_in": sae.d_in, "d_sae": sae.d_sae, "pre_bias": sae.pre_bias, "activation": chain}


def rebuild(spec: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
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
    publish(folder / "sae.safetensors", data)
    write_json(folder / "sae.json", {**spec_of(sae), "sha256": hashlib.sha256(data).hexdigest(), "origin": origin})


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
        sae = rebuild(spec, {name: tensor.to(device) for name, tensor in load(data).items()})
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
