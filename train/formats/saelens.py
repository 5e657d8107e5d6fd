"""SAELens' directory of version 6: cfg.json and sae_weights.safetensors.

    x'   = x - b_dec where apply_b_dec_to_input, which is true where it is not said
    topk   with rescale_acts_by_decoder_norm: f = the k largest of z |W_dec,i|, x_hat = (f / |W_dec|) W_dec + b_dec

We write raw activations in, unit rows, b_dec inside b_enc. So a relu is `standard`, and what has a threshold is `jumprelu`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...common.errors import DamagedError, UsageError
from ...common.files import atomic_write, write_json
from .base import ForeignSAE, Format, Reference
from .canonical import CanonicalSAE, from_canonical
from .hook_names import first_hook, parse_model
from .safe_read import (
    ForeignFolder,
    get_bool,
    get_nested,
    get_positive_int,
    get_str,
    read_safetensors_headers,
    read_weights,
    short_repr,
)

ARCHITECTURES = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
TRAINING_ARCHITECTURES = {"batchtopk", "matryoshka_batchtopk"}  # names of a training, whose inference is a jumprelu
PER_TOKEN_NORMALIZATIONS = {
    "layer_norm": "divides every token by its own standard deviation",
    "constant_norm_rescale": "divides every token by its own norm",
    "covariance_whitening": "whitens its input",
}


class SAELens(Format, name="saelens"):
    holds = ("relu", "topk", "gated", "jumprelu")
    files = ("sae_weights.safetensors", "cfg.json", "activation_scaler.json")

    def recognise(self, folder: ForeignFolder) -> bool:
        return folder.has("sae_weights.safetensors")

    def write(self, plain: CanonicalSAE, folder: Path, about: dict[str, Any]) -> None:
        names = {kind: name for name, kind in ARCHITECTURES.items()}
        config: dict[str, Any] = {
            "architecture": names[plain.kind],
            "d_in": plain.d_in,
            "d_sae": plain.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "hook_z" if ".hook_z" in about.get("hook_name", "") else "none",
        }
        if plain.kind == "topk":  # with unit rows both mean the same, and without it fold_W_dec_norm() is refused
            config |= {"k": plain.k, "rescale_acts_by_decoder_norm": plain.unit_rows}
        tensors = {"W_enc": plain.W_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
        match plain:
            case CanonicalSAE(kind="gated", r_mag=Tensor(), b_mag=Tensor()):
                tensors |= {"b_gate": plain.b_enc, "r_mag": plain.r_mag, "b_mag": plain.b_mag}
            case CanonicalSAE(kind="jumprelu", threshold=Tensor()):
                tensors |= {"b_enc": plain.b_enc, "threshold": plain.threshold}
            case _:
                tensors["b_enc"] = plain.b_enc
        atomic_write(folder / self.files[0], save({n: t.float().contiguous().clone() for n, t in tensors.items()}))
        write_json(folder / "cfg.json", {**config, "metadata": about})

    def load(self, folder: ForeignFolder) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
        """The configuration, the kind, and the tensors as they lie there."""
        config, at = upgrade_config(folder.record("cfg.json")), folder.path / "cfg.json"
        architecture = get_str(at, config, "architecture", "standard")
        if architecture in TRAINING_ARCHITECTURES:
            raise UsageError(
                f"{at} is of a {architecture} in training; SAELens saves its inference as jumprelu. Save it with save_inference_model."
            )
        if architecture not in ARCHITECTURES:
            raise UsageError(
                f"{at} has the architecture {short_repr(architecture)}; known here are {', '.join(ARCHITECTURES)}."
            )
        act = config.get("activation_fn", "relu")
        if act not in (None, "relu", architecture):  # SAELens itself makes a relu of it
            raise UsageError(
                f"{at} has the activation {short_repr(act)}, and is called {architecture}: one of the two is wrong. Ask the author."
            )
        if config.get("finetuning_scaling_factor"):
            raise UsageError(f"{at} has finetuning_scaling_factor, which SAELens itself no longer knows.")
        kind = ARCHITECTURES[architecture]
        path = folder.file(self.files[0])
        claims = read_safetensors_headers(path)
        D, F = get_positive_int(at, config, "d_in"), get_positive_int(at, config, "d_sae")
        expected: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
        more = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(kind, ("b_enc",))
        found = read_weights(path, claims, {**expected, **{name: (F,) for name in more}})
        if kind == "topk" and get_positive_int(at, config, "k") > F:
            raise DamagedError(f"{at}: k is {config['k']}, and there are {F} latents.")
        return config, kind, found

    def scale(self, folder: ForeignFolder, config: dict[str, Any]) -> float:
        """What x is multiplied by before the SAE. UsageError where it is not the same for every token, or not said."""
        at = folder.path / "cfg.json"
        how = get_str(at, config, "normalize_activations", "none")
        if how == "none":
            return 1.0
        if how in PER_TOKEN_NORMALIZATIONS:
            raise UsageError(
                f"{at}: normalize_activations is {how}, which {PER_TOKEN_NORMALIZATIONS[how]}. No SAE of ours does that."
            )
        value = config.get("norm_scaling_factor")
        if folder.has("activation_scaler.json"):
            value = folder.record("activation_scaler.json").get("scaling_factor")
        if how != "expected_average_only_in" or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(
                f"{at}: normalize_activations is {short_repr(how)}, and by how much its input was scaled stands nowhere in the "
                "files. Ask the author to fold it (fold_activation_norm_scaling_factor), or for the factor: norm_scaling_factor in cfg.json."
            )
        if not 1e-30 < value < 1e30:
            raise DamagedError(f"{at}: a scale of {short_repr(value)} is none.")
        return float(value)

    def read(self, folder: ForeignFolder) -> ForeignSAE:
        config, kind, found = self.load(folder)
        s, at = self.scale(folder, config), folder.path / "cfg.json"
        w = {name: t.double() for name, t in found.items()}
        W_enc, W_dec, b_dec = w["W_enc"] * s, w["W_dec"] / s, w["b_dec"] / s
        pre_bias = get_bool(at, config, "apply_b_dec_to_input", True)
        b_enc = w["b_gate"] if kind == "gated" else w["b_enc"]
        inside_F = b_dec @ W_enc if pre_bias else torch.zeros_like(b_enc)
        plain = CanonicalSAE(W_enc, b_enc - inside_F, W_dec, b_dec, kind)
        match kind:
            case "topk":
                if get_bool(at, config, "rescale_acts_by_decoder_norm", False):
                    n_F = w["W_dec"].norm(dim=1)
                    if (n_F == 0).any():
                        raise DamagedError(
                            f"{at}: {int((n_F == 0).sum())} rows of W_dec are zero, and have to be divided by."
                        )
                    plain = CanonicalSAE(W_enc * n_F, plain.b_enc * n_F, W_dec / n_F[:, None], b_dec, kind)
                plain = CanonicalSAE(
                    plain.W_enc, plain.b_enc, plain.W_dec, b_dec, kind, k=get_positive_int(at, config, "k")
                )
            case "jumprelu":
                plain = CanonicalSAE(W_enc, plain.b_enc, W_dec, b_dec, kind, threshold=w["threshold"].clamp_min(0))
            case "gated":
                b_mag = w["b_mag"] - w["r_mag"].exp() * inside_F
                plain = CanonicalSAE(W_enc, plain.b_enc, W_dec, b_dec, kind, r_mag=w["r_mag"], b_mag=b_mag)
        return add_metadata(ForeignSAE(from_canonical(plain, pre_bias=pre_bias)), config)

    def reference(self, folder: ForeignFolder) -> Reference:
        config, kind, found = self.load(folder)
        s, w = self.scale(folder, config), {name: t.double() for name, t in found.items()}

        def code(x_BD: Tensor) -> tuple[Tensor, Tensor]:
            x_BD = x_BD.double() * s
            if config.get("apply_b_dec_to_input", True):
                x_BD = x_BD - w["b_dec"]
            z_BF = x_BD @ w["W_enc"]
            if kind == "gated":
                f_BF = (z_BF + w["b_gate"] > 0) * (x_BD @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
            elif kind == "topk":
                n_F = w["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm", False) else 1.0
                top = ((z_BF + w["b_enc"]) * n_F).topk(config["k"], dim=-1)
                f_BF = torch.zeros_like(z_BF).scatter(-1, top.indices, top.values.relu())
                return f_BF, ((f_BF / n_F) @ w["W_dec"] + w["b_dec"]) / s
            else:
                f_BF = (z_BF + w["b_enc"]).relu()
                if kind == "jumprelu":
                    f_BF = f_BF * (z_BF + w["b_enc"] > w["threshold"])
            return f_BF, (f_BF @ w["W_dec"] + w["b_dec"]) / s

        return code


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of before version 6 in the words of now: topk was an activation of `standard`."""
    old = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {old.get(name, name): value for name, value in config.items()}
    if config.get("activation_fn") == "topk" and (k := get_nested(config, "activation_fn_kwargs", "k")) is not None:
        config |= {"architecture": "topk", "k": k}
    if isinstance(how := config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if how else "none"
    if config.get("normalize_activations", 0) is None:
        config["normalize_activations"] = "none"
    if not isinstance(config.get("metadata", {}), dict):
        config["metadata"] = {}
    return config


def add_metadata(found: ForeignSAE, config: dict[str, Any]) -> ForeignSAE:
    """What the configuration says of model and place; before version 6 it stood at the top."""
    said = {**config, **config.get("metadata", {})}
    found.model = parse_model(said.get("model_name"))
    found.hook = first_hook([said.get("hook_name"), said.get("hf_hook_name")])
    if isinstance(context := said.get("context_size"), int):
        found.context = context
    found.metadata = {name: value for name, value in said.items() if name != "metadata"}
    if config.get("apply_b_dec_to_input") is None:
        found.notes.append("apply_b_dec_to_input is not in cfg.json; SAELens then subtracts b_dec, and so does this.")
    return found
