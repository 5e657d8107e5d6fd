"""The sparse autoencoder: the one object that training produces and evaluation loads.

    f     = act((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec

W_enc has shape (d_in, d_sae) and W_dec (d_sae, d_in); the rows of W_dec are the directions of the latents. A saved SAE
reads raw activations; `fold_normalization` folds the normalization used in training into its weights. A layer norm
differs from token to token and cannot be folded. An SAE trained with layer norm applies the layer norm itself. If m and
s are the mean and the standard deviation of a token, the SAE computes:

    f     = s act(((x - m)/s - b_dec) W_enc + b_enc)
    x_hat = f W_dec + s b_dec + m

The latents of this SAE are in units of raw activations, like those of every saved SAE.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..common.addresses import disk_path
from ..common.errors import DamagedError, UsageError, first_line
from ..common.files import atomic_write, utf8_path
from ..common.precision import current_precision
from ..common.schemas import SAE_RECORD
from . import dense_ops, sparse_ops
from .activation_functions import Activation, KeepTopK, ReLU, activation_chain
from .layer_norm import layer_normalize
from .products import in_own_precision
from .run_records import FORMAT, FORMAT_LAYER_NORM, read_run_record, read_sae_record, require_result_of, run_digest

__all__ = [
    "SAE", "SAEOutput", "build_sae", "fold_normalization", "load_sae", "outline_sae", "read_run_record",
    "read_sae_record", "require_result_of", "run_digest", "sae_spec", "save_sae",
]  # fmt: skip


class SAEOutput(NamedTuple):
    pre_BF: Tensor  # pre-activations
    f_BF: Tensor  # latents
    recon_BD: Tensor
    kept: sparse_ops.KeptLatents | None = None  # f_BF in sparse form; None if it was computed densely


class TrainingOutput(NamedTuple):
    """An SAEOutput whose fields are None if a training step does not need them, since each costs a pass over (B, F)."""

    pre_BF: Tensor | None  # None if the activation is ReLU alone, which overwrites them
    f_BF: Tensor | None  # None if the latents are in `kept`
    recon_BD: Tensor | None  # None if `error_BD` is computed instead
    kept: sparse_ops.KeptLatents | None = None
    squared_error: Tensor | None = None  # (), of the reconstruction; None if it takes an extra pass
    selected_N: Tensor | None = None  # the values of the latents that TopK or BatchTopK selects, without a gradient
    values: Mapping[str, Tensor] = {}  # tensors for the recipe's losses, if its own pass computes them  # noqa: RUF012
    error_BD: Tensor | None = None  # x - x_hat


class SAE(nn.Module):
    """A sparse autoencoder. W_dec starts with random unit rows, W_enc as its transpose, and biases at zero.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        activation: the chain from pre-activations to latents; default ReLU.
        pre_bias: whether the encoder subtracts b_dec from its input.
        layer_norm: whether each token is layer-normalized first (see the module docstring). False during training,
            where the input is already normalized.

    Attributes:
        by_kernels: whether training steps use the operators of train/kernels/batch_operators.py.
        origin: what the SAE was trained on (model, layer, cache), as sae.json records it.
        precision: precision of matrix products in `encode` and `decode`, such as "float32"; None: as set by the caller.
    """

    precision: str | None = None
    by_kernels = False
    own_pass: Callable[["SAE", Tensor, Tensor | None], TrainingOutput | None] | None = None
    """A recipe's own version of `run`, with kernels. If it is None or returns None, `run` takes its usual way."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Sequence[Activation] = (),
        *,
        pre_bias: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.pre_bias, self.layer_norm = d_in, d_sae, pre_bias, layer_norm
        w_FD = torch.randn(d_sae, d_in)
        w_FD = w_FD / w_FD.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(w_FD)
        self.W_enc = nn.Parameter(w_FD.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.activation = activation_chain(activation or [ReLU()])
        self.origin: dict[str, Any] = {}

    def pre_activations(self, x_BD: Tensor, centered_BD: Tensor | None = None) -> Tensor:
        """(x - b_dec) W_enc + b_enc. In training, a batch x gets no gradient. `centered_BD` as in `run`."""
        if self.trains_on(x_BD):
            return dense_ops.encode(x_BD, self.W_enc, self.b_enc, self.b_dec if self.pre_bias else None, centered_BD)
        # A trained SAE sums in the same order in every version of this package, so its results stay bit-identical.
        bias_F = self.b_enc - self.b_dec @ self.W_enc if self.pre_bias else self.b_enc
        z_BF = x_BD @ self.W_enc
        return z_BF.add_(bias_F) if z_BF.dtype == bias_F.dtype else z_BF + bias_F  # adding in place saves a pass over z

    def trains_on(self, x_BD: Tensor) -> bool:
        """Whether x is a training batch. Its rows need no gradient, so train/dense_ops.py can compute the products."""
        return self.training and x_BD.dim() == 2 and not x_BD.requires_grad

    def activate(self, z_BF: Tensor, x_BD: Tensor) -> Tensor:
        for activation in self.activation:
            z_BF = activation(z_BF, x_BD) if activation.sees_input else activation(z_BF)
        return z_BF

    def forward(self, x_BD: Tensor) -> SAEOutput:
        if self.layer_norm:
            z_BF = self.pre_activations(layer_normalize(x_BD).x_BD)
            f_BF = self.encode(x_BD)
            return SAEOutput(z_BF, f_BF, self.decode(f_BF, x_BD))
        pre_BF, f_BF_or_none, recon_BD, kept, *_, error_BD = self.run(x_BD)
        if recon_BD is None:
            assert error_BD is not None
            recon_BD = x_BD - error_BD
        if f_BF_or_none is None:
            assert kept is not None
            f_BF_or_none = kept.dense()
        return SAEOutput(self.pre_activations(x_BD) if pre_BF is None else pre_BF, f_BF_or_none, recon_BD, kept)

    def run(self, x_BD: Tensor, centered_BD: Tensor | None = None) -> TrainingOutput:
        """The forward pass of a training step on normalized activations. Computes only what a step needs.

        `centered_BD` is the encoder's input (`dense_ops.center`), if it is known.
        """
        if self.own_pass is not None and self.trains_on(x_BD):
            done = self.own_pass(self, x_BD, centered_BD)
            if done is not None:
                return done
        b_D = self.b_dec if self.pre_bias else None
        if self.trains_on(x_BD) and [type(link) for link in self.activation] == [ReLU]:
            weights = self.W_enc, self.b_enc, b_D, self.W_dec
            f_BF, product_BD = dense_ops.encode_relu_decode(x_BD, *weights, centered_BD)
            return self.compare(TrainingOutput(None, f_BF, None), product_BD, x_BD)
        pre_BF = self.pre_activations(x_BD, centered_BD)
        topk = self.selecting_activation()
        if topk is None or pre_BF.dim() != 2:
            f_BF = self.activate(pre_BF, x_BD)
            if not self.by_kernels or not self.trains_on(x_BD):
                return TrainingOutput(pre_BF, f_BF, self.decode(f_BF))
            return self.compare(TrainingOutput(pre_BF, f_BF, None), dense_ops.decode(f_BF, self.W_dec), x_BD)
        flat_index_N = topk.select(pre_BF.detach())
        if not self.sparse_activation():
            f_BF, product_BD, selected_N = dense_ops.select_decode(pre_BF, flat_index_N, self.W_dec)
            return self.compare(TrainingOutput(pre_BF, f_BF, None, selected_N=selected_N), product_BD, x_BD)
        selected = sparse_ops.SelectedLatents.of(flat_index_N, len(x_BD), self.d_sae, topk.by_kernels)
        value_N = sparse_ops.encode(pre_BF, x_BD, self.W_enc, self.b_enc, b_D, selected).relu()
        kept, selected_N, squared_error = sparse_ops.KeptLatents(value_N, selected), value_N.detach(), None
        if topk.by_kernels:
            recon_BD, squared_error = sparse_ops.decode_and_compare(kept, self.W_dec, self.b_dec, x_BD)
        else:
            recon_BD = sparse_ops.decode(kept, self.W_dec) + self.b_dec
        return TrainingOutput(pre_BF, None, recon_BD, kept, squared_error, selected_N)

    def compare(self, output: TrainingOutput, product_BD: Tensor, x_BD: Tensor) -> TrainingOutput:
        """`output`, completed with the reconstruction or with its error, computed from the product f W_dec (B, D)."""
        if not self.by_kernels:
            return output._replace(recon_BD=product_BD + self.b_dec)
        error_BD, squared_error = dense_ops.reconstruction_error(product_BD, self.b_dec, x_BD)
        return output._replace(error_BD=error_BD, squared_error=squared_error)

    def selecting_activation(self) -> KeepTopK | None:
        """The activation, if it selects the same number of latents in every step, whatever the values."""
        first = self.activation[0]
        if not self.training or len(self.activation) > 1 or not isinstance(first, KeepTopK) or first.anneals:
            return None
        return first if first.cut is None else None

    def sparse_activation(self) -> KeepTopK | None:
        """The activation, if it makes steps faster to compute only with the latents it selects (`sparse_is_faster`)."""
        topk, device = self.selecting_activation(), self.W_dec.device.type
        if topk is None or not sparse_ops.sparse_is_faster(self.d_sae, topk.k, device, current_precision(device)):
            return None
        return topk

    @in_own_precision
    def encode(self, x_BD: Tensor) -> Tensor:
        """Latents (..., d_sae) of raw activations (..., d_in) in any dtype. Raises UsageError for a wrong width."""
        x_BD = require_width(x_BD, self.d_in, "d_in")
        if self.layer_norm:
            normalized = layer_normalize(x_BD.to(torch.promote_types(x_BD.dtype, self.W_enc.dtype)))
            x_BD = normalized.x_BD.to(self.W_enc.dtype)
            return self.activate(self.pre_activations(x_BD), x_BD) * normalized.std_B1.to(self.W_enc.dtype)
        x_BD = x_BD.to(self.W_enc.dtype)
        return self.activate(self.pre_activations(x_BD), x_BD)

    @in_own_precision
    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        """Reconstruct activations (..., d_in) from latents (..., d_sae).

        Args:
            f_BF: the latents.
            x_BD: the raw activations (..., d_in) from which the latents were encoded. Required if `layer_norm` is set,
                to restore the mean and the standard deviation of each token; otherwise ignored.

        Raises:
            UsageError: the width is wrong, or `x_BD` is required and missing.
        """
        recon_BD = dense_ops.decode(require_width(f_BF, self.d_sae, "d_sae"), self.W_dec)
        if not self.layer_norm:
            return recon_BD + self.b_dec
        if x_BD is None:
            raise UsageError(
                "This SAE layer-normalizes each token, so its reconstruction also depends on the token: call "
                "decode(f, x) with the activations x that f was encoded from."
            )
        x_BD = require_width(x_BD, self.d_in, "d_in")
        normalized = layer_normalize(x_BD.to(torch.promote_types(x_BD.dtype, self.W_enc.dtype)))
        offset_BD = normalized.std_B1 * self.b_dec + normalized.mean_B1
        return recon_BD + offset_BD.to(recon_BD.dtype)


def require_width(rows: Tensor, width: int, name: str) -> Tensor:
    if rows.shape[-1:] != (width,):
        raise UsageError(
            f"This SAE expects shape (..., {width}), where {width} is its {name}, and got {tuple(rows.shape)}."
        )
    return rows


@torch.no_grad()
def fold_normalization(sae: SAE, scale: float | Tensor, mean_D: Tensor, layer_norm: bool = False) -> SAE:
    """Return an SAE that takes raw x and applies `sae` to (x - mean)/scale: x_hat = scale * x_hat_normalized + mean.

    If `scale` is a single number, latents become `scale` times as large: W_enc and W_dec do not change, and biases and
    thresholds are multiplied by `scale`. If there is one scale per dimension (d_in,), latents do not change: the rows
    of W_enc are divided by the scales and the columns of W_dec are multiplied by them, so the rows of W_dec are no
    longer unit vectors. If `layer_norm` is set, the resulting SAE normalizes each token itself; the scale is 1 and the
    mean 0.
    """
    raw = build_sae(sae_spec(sae), {k: v.detach().clone() for k, v in sae.state_dict().items()})
    if isinstance(scale, Tensor) and scale.dim():
        raw.W_enc.div_(scale[:, None])
        raw.W_dec.mul_(scale)
        raw.b_dec.copy_(scale * sae.b_dec + mean_D)
        raw.b_enc.sub_(0 if sae.pre_bias else mean_D @ raw.W_enc)
        return raw.eval()
    scale = float(scale)
    raw.b_dec.copy_(scale * sae.b_dec + mean_D)
    raw.b_enc.copy_(scale * sae.b_enc - (0 if sae.pre_bias else mean_D @ sae.W_enc))
    for activation in raw.activation:
        activation.rescale_(scale)
        activation.recenter_(mean_D)
    raw.layer_norm = layer_norm
    return raw.eval()


def sae_spec(sae: SAE) -> dict[str, Any]:
    """Everything that `build_sae` needs except the tensors, in the form of sae.json."""
    chain = [{"name": activation.name, **activation.options} for activation in sae.activation]
    spec = {"format": FORMAT, "d_in": sae.d_in, "d_sae": sae.d_sae, "pre_bias": sae.pre_bias, "activation": chain}
    return spec | ({"format": FORMAT_LAYER_NORM, "layer_norm": True} if sae.layer_norm else {})


def build_sae(spec: dict[str, Any], tensors: dict[str, Tensor] | None) -> SAE:
    """Build an SAE from a spec and its tensors.

    If `tensors` is None, the SAE is on the meta device: its tensors have no values. Raises UsageError for an unknown
    activation.
    """
    chain = [dict(activation) for activation in spec["activation"]]
    unknown = [activation["name"] for activation in chain if activation["name"] not in Activation.registry]
    if unknown:
        raise UsageError(
            f"unknown activation {unknown[0]!r}; this version has {', '.join(sorted(Activation.registry))}. "
            "Upgrade, or convert the SAE."
        )
    with torch.device("meta"):
        sae = SAE(
            spec["d_in"],
            spec["d_sae"],
            [Activation.registry[activation.pop("name")](**activation) for activation in chain],
            pre_bias=spec["pre_bias"],
            layer_norm=spec.get("layer_norm", False),
        )
    if tensors is not None:
        sae.load_state_dict(tensors, assign=True)
    return sae


def save_sae(sae: SAE, folder: Path, origin: dict[str, Any], run: str | None = None) -> None:
    """Write sae.safetensors, then sae.json.

    Args:
        origin: the model, layer and cache, which evaluation needs.
        run: `run_digest` of the run that trained the SAE.
    """
    data = to_safetensors({k: v.detach().contiguous().cpu() for k, v in sae.state_dict().items()})
    atomic_write(folder / "sae.safetensors", data)
    trained_by = {} if run is None else {"run": run}
    record = {**sae_spec(sae), "sha256": hashlib.sha256(data).hexdigest(), **trained_by, "origin": origin}
    SAE_RECORD.write(folder / "sae.json", record)


def load_sae(folder: str | os.PathLike[str], device: str = "cpu") -> SAE:
    """Load the trained SAE of a run folder, ready to encode raw activations.

    Args:
        folder: a run folder, or a `Run`.
        device: the device for its tensors.

    Raises:
        UsageError: the folder contains no trained SAE, or an SAE that needs a newer version.
        DamagedError: its files were damaged or changed after they were written.
    """
    from . import variants  # noqa: F401  (registers the activations that are defined there)

    folder = disk_path(folder)
    spec = read_sae_record(folder)
    weights, hint = folder / "sae.safetensors", SAE_RECORD.remedy
    try:
        check_shapes(weights, spec["d_in"], spec["d_sae"])
        data = weights.read_bytes()
        if hashlib.sha256(data).hexdigest() != spec["sha256"]:
            raise DamagedError(f"{weights} does not have the checksum that sae.json records. {hint}")
        sae = build_sae({**spec}, {name: tensor.to(device) for name, tensor in load(data).items()})
    except (safetensors.SafetensorError, ArithmeticError, AttributeError, LookupError, OSError, RuntimeError,
            TypeError, ValueError) as error:  # fmt: skip
        raise DamagedError(
            f"{weights} does not hold the SAE that sae.json describes: {first_line(error).rstrip('.')}. {hint}"
        ) from error
    broken = [name for name, tensor in sae.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DamagedError(f"{weights}: {', '.join(broken)} has values that are not finite.")
    sae.origin = {**spec.get("origin", {})}
    return sae.eval().requires_grad_(False)


def outline_sae(folder: Path) -> SAE:
    """An SAE with the shape, options and origin of the SAE in a run folder, but no weights. Reads only the records.

    Raises UsageError in the same cases as `load_sae`, and DamagedError for damaged records.
    """
    from . import variants  # noqa: F401  (registers the activations that are defined there)

    spec = read_sae_record(folder)
    try:
        sae = build_sae({**spec}, None)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{folder / 'sae.json'} describes no SAE: {first_line(error).rstrip('.')}. {SAE_RECORD.remedy}"
        ) from error
    sae.origin = {**spec.get("origin", {})}
    return sae.eval().requires_grad_(False)


def check_shapes(weights: Path, d_in: int, d_sae: int) -> None:
    """Raise DamagedError if the shapes in the file's header do not match d_in and d_sae. Allocates nothing."""
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_enc": [d_sae], "b_dec": [d_in]}
    with utf8_path(weights) as path, safetensors.safe_open(path, "pt") as file:
        for name, shape in expected.items():
            actual = file.get_slice(name).get_shape()
            if actual != shape:
                raise DamagedError(
                    f"{weights}: {name} is {tuple(actual)}, but sae.json says {tuple(shape)}. {SAE_RECORD.remedy}"
                )
